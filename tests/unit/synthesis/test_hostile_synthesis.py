"""Templates of strangers, servers that lie, and outputs that were altered: one message each, and nothing outside is touched."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli.main import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.interop import export
from megatron_synth.synthesis import generator
from megatron_synth.synthesis.answers.parts import Answer, Answers
from megatron_synth.synthesis.engines import http
from megatron_synth.synthesis.kinds.template import load_template
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

MakeFile = Callable[..., SynthesisConfig]


def _verb(verb: str, config: SynthesisConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what stands in the last line of the errors."""
    file = config.folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    code = main(["synthesize", verb, str(file)])
    printed = capsys.readouterr().err.splitlines()
    return code, printed[-1] if printed else ""


# ---- templates


def _template(folder: Path, prompt: str, **changes: object) -> Path:
    content = {"name": "mine", "version": 1, "origin": "mine", "source_kind": "other", "prompt": prompt, **changes}
    file = folder / "mine.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("{{ text }}{{ 9 ** 9 ** 9 ** 9 }}", "Pow"),
        ("{{ text }}{{ 'x' * 10 ** 12 }}", "Mul"),
        ("{{ text }}{{ '%999999999d' % 1 }}", "Mod"),
        ("{{ text | replace('a', 'b') }}", "the filter replace"),
        ("{{ text | center(10 ** 9) }}", "the filter center"),
        ("{{ text | join('x') }}", "the filter join"),
        ("{% for a in text %}{% for b in text %}{{ a }}{% endfor %}{% endfor %}", "For"),
        ("{% for a in text recursive %}{{ loop(text) }}{% endfor %}", "For"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{{ text }}", "Call"),
        ("{% set x = text ~ text %}{{ x }}", "Assign"),
        ("{{ text.upper() }}", "Call"),
        ("{{ text[0:10**9] }}", "Getitem"),
    ],
)
def test_prompts_that_would_take_any_time_and_memory(prompt: str, named: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(UserError, match=rf"mine\.yaml.*\n.*prompt: line 1: {named} is not allowed"):
        load_template(_template(tmp_path, prompt))
    assert time.process_time() - began < 2


def test_what_prompts_may_have(tmp_path: Path) -> None:
    prompt = "{% for word in keywords %}{% if loop.first %}{{ word | upper }}{% else %}, {{ word }}{% endif %}{% endfor %}: "
    prompt += "{{ keywords | length }}, {{ keywords[0] }}, {{ keywords | join(' ') }}{{ '!' if keywords | length > 1 else '' }}"
    asked = {"made_from": "keywords", "short": "skip", "reassemble": False}
    template = load_template(_template(tmp_path, prompt, **asked))
    assert template.render({"keywords": ["a", "b"]}) == "A, b: 2, a, a b!"


def test_a_prompt_has_an_end(tmp_path: Path) -> None:
    template = load_template(_template(tmp_path, "{{ text }}" * 5000))
    with pytest.raises(UserError, match="template mine: prompt: makes more than 16,777,216 characters"):
        template.render({"text": "x" * 10_000})


# ---- servers


@contextmanager
def _server(models: list[bytes], answer: Any = None, packed: bytes | None = None) -> Iterator[str]:
    """A server whose list of models comes in parts; each answer is `answer` as JSON, or `packed` as gzip."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/models") else 404)
            self.send_header("content-length", str(sum(map(len, models))))
            self.end_headers()
            for part in models:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(0.05)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = packed or json.dumps({**answer, "asked": asked["seed"]}).encode()
            self.send_response(200)
            if packed is not None:
                self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


MODELS = [b'{"data": [{"id": "', b"other", b'"}, {"id": "stub"}]}']


def test_a_list_of_models_that_comes_in_parts_is_read_whole(synthesis: MakeFile, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {}}
    with _server(MODELS, answer) as url:
        code, told = _verb("run", synthesis(url), capsys)
    assert code == 2 and "an answer of one token ends with 'stop', expected 'length'" in told


def test_names_of_models_are_not_shown_in_full(synthesis: MakeFile, capsys: pytest.CaptureFixture[str]) -> None:
    models = json.dumps({"data": [{"id": "m" * 10**6 + "\x1b[2J"}]}).encode()
    with _server([models]) as url:
        code, told = _verb("run", synthesis(url), capsys)
    assert code == 2 and "it has mmmm" in told and len(told) < 1000


def test_a_reply_that_unfolds_to_gigabytes_is_none(
    synthesis: MakeFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 2**20)
    packed = gzip.compress(b'{"choices": [{"text": "' + b"x" * 2**24 + b'", "finish_reason": "length"}]}')
    assert len(packed) < 2**16
    with _server(MODELS, packed=packed) as url:
        code, told = _verb("run", synthesis(url, engine={"attempts": 2, "patience_s": 2}), capsys)
    assert code == 2 and "does not answer the first requests" in told


def test_half_a_surrogate_pair_in_any_field_is_kept_as_a_mark(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.add([("0" * 32, ["a"], 0, 0, Answer("t\ud800", "f\udfff", 1, 1))])
    answers.close()
    line = json.loads((tmp_path / "part-00000.jsonl").read_text(encoding="utf-8"))
    assert (set(line["text"]), set(line["finish"])) == (set("t\ufffd"), set("f\ufffd"))


# ---- outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with RunningStub() as stub:
        yield stub.url


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_parts_that_are_no_files_of_ones_own(
    kind: str, made: str, synthesis: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = synthesis(made)
    other = tmp_path / "mine.txt"
    other.write_text("a line\nno end")
    part = config.folder / "answers" / "part-00000.jsonl"
    part.parent.mkdir(parents=True)
    if kind == "link":
        part.symlink_to(other)
    else:
        os.mkfifo(part)
    for verb in ("run", "plan", "status"):
        code, told = _verb(verb, config, capsys)
        assert code == 2 and f"{part}: " in told and "take the part away" in told, (verb, told)
    assert other.read_text() == "a line\nno end"


def test_damage_of_what_was_made_is_one_message_in_every_verb(
    made: str, synthesis: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    config = synthesis(made)
    run(config)
    part, record = config.folder / "answers" / "part-00000.jsonl", config.folder / "synthesis.json"
    corpus, rejected = config.folder / "corpus" / "part-00000.jsonl", config.folder / "rejected.jsonl"
    first, line = part.read_bytes().split(b"\n")[0] + b"\n", corpus.read_bytes().split(b"\n")[0]
    content = json.loads(record.read_text())
    del content["template"]["name"]
    for file, damage, verbs in (
        (part, part.read_bytes() + first, ("plan", "run")),
        (part, b'{"key": "\xff' + part.read_bytes()[10:], ("plan", "run", "status")),
        (corpus, b"\xff" + corpus.read_bytes(), ("report",)),
        (corpus, b"[" * 5000 + b"\n", ("report",)),
        (corpus, line.replace(b'"text": "', b'"text": "\\ud800') + b"\n", ("report",)),
        (rejected, b'{"text": "x", "parents": "abc"}\n', ("report",)),
        (rejected, b"\xff\n", ("report",)),
        (record, json.dumps(content).encode(), ("report", "status")),
    ):
        kept = file.read_bytes()
        file.write_bytes(damage)
        for verb in verbs:
            code, told = _verb(verb, config, capsys)
            assert code == 2 and told.startswith("error: ") and str(config.folder) in told, (file.name, verb, told)
        file.write_bytes(kept)
    assert _verb("report", config, capsys)[0] == 0


def test_an_export_that_was_interrupted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(checkpoint: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(export, "newest_checkpoint", lambda run: run / "step_00000001")
    monkeypatch.setattr(export, "export_to_hf", write)
    folder = tmp_path / "out" / "generator"
    folder.parent.mkdir()
    fails = True
    with pytest.raises(KeyboardInterrupt):
        generator.export_run(tmp_path / "run", folder)
    assert not folder.exists()
    fails = False
    for _ in range(2):
        generator.export_run(tmp_path / "run", folder)
    assert [path.name for path in folder.parent.iterdir()] == ["generator"]
    with pytest.raises(UserError, match="exported from another checkpoint"):
        generator.export_run(tmp_path / "other", folder)
