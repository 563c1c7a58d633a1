"""`prepare --share`, `--status` and `--slurm` on the command line."""

from __future__ import annotations

import os
import signal

import pytest
import yaml

from megatron_synth.cli.prepare import main
from megatron_synth.cli.study import main as study
from megatron_synth.cluster import slurm
from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing import shared
from tests.unit.data.preparing.support import jsonl, tree
from tests.unit.study.test_study_file import study_of


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prepare.yaml"
    jsonl(tmp_path / "a.jsonl")
    source = f"{{kind: natural, input: {tmp_path / 'a.jsonl'}}}"
    tokenizer = "{train: {vocab_size: 300}}"
    path.write_text(f"output: {tmp_path / 'out'}\ntokenizer: {tokenizer}\nsources: {{web: {source}}}\n")
    return path


def test_shares_one_after_the_other_and_then_the_rest(file, tmp_path, capsys) -> None:
    alone = [str(file), f"output={tmp_path / 'alone'}", "--workers", "1"]
    assert main(alone) == 0
    assert main([str(file), "--status"]) == 0
    assert "nothing of it has begun" in capsys.readouterr().out
    for share in ("0/2", "1/2"):
        assert main([str(file), "--share", share, "--workers", "1"]) == 0
    assert "share 0/2: 1 splits tokenized, 0 were there; the command without --share goes on" in capsys.readouterr().out
    assert main([str(file), "--status"]) == 0
    assert "share-00000-of-00002: 1 splits, " in capsys.readouterr().out
    assert main([str(file), "--workers", "1"]) == 0
    assert main([str(file), "--share", "0/2"]) == 0 and main([str(file), "--status"]) == 0
    said = capsys.readouterr().out
    assert "up to date" in said and "out: prepared" in said
    ours, theirs = (
        {name: data for name, data in tree(folder).items() if name != "prepare.json"}
        for folder in (tmp_path / "out", tmp_path / "alone")
    )
    assert ours == theirs


def test_the_text_of_a_study_in_shares_and_its_status(file, tmp_path, capsys) -> None:
    more = {"arms": {"natural": {"web": 1}}, "sources": {"web": {"path": str(tmp_path / "out" / "web")}}}
    content = study_of(tmp_path, prepare=file.name, validation={"web": {"path": str(tmp_path / "out" / "web")}}, **more)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))

    def say(verb: str, *options: str) -> str:
        assert study([verb, str(tmp_path / "study.yaml"), *options]) == 0
        return capsys.readouterr().out

    assert f"{tmp_path / 'out'}: nothing of it has begun" in say("status")
    say("prepare", "--share", "0/2", "--workers", "1")
    told = say("prepare", "--status")
    assert told.startswith("share-00000-of-00002: 1 splits, ") and told in say("status")
    say("prepare", "--workers", "1")
    assert say("prepare", "--status") == f"{tmp_path / 'out'}: prepared\n" and "prepared" not in say("status")
    with pytest.raises(UserError, match="--tasks: say how many shares"):
        study(["prepare", str(tmp_path / "study.yaml"), "--slurm"])


def test_a_dry_run_shows_the_jobs_and_writes_nothing(file, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(slurm, "available", lambda: False)
    before = sorted(tmp_path.iterdir())
    assert main([str(file), "--slurm", "--tasks", "3", "--partition", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("web: 1 file by byte ranges", "--array=0-2", "--partition=cpu", "--share 2/3", "prepare-out-assembly"):
        assert part in said, said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "4"], "--tasks: is for --slurm, which was not given"),
        (["--slurm"], "--tasks: say how many shares the array has"),
        (["--slurm", "--tasks", "4", "--force"], "--force: not with --slurm"),
        (["--slurm", "--tasks", "200000", "--dry-run"], "--tasks: at most 100,000, found 200,000"),
        (["--share", "4/4"], "--share: expected NUMBER/OF such as 0/4"),
    ],
)
def test_options_that_do_not_go_together(file, options, message) -> None:
    with pytest.raises(UserError, match=message):
        main([str(file), *options])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_scheduler_that_stops_a_share_hears_that_it_can_go_on(file, tmp_path, monkeypatch, capsys, unheard, number) -> None:
    def stopped(*_):
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(shared, "tokenize_split", stopped)
        assert main([str(file), "--share", "0/1", "--workers", "1"]) == 75
    assert "stopped on request; what is done is kept" in capsys.readouterr().err
    assert main([str(file), "--share", "0/1", "--workers", "1"]) == 0
