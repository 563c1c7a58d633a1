"""Shares of a preparation: the same bytes for any number of them, whoever is killed when, and nothing done twice."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.core.share import Share
from megatron_synth.data.preparing import prepare as preparing
from megatron_synth.data.preparing import splits
from megatron_synth.data.preparing.journal import JOURNAL, read_journal
from megatron_synth.data.preparing.prepare import prepare, prepare_share
from megatron_synth.data.preparing.shared import folder_of, progress_text
from tests.unit.data.preparing.support import SHUFFLED_AND_PACKED, TEXTS, jsonl, tree

SETTINGS = {"plain": {}, "shuffled and packed": SHUFFLED_AND_PACKED}


def two_kb(_):
    return 2000


SMALL = {"split_bytes": two_kb, "growing": two_kb, "STREAMED_ABOVE": 500}
"""Splits so small that a small text has dozens."""


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(splits, name, value)


@pytest.fixture
def text(tmp_path):
    """Lines, a compressed file that is read from its start, row groups, a source with a limit, and bad records."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "in"
    folder.mkdir()
    jsonl(folder / "a.jsonl", TEXTS * 6)
    jsonl(folder / "b.jsonl", [f"{n} {text}" for n, text in enumerate(TEXTS * 3)])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes() + b'{"no": 1}\n', mtime=0))
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "d.parquet", row_group_size=9)
    return folder


def config_for(text, output, **more):
    tokenizer = {"train": {"vocab_size": 300, "max_bytes": 5000}}
    every = {"kind": "natural", "input": str(text / "*"), "holdout": "1/10", "on_error": "skip"}
    few = {"kind": "natural", "input": str(text / "b.jsonl"), "max_bytes": 5000}
    sources = {"all": every, "few": few}
    return PrepareConfig.model_validate(
        {"output": str(output), "tokenizer": tokenizer, "sources": sources, "shard_tokens": 4000, **more}
    )


def bytes_of(output):
    """All but what names the output."""
    return {name: data for name, data in tree(output).items() if name != "prepare.json"}


def told(config):
    """Of each journal of a share the splits that it tells of."""
    found = [read_journal(path) for path in folder_of(preparing.Path(config.output)).glob(f"share-*/{JOURNAL}")]
    return [entry["number"] for entries in found for entry in entries if entry["kind"] == "split"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_any_number_of_shares_gives_the_bytes_of_one_machine(text, tmp_path, settings) -> None:
    more = SETTINGS[settings]
    prepare(config_for(text, tmp_path / "alone", **more))
    for count in (1, 4, 16):
        config = config_for(text, tmp_path / f"of-{count}", **more)
        for number in random.Random(count).sample(range(count), count):
            made, there = prepare_share(config, Share(number, count))
            assert made > 0 and there == 0
        numbers = told(config)
        assert sorted(numbers) == list(range(len(numbers))) and len(numbers) > 20  # all of them, none twice
        assert prepare_share(config, Share(0, count)) == (0, len(range(0, len(numbers), count)))
        assert "share-00000-of" in progress_text(tmp_path / f"of-{count}")
        prepare(config)
        assert bytes_of(tmp_path / f"of-{count}") == bytes_of(tmp_path / "alone"), count
        assert not folder_of(tmp_path / f"of-{count}").exists()
        assert prepare_share(config, Share(0, count)) is None


def killed(config, share, after):
    """Do a share in a process that kills itself after so many splits."""
    from megatron_synth.data.preparing import journal, shared

    vars(splits).update(SMALL)

    class Fatal(journal.Journal):
        done = 0

        def append(self, entry):
            if entry["kind"] == "split":
                Fatal.done += 1
                if Fatal.done > after:
                    os.kill(os.getpid(), signal.SIGKILL)
            super().append(entry)

    shared.Journal = Fatal
    prepare_share(config, share)


def test_shares_that_are_killed_or_never_come_are_made_up_for(text, tmp_path) -> None:
    prepare(config_for(text, tmp_path / "alone"))
    config = config_for(text, tmp_path / "out")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_synth.data.preparing.prepare"])
    chosen = random.Random(1)
    for attempt in range(10):
        process = context.Process(target=killed, args=(config, Share(attempt % 3, 4), chosen.randrange(4)))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert len(told(config)) == len(set(told(config)))
    prepare_share(config, Share(1, 2))  # another number of shares: what is done stays done
    assert len(told(config)) == len(set(told(config)))
    damaged = sorted(folder_of(tmp_path / "out").glob("share-*/runs/all/*.run"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    prepare(config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_work_of_other_inputs_is_not_taken_over(text, tmp_path) -> None:
    config = config_for(text, tmp_path / "out")
    prepare_share(config, Share(0, 2))
    jsonl(text / "a.jsonl", TEXTS[::-1])
    prepare(config_for(text, tmp_path / "alone"))
    prepare_share(config, Share(1, 2))
    made, there = prepare_share(config, Share(0, 2))
    assert made > 0 and there == 0
    prepare(config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_the_plan_says_how_each_source_is_cut(text, tmp_path, capsys) -> None:
    (text / "e.txt").write_text("whole")
    assert preparing.check_inputs(config_for(text, tmp_path / "out"))
    said = capsys.readouterr().out
    expected = "2 files by byte ranges, 1 file by row groups, 1 file whole, 1 file read from its start by every share"
    assert f"all: {expected}\n" in said and "few: has max_bytes, read by the last job" in said


def test_a_share_is_one_process_and_has_a_plain_name(text, tmp_path) -> None:
    config = config_for(text, tmp_path / "out")
    for wrong in ("4/4", "1", "-1/4", "1/0", "a/b"):
        with pytest.raises(UserError, match=r"--share: expected NUMBER/OF such as 0/4"):
            Share.parse(wrong)
    prepare_share(config, Share.parse("0/2"))
    folder = folder_of(tmp_path / "out") / Share(0, 2).folder
    from megatron_synth.core.lock import Lock

    with Lock(folder / ".lock", "prepare"), pytest.raises(UserError, match=r"share-00000-of-00002"):
        prepare_share(config, Share(0, 2))
    assert json.loads((folder / JOURNAL).read_text().splitlines()[0].partition(" ")[2])["kind"] == "head"
