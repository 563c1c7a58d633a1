"""The command line: late imports, exit codes, and who prints an error."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import EXIT_UNREAD, RankError, UserError
from tests.support import write_config, write_corpus


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_synth.cli.main import main; code = main(['--help'])\n"
        "print([name for name in ('torch', 'pydantic', 'numpy', 'yaml', 'megatron') if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] 0"
    for verb in cli.VERBS:
        assert f"\n  {verb} " in result.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_function(verb: str) -> None:
    assert callable(cli.load(verb))


def test_an_unknown_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'trian'; did you mean 'train'?\n"


def test_no_verb_is_an_error_and_version_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith("megatron-synth 0.2.0\n")


@pytest.mark.parametrize(
    ("raised", "rank", "code", "printed"),
    [
        (UserError("no"), None, 2, "error: no\n"),
        (UserError("no"), "0", 2, "error: no\n"),
        (UserError("no"), "3", 2, ""),
        (RankError("rank 3: no"), "3", 2, "error: rank 3: no\n"),
        (KeyboardInterrupt(), None, 130, ""),
        (None, None, 75, ""),
    ],
)
def test_exit_codes_and_who_prints(
    raised: BaseException | None,
    rank: str | None,
    code: int,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def verb(arguments: list[str]) -> int:
        assert arguments == ["a", "b=1"]
        if raised is not None:
            raise raised
        return 75

    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "load", lambda name: verb)
    assert cli.main(["train", "a", "b=1"]) == code
    assert capsys.readouterr().err == printed


def test_an_internal_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(arguments: list[str]) -> int:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(cli, "load", lambda name: verb)
    with pytest.raises(AssertionError, match="a fault of ours"):
        cli.main(["train"])


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -u -m megatron_synth config show train/quickstart.yaml | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("model:\n", "")


def test_a_verb_whose_output_nobody_reads_does_not_say_that_it_is_done() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nowhere:
        command = [sys.executable, "-m", "megatron_synth", "config", "show", "train/quickstart.yaml"]
        result = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (EXIT_UNREAD, "")


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.import_module("megatron_synth").__version__ == cli.__version__


def test_an_interrupted_eval_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_synth.cli import eval as verb

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_evaluate", interrupted)
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", write_corpus(tmp_path / "corpus"))
    assert cli.main(["eval", str(run)]) == 130
    assert "nothing was written" in capsys.readouterr().err and [path.name for path in run.iterdir()] == ["config.yaml"]


def test_train_says_what_it_does_before_the_engine_is_loaded(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")  # importing the real one takes seconds
    command = [sys.executable, "-m", "megatron_synth", "train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'run.yaml'}: TP1 x PP1 x DP1, 1 rank") and str(tmp_path / "run") in done.stdout
