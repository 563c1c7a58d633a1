"""Duplicates as an array over four nodes of a real SLURM: the bytes of one process."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.conftest import call
from tests.slurm.lab import Lab
from tests.unit.data.test_duplicates import make, random_documents


def test_the_report_of_an_array_is_that_of_one_process(four: Lab, tmp_path: Path) -> None:
    base = random_documents(3, 40, 60)
    folders = [str(make(tmp_path / "a", base)), str(make(tmp_path / "b", base[:9] + random_documents(4, 20, 60)))]
    alone, report, work = tmp_path / "alone.json", tmp_path / "report.json", tmp_path / "work"
    assert call(four, "prepare", "duplicates", *folders, "--json", str(alone)).code == 0
    options = ["--work", str(work), "--json", str(report), "--slurm", "--tasks", "4"]
    told = call(four, "prepare", "duplicates", *folders, *options)
    assert told.code == 0 and "4 shares in" in told.out, told.err
    four.wait("the report", report.exists)
    assert report.read_bytes() == alone.read_bytes()
    assert len(list(work.glob("share-*-of-00004"))) == 4
