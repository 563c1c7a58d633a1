"""Damaged records of runs, jobs and studies: one message that names the file, whichever verb reads it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.cluster import slurm
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.files import write_json
from megatron_synth.core.log import visible
from megatron_synth.core.records import Count, Reader, parse_json
from megatron_synth.data.shards.source import open_source
from megatron_synth.study.fit.table.runs_table import read_table
from megatron_synth.study.report.collect import read_runs_csv
from megatron_synth.study.report.figures.fit import three_panels
from megatron_synth.train.checkpoint.files import LATEST, MANIFEST, candidates, faults
from tests.faults.record_mutations import World, campaign, make_world
from tests.support import STEPS
from tests.unit.train.test_checkpoint_files import make as make_checkpoint

DEEP = "[" * 100_000
DAMAGE = {
    "run.json": ["[]", '{"id":1,"starts":[]}', '{"id":"a","starts":[]}', '{"id":"a","starts":[1]}', "\xff", DEEP, "", "null"],
    "metrics.jsonl": [
        "[]\n",
        '{"step":"x"}\n',
        '{"step":NaN}\n{"step":2}\n',
        DEEP + "\n{}\n",
        '{"step":1e400}\n',
        '{"step":-1}\n',
    ],
    "ledger.json": ["[]", "{}", DEEP, '{"tokens":"x"}', "nul"],
    "config.yaml": ["[]", "train: 1\n", "train: {steps: x}\n", "{}", "\xff", "train: {steps: 1}\n"],
}


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "available", lambda: False)
    monkeypatch.setenv("COLUMNS", "400")  # lines are not cut


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, texts in DAMAGE.items() for number in range(len(texts))])
def test_every_verb_names_the_damaged_file(world: World, name: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = world.run / name
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[name][number].encode("latin-1"))
    try:
        for verb in (["report"], ["mix", "audit"]):
            assert cli.main([*verb, str(world.run)]) == 2
            assert capsys.readouterr().err.startswith(f"error: {file.resolve()}"), verb
        assert cli.main(["status", str(world.folder / "runs")]) == 0
        _, damaged, sound, *slow = capsys.readouterr().out.splitlines()
        assert sound.startswith("b ") and "done" in sound
        assert slow[-1].startswith("b: node1 is the slowest of 2 nodes")
        if name != "ledger.json":  # status does not read it
            assert damaged.startswith("a ") and " damaged " in damaged and name in damaged
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", [*DAMAGE, "events.log", f"checkpoints/step_{STEPS:08d}/trainer.json"])
def test_a_pipe_in_place_of_a_record_is_not_waited_for(
    world: World, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = world.run / name
    whole = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    began = time.monotonic()
    try:
        assert cli.main(["status", str(world.folder / "runs")]) == 0
        _, damaged, sound, *slow = capsys.readouterr().out.splitlines()
        assert sound.startswith("b ") and "done" in sound
        assert slow[-1].startswith("b: node1 is the slowest of 2 nodes")
        assert name not in ("metrics.jsonl", "events.log") or f"{name}: cannot be read" in damaged
        assert cli.main(["mix", "audit", str(world.run)]) == (0 if name == "events.log" else 2)
        assert name == "events.log" or name in capsys.readouterr().err
        assert cli.main(["checkpoint", "ls", str(world.run)]) == 0
    finally:
        file.unlink()
        file.write_bytes(whole)
    assert time.monotonic() - began < 60


def test_pipes_among_checkpoints_and_data(world: World, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    for file in (tmp_path / "step_00000010" / MANIFEST, tmp_path / LATEST):
        whole = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert [one.name for one in candidates(tmp_path)] == ["step_00000010"]
        damage = faults(tmp_path / "step_00000010", checksums=True)
        assert damage == [] if file.name == LATEST else ["not a regular file" in fault for fault in damage] == [True]
        file.unlink()
        file.write_bytes(whole)
    shutil.copytree(world.folder / "corpus", tmp_path / "corpus")
    source = tmp_path / "corpus" / "web"
    for file in (source / "manifest.json", source / "shard-00000.idx", source / "shard-00000.bin"):
        whole = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(UserError, match=f"{file.name}: (not a regular file|manifest.json announces)"):
            open_source(source, "s")
        file.unlink()
        file.write_bytes(whole)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "run.yaml").write_text("base: pipe.yaml\n")
    with pytest.raises(UserError, match=r"pipe\.yaml"):
        load_file(Config, tmp_path / "run.yaml")


def test_names_that_are_not_utf_8_are_drawn_and_written(world: World, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff")
    run = tmp_path / name
    shutil.copytree(world.run, run)
    assert cli.main(["report", str(run)]) == 0 and (run / "report.png").stat().st_size > 10_000
    with three_panels(tmp_path / "fit.png", name, "law", widths=(1, 1, 1), left=0.1, gap=0.3):
        pass
    write_json(tmp_path / "a.json", {"path": name})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": name} and visible(name) == "a\\udcff"


def test_a_damaged_line_is_named_by_its_number(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    file = world.run / "metrics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    filler = [lines[0].replace(b'"step": 1,', b'"step": %d,' % step) for step in range(300)]
    file.write_bytes(b"".join([*filler, b'{"step": 301, "train/loss": "x"}\n', *lines]))
    try:
        assert cli.main(["status", str(world.run)]) == 0
        assert "line 301 of 321 is not a step record (train/loss holds text" in capsys.readouterr().out.replace("...", "")
    finally:
        file.write_bytes(whole)


def test_changed_records_break_no_verb(tmp_path: Path) -> None:
    """A few of those of `python -m tests.faults.record_mutations`."""
    assert sum(campaign(tmp_path, 700, seed=1).values()) == 700


def test_tables_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    for content, fault in (
        (b"a,b\n1,\xff\n", "not text in UTF-8"),
        (b"a,b\n1," + b"9" * 200_000 + b"\n", "line 2: not a row of a CSV"),
        (b"a,b\n1\n", "line 2: 1 cells, expected 2"),
    ):
        file.write_bytes(content)
        for reader in (read_table, read_runs_csv):
            with pytest.raises(UserError, match=f"runs.csv.*{fault}"):
                reader(file)
    with pytest.raises(UserError, match="not a regular file"):
        read_table(Path("/dev/zero"))


def test_rows_out_of_range_are_named(world: World, tmp_path: Path) -> None:
    head, *rows = world.table.read_text().splitlines()
    for column, value, fault in (
        ("n_params", "inf", "expected a number"),
        ("tokens", "-5", "expected more than 0"),
        ("loss", "nan", "expected a number"),
        ("ratio", "2", "expected 0 to 1"),
        ("share", "1/0", "column 'share'"),
        ("seed", "1.5", "expected a whole number"),
    ):
        cells = rows[2].split(",")
        cells[head.split(",").index(column)] = value
        (tmp_path / "runs.csv").write_text("\n".join([head, *rows[:2], ",".join(cells), *rows[3:]]) + "\n")
        with pytest.raises(UserError, match=f"runs.csv, line 4: .*{fault}"):
            read_runs_csv(tmp_path / "runs.csv")


def test_strict_json() -> None:
    assert parse_json(b'{"a": 1.5}') == {"a": 1.5} and parse_json("[NaN]", nan_is_null=True) == [None]
    for text in ("NaN", DEEP, '"\\ud800"', '{"\\uD800": 1}', "[1", b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    reader: Reader[int] = Reader(Count, "restore it")
    assert reader.parse("7", "f") == 7
    for value in (True, "7", 7.0, -1, 2**63):
        with pytest.raises(UserError, match=r"f: damaged: .*, found .*; restore it"):
            reader.parse(json.dumps(value), "f")
