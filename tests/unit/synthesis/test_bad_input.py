"""What is wrong is told in one message, before any long work, with exit code 2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.synthesis.stub import RunningStub
from megatron_synth.cli.main import main
from megatron_synth.config.load import to_yaml
from megatron_synth.synthesis.run import run
from tests.unit.synthesis.test_run import product


@pytest.fixture(scope="module")
def stub():
    with RunningStub() as running:
        yield running


def told(config, capsys, *overrides: str, verb: str = "run") -> str:
    """The one message of a synthesis that is refused."""
    file = config.folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    assert main(["synthesize", verb, str(file), *overrides]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith(("note: ", "  "))]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    return printed.err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("kind=hq-rephrase-2", "kind: there is no kind 'hq-rephrase-2'; did you mean 'hq-rephrase'?"),
        ("template=x.yaml", "give exactly one of kind and template, found kind and template"),
        ("generator.model=another", "generator.model: {url} has no model 'another', it has stub; name one of these"),
        ("generator.model=null", "give exactly one of model and run, found none"),
        ("generator.tokenizer=none.json", "generator.tokenizer: none.json: no such file"),
        ("sampling.max_tokens=4000", "its context has 4096 tokens, prompts have up to about"),
        ("engine.key_variable=NO_SUCH_KEY", "engine.key_variable: the environment has no NO_SUCH_KEY; export it"),
        ("engine.key_variable='sk-123 456'", "expected the name of an environment variable"),
        ("engine.servers=[http://user:secret@host/v1]", "without a user or key"),
        ("engine.servers=[]", "servers: name at least one"),
        ("engine.servers=[http://host:eighty/v1]", "servers: expected http://HOST:PORT"),
        ("engine.servers=['http://:80/v1']", "servers: expected http://HOST:PORT"),
        ("engine.arguments=[--api-key=sk-1]", "arguments: --api-key is set here"),
        ("parents.web.input=none.jsonl", "parents.web.input: none.jsonl: no such file"),
        ("parents.web.input=null", "give exactly one of input, hf, builtin"),
        ("per_parent=0", "per_parent: must be at least 1"),
        ("engine.cuncurrency=4", "engine.cuncurrency: unknown key; did you mean 'engine.concurrency'?"),
        ("filters.min_wordz=4", "filters.min_wordz: unknown key"),
    ],
)
def test_a_wrong_file_is_refused(synthesis, stub, capsys, override, expected):
    config = synthesis(stub.url)
    assert expected.format(url=stub.url) in told(config, capsys, override)
    assert not (config.folder / "corpus").exists()


def test_a_template_without_a_slot_is_refused(synthesis, stub, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"name": "mine", "version": 1, "origin": "x", "source_kind": "other", "prompt": "Say it."}))
    config = synthesis(stub.url, kind=None, template=str(file))
    assert "has no slot: write {{ text }}" in told(config, capsys)


def test_a_server_that_is_not_there_is_told(synthesis, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        message = told(synthesis(f"http://127.0.0.1:{free.getsockname()[1]}"), capsys)
    assert "no answer" in message
    assert "start the server, or correct the address" in message


def test_a_server_of_another_kind_is_told(synthesis, capsys):
    with RunningStub(missing=True) as stub:
        assert "answers with status 404, which is no OpenAI API" in told(synthesis(stub.url), capsys)


@pytest.mark.parametrize(("variable", "expected"), [(None, "set engine.key_variable"), ("WRONG", "check the key in WRONG")])
def test_a_wrong_key_is_told_and_not_shown(synthesis, capsys, monkeypatch, variable, expected):
    monkeypatch.setenv("WRONG", "geheim-0000")
    with RunningStub(key="geheim-1234") as stub:
        message = told(synthesis(stub.url, engine={"key_variable": variable}), capsys)
    assert expected in message
    assert "status 401" in message
    assert "geheim" not in message


@pytest.mark.parametrize(
    ("behavior", "expected"),
    [
        ({"finish": "stop"}, "an answer of one token ends with 'stop', expected 'length'"),
        ({"refuse": "model"}, "refuses the first request: status 400: not this one"),
    ],
)
def test_a_server_that_cannot_do_what_is_asked_is_told(synthesis, capsys, behavior, expected):
    with RunningStub(**behavior) as stub:
        assert expected in told(synthesis(stub.url), capsys)


def test_a_server_that_stays_away_ends_with_75(synthesis, capsys):
    with RunningStub() as stub:
        config = synthesis(stub.url, engine={"patience_s": 0.3, "breaker": 2})
        stub.behavior.status = 500
        file = config.folder.with_suffix(".yaml")
        file.write_text(to_yaml(config))
        assert main(["synthesize", "run", str(file)]) == 75


def test_the_report_of_what_was_not_made_is_refused(synthesis, stub, capsys):
    assert "no finished corpus" in told(synthesis(stub.url), capsys, verb="report")


def test_a_plan_needs_no_server(synthesis, capsys):
    config = synthesis("http://127.0.0.1:9", generator={"parameters": 8_000_000_000, "license": "llama3"})
    file = config.folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    assert main(["synthesize", "plan", str(file), "--gpus", "8", "--price", "2.5"]) == 0
    text = capsys.readouterr().out
    assert "61 documents, of which 1 are skipped" in text
    assert "tokens/s each (Qwen3-8B on an H100" in text
    assert "llama3: outputs may not be used to improve other" in text
    assert not config.folder.exists()


def test_a_run_whose_context_is_too_short_is_refused_before_it_is_exported(synthesis, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {name: custom, num_layers: 2, hidden_size: 32, num_attention_heads: 4}\n"
        "data: {sources: {web: {ratio: '1'}}}\ntrain: {steps: 4, sequence_length: 32, seed: 1}\nprecision: {dtype: fp32}\n"
    )
    for verb in ("plan", "run"):
        config = synthesis(generator={"model": None, "run": str(tmp_path / "run")})
        error = told(config, capsys, verb=verb)
        assert "its context has 32 tokens, prompts have up to" in error and "name the copy as `template:`" in error
        assert not (config.folder / "generator").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_the_folder_of_a_model_is_not_waited_for(name, synthesis, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": true}')  # which is no number
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    error = told(synthesis(generator={"model": str(folder)}), capsys, verb="plan")
    assert ("no config.json" if name == "config.json" else f"{name}: not a regular file") in error


def limited(file: Path, size: int) -> str:
    """The one error of a run, in a process of its own, in which no file may grow beyond a size."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
        "from megatron_synth.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "synthesize", "run", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1
    return errors[0]


def test_a_full_disk_ends_with_one_message_and_loses_nothing(synthesis, stub):
    """What fits is kept, and is not asked again; a corpus that does not fit costs no answer."""
    config = synthesis(stub.url)
    file = config.folder.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    told = limited(file, 60_000)
    assert "answers are kept; make room" in told
    kept = int(told.split("; ")[1].split()[0])
    assert kept > 5
    found = run(config)
    assert found.account is not None
    assert found.made == found.account.asked - kept
    before = product(config.folder)
    assert f"all {found.account.asked} answers are kept; make room" in limited(file, 30_000)
    assert product(config.folder) == before  # that of the run before stays
    assert run(config).made == 0
