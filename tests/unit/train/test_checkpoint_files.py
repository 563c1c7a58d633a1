"""Checkpoints as files: which one is resumed, what is sound, what may go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.train.checkpoint import files


def make(root: Path, step: int, *, content: bytes = b"weights") -> Path:
    """A checkpoint of two files."""
    folder = root / files.name_of(step)
    folder.mkdir(parents=True)
    trainer = json.dumps({"format": files.FORMAT, "samples": 8 * step}).encode()
    written = {"__0_0.distcp": files.write_hashed(folder / "__0_0.distcp", content)}
    written[files.TRAINER] = files.write_hashed(folder / files.TRAINER, trainer)
    files.write_manifest(folder, written)
    (root / files.LATEST).write_text(folder.name + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        make(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def _steps(found: list[Path]) -> list[int]:
    return [files.step_of(path) for path in found]


def test_latest_comes_first_then_the_past_then_the_future(run: Path) -> None:
    root = run / "checkpoints"
    assert _steps(files.candidates(run)) == _steps(files.candidates(root)) == [40, 30, 20, 10]
    (root / files.LATEST).write_text("step_00000020\n")
    assert _steps(files.candidates(run)) == [20, 10, 40, 30]
    for odd in ("", "nonsense", "step_x"):
        (root / files.LATEST).write_text(odd)
        assert _steps(files.candidates(run)) == [40, 30, 20, 10]
    (root / files.LATEST).write_text("step_00000035\n")  # gone
    assert _steps(files.candidates(run)) == [30, 20, 10, 40]
    (root / "step_00000050.abc.tmp").mkdir()
    assert 50 not in _steps(files.candidates(run))
    assert _steps(files.candidates(root / "step_00000010")) == [10]
    assert files.candidates(run / "nothing") == [] and files.find(run / "nothing") is None


@pytest.mark.parametrize("name", ["__0_0.distcp", files.TRAINER, files.MANIFEST])
def test_every_bit_counts(run: Path, name: str) -> None:
    checkpoint = run / "checkpoints" / files.name_of(40)
    content = (checkpoint / name).read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (checkpoint / name).write_bytes(flipped)
        same = name == files.MANIFEST and _files_of(bytes(flipped)) == _files_of(content)
        assert bool(files.faults(checkpoint, checksums=True)) is not same, place
    for length in range(len(content)):
        (checkpoint / name).write_bytes(content[:length])
        same = name == files.MANIFEST and _files_of(content[:length]) == _files_of(content)
        assert bool(files.faults(checkpoint, checksums=True)) is not same, length


def _files_of(manifest: bytes) -> object:
    try:
        return json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return None


def test_parts_share_the_reading_and_all_compare_sizes(run: Path) -> None:
    checkpoint = run / "checkpoints" / files.name_of(40)
    for name in ("__0_0.distcp", files.TRAINER):
        content = bytearray((checkpoint / name).read_bytes())
        content[3] ^= 1
        (checkpoint / name).write_bytes(content)
    parts = [files.faults(checkpoint, checksums=True, part=part, parts=2) for part in range(2)]
    assert [len(part) for part in parts] == [1, 1] and parts[0] != parts[1]
    assert files.faults(checkpoint, checksums=False) == []
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    assert all("has 0 bytes, expected 7" in str(files.faults(checkpoint, checksums=True, part=p, parts=2)) for p in range(2))


def test_passing_over_is_told_and_all_damaged_is_an_error(run: Path) -> None:
    heard: list[str] = []
    for step in (40, 30):
        (run / "checkpoints" / files.name_of(step) / "__0_0.distcp").unlink()
    assert files.find(run, heard.append) == run / "checkpoints" / files.name_of(20)
    assert len(heard) == 2 and all("__0_0.distcp is missing; going back to step_00000020" in text for text in heard)
    for step in (20, 10):
        (run / "checkpoints" / files.name_of(step) / files.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"step_00000040: damaged: .*missing\n.*(\n.*)*step_00000010: damaged: manifest.json"):
        files.find(run)


def test_which_may_go() -> None:
    steps = [1, 2, 3, 4, 5, 6, 9]
    assert files.removable(steps, 6, 2, None) == [1, 2, 3, 4]  # 9 is of a future that was left
    assert files.removable(steps, 6, 2, 2) == [1, 3]
    assert files.removable(steps, 9, 1, None) == [1, 2, 3, 4, 5, 6]
    assert files.removable([], 0, 1, None) == []


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / files.name_of(20) / "__0_0.distcp").write_bytes(b"w")
    (run / "checkpoints" / "step_00000050.abc.tmp").mkdir()
    assert cli.main(["checkpoint", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[4].endswith("sizes right, resumed next") and " 320 " in lines[4]
    assert "damaged: __0_0.distcp has 1 bytes, expected 7" in lines[2]
    assert "step_00000050.abc.tmp: being written" in lines[5]
    assert cli.main(["checkpoint", "ls", str(run.parent)]) == 2
    assert "found none" in capsys.readouterr().err


def test_verify_reads_every_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": sound, ") == 4
    (run / "checkpoints" / files.name_of(20) / "__0_0.distcp").write_bytes(b"weighty")
    assert cli.main(["checkpoint", "verify", str(run), "30"]) == 0
    assert cli.main(["checkpoint", "verify", str(run), "20"]) == cli.main(["checkpoint", "verify", str(run)]) == 1
    assert "step_00000020: damaged\n  __0_0.distcp has the checksum" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(run), "25"]) == 2
    assert "there are 10, 20, 30, 40" in capsys.readouterr().err


def test_prune_keeps_what_can_be_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    (root / files.name_of(40) / "__0_0.distcp").unlink()  # a damaged one does not count as kept
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1", "--dry-run"]) == 0
    assert _steps(files.all_of(root)) == [10, 20, 30, 40] and capsys.readouterr().out.count("would remove ") == 2
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1", "--every", "20"]) == 0
    assert _steps(files.all_of(root)) == [20, 30, 40]
    (root / files.LATEST).write_text("step_00000020\n")
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert _steps(files.all_of(root)) == [20, 30, 40]  # the one that `latest` names stays
    assert not list(root.glob("*.tmp"))
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "prune", str(run), "--keep", "0"])
