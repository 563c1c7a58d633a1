"""`prepare` is all or nothing: runs that are stopped, fail or are made again."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_synth.cli.main import main
from megatron_synth.config.errors import UserError
from megatron_synth.data.preparing import assembly, pipeline, splits
from megatron_synth.data.preparing import prepare as preparing
from megatron_synth.data.preparing.journal import JOURNAL, read_journal
from megatron_synth.data.preparing.output import Unfinished, lock_of
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.preparing.workers import Workers
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.data.shards.source import open_source
from tests.support import ROOT
from tests.unit.data.preparing.support import SHUFFLED_AND_PACKED, TEXTS, jsonl, tree


def test_again_is_up_to_date_changed_is_refused_and_force_replaces(tmp_path, make, capsys):
    config = make()
    assert prepare(config) is not None
    before = tree(tmp_path / "out")
    assert prepare(config) is None
    with pytest.raises(UserError, match="other settings or inputs; use --force"):
        prepare(make({"kind": "other"}))
    jsonl(tmp_path / "web.jsonl", [text.swapcase() for text in TEXTS])  # as many bytes as before
    with pytest.raises(UserError, match="other settings or inputs; use --force"):
        prepare(config)
    assert tree(tmp_path / "out") == before
    assert prepare(config, force=True) is not None
    assert tree(tmp_path / "out") != before
    os.truncate(tmp_path / "out" / "web" / "shard-00000.bin", 10)
    with pytest.raises(UserError, match="is damaged, use --force"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_no_prepared_output_is_never_replaced(tmp_path, make):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no prepared output"):
        prepare(make(), force=True)
    assert tree(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_killed_in_the_middle_leaves_nothing_that_opens_and_no_worker(tmp_path, make):
    big = jsonl(tmp_path / "big.jsonl", (f"{text} {copy}" for copy in range(4000) for text in TEXTS[:25]))
    settings = make({"input": str(big)}, shard_tokens=20_000).model_dump_json()
    code = (
        "import sys\n"
        "from megatron_synth.config.prepare import PrepareConfig\n"
        "from megatron_synth.data.preparing.prepare import prepare\n"
        "if __name__ == '__main__': prepare(PrepareConfig.model_validate_json(sys.argv[1]), workers=2)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), settings], env=environment)
    deadline = time.monotonic() + 300  # to end, not to judge: it takes a second
    while not list(tmp_path.glob(".out.partial-*/web/shard-00002.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.partial-*")
    for folder in (tmp_path / "out" / "web", partial / "web"):
        with pytest.raises(UserError):
            open_source(folder, "web")
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "workers outlive their parent"
    prepare(make())
    assert not partial.exists(), "the next run clears what the killed one left"
    assert open_source(tmp_path / "out" / "web", "web").num_documents == len(TEXTS)


STEPS = ["tokenize_task", "write_shard", "plan_shards", "_count"]


class Killed(KeyboardInterrupt):
    """What a kill looks like to a run in this process: no handler but the last one."""


@pytest.mark.parametrize("order", [{}, SHUFFLED_AND_PACKED])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_stopped_anywhere_is_continued_to_the_same_bytes(tmp_path, make, monkeypatch, capsys, step, order):
    for name, size in (("CHUNK_CHARACTERS", 300), ("RUN_BYTES", 200)):
        monkeypatch.setattr(pipeline, name, size)
    monkeypatch.setattr(splits, "SMALL_SPLIT", 900)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 900)
    source = {"holdout": "1/4", "max_bytes": 2500}
    settings = {"shard_tokens": 150, "tokenizer": {"train": {"vocab_size": 300}}, **order}
    prepare(make(source, **settings))
    expected = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    real = getattr(pipeline, step)
    calls, limit = 0, 0

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Killed
        return real(*arguments)

    total = 0
    monkeypatch.setattr(pipeline, step, stopping)
    for limit in range(1, 200):  # noqa: B007  # each attempt may do one thing more than the last before it is stopped
        calls = 0
        try:
            prepare(make(source, **settings))
            break
        except Killed:
            total += 1
            assert not (tmp_path / "out").exists()
            (partial,) = tmp_path.glob(".out.partial-*")
            with open(partial / "journal.jsonl", "a") as file:
                file.write('{"kind": "split", "sou')  # a line torn by the kill
    assert total >= 1 and "continuing a run that was stopped" in capsys.readouterr().err
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_what_is_done_is_not_done_again(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_SPLIT", 900)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 900)
    done = {"tokenize": [], "shard": []}
    real_tokenize, real_shard = pipeline.tokenize_task, pipeline.write_shard

    def tokenize(tokenizer, task):
        done["tokenize"].append(task[1])
        if task[1] == 3 and done["tokenize"].count(3) == 1:
            raise Killed
        return real_tokenize(tokenizer, task)

    def shard(tokenizer, task):
        done["shard"].append(task.prefix.name)
        if task.prefix.name == "shard-00002" and done["shard"].count("shard-00002") == 1:
            raise Killed
        return real_shard(tokenizer, task)

    monkeypatch.setattr(pipeline, "tokenize_task", tokenize)
    monkeypatch.setattr(pipeline, "write_shard", shard)
    for _ in range(2):
        with pytest.raises(Killed):
            prepare(make(shard_tokens=300))
    assert prepare(make(shard_tokens=300)) is not None
    assert done["tokenize"][:5] == [0, 1, 2, 3, 3] and sorted(set(done["tokenize"][4:])) == done["tokenize"][4:]
    assert done["shard"][:4] == ["shard-00000", "shard-00001", "shard-00002", "shard-00002"]
    assert len(set(done["shard"])) == len(done["shard"]) - 1


class Dying(Workers):
    """Of which some die after five tasks."""

    def run(self, function, tasks):
        for done, found in enumerate(super().run(function, tasks)):
            if done == 5:
                raise Unfinished("a worker died")
            yield found


def test_what_is_done_is_kept_where_workers_die(tmp_path, make, monkeypatch, capsys):
    monkeypatch.setattr(splits, "SMALL_SPLIT", 900)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 900)
    assert prepare(make(output=str(tmp_path / "whole"))) is not None
    with pytest.raises(UserError, match="a worker died"):
        prepare(make(), start=lambda tokenizer, folder: Dying(tokenizer, 1))
    (left,) = tmp_path.glob(f".out.partial-*/{JOURNAL}")
    assert [entry["number"] for entry in read_journal(left) if entry["kind"] == "split"] == [0, 1, 2, 3, 4]
    assert prepare(make()) is not None
    assert "continuing a run that was stopped" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_stopped_run_of_other_settings_or_with_a_damaged_run_is_not_trusted(tmp_path, make, monkeypatch):
    monkeypatch.setattr(splits, "SMALL_SPLIT", 900)
    monkeypatch.setattr(splits, "SPLIT_BYTES", 900)
    real = pipeline._count
    prepare(make(shard_tokens=300))
    expected = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def stop(*arguments):
        raise Killed

    monkeypatch.setattr(pipeline, "_count", stop)
    with pytest.raises(Killed):
        prepare(make(shard_tokens=300))
    monkeypatch.setattr(pipeline, "_count", real)
    (partial,) = tmp_path.glob(".out.partial-*")
    victim = sorted((partial / pipeline.STAGING / "web").glob("*.run"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    prepare(make(shard_tokens=300))
    assert tree(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(pipeline, "_count", stop)
    with pytest.raises(Killed):
        prepare(make({"kind": "other"}, shard_tokens=300))
    monkeypatch.setattr(pipeline, "_count", real)
    prepare(make(shard_tokens=300))
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_a_failing_run_leaves_nothing(tmp_path, make):
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a.jsonl, line 61: broken JSON"):
            prepare(make({"input": str(path)}, shard_tokens=100), workers=workers)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_full_disk_is_refused_before_and_cleaned_after(tmp_path, make, monkeypatch):
    class Usage:
        free = 100

    with monkeypatch.context() as patch:
        patch.setattr(preparing.shutil, "disk_usage", lambda folder: Usage)
        with pytest.raises(UserError, match=r"needs about .* are free in"):
            prepare(make())
        assert prepare(make({"max_bytes": 100})) is not None, "max_bytes bounds the estimate"

    def no_space(self, tokens, lengths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembly.ShardWriter, "add", no_space)
    with pytest.raises(UserError, match=r"web/shard-00000\.bin: No space left on device at byte 0; nothing was kept"):
        prepare(make(), force=True)
    assert Manifest.load(tmp_path / "out" / "web").counts.documents < len(TEXTS), "the old output is untouched"
    assert not list(tmp_path.glob(".out*"))


def test_an_output_that_another_program_makes_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a text")
    file = tmp_path / "data.yaml"
    file.write_text(
        f"output: {tmp_path}/out\ntokenizer: {{train: {{vocab_size: 300}}}}\n"
        f"sources: {{web: {{kind: natural, input: {tmp_path}/text.txt}}}}\n"
    )
    with lock_of(tmp_path / "out"):
        assert main(["prepare", str(file), "--workers", "1"]) == 2
        assert "in use by `megatron-synth prepare` of" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["prepare", str(file), "--workers", "1"]) == 0
