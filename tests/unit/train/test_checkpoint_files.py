"""Checkpoints as files: which one is resumed, what is sound, what may go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_synth.cli import main as cli
from megatron_synth.config.errors import UserError
from megatron_synth.core.lock import Lock
from megatron_synth.train.checkpoint import files
from megatron_synth.train.record.run_lock import LOCK


def make(root: Path, step: int, *, content: bytes = b"weights") -> Path:
    """A checkpoint of two files."""
    folder = root / files.name_of(step)
    folder.mkdir(parents=True)
    state = {"format": files.FORMAT, "step": step, "samples": 8 * step, "plan_digest": "0", "ledger": {"web": 8 * step}}
    trainer = json.dumps(state).encode()
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


def _first_sound(run: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    return files.first_sound(files.candidates(run), lambda one: files.faults(one, checksums=True), warn, run)


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
    assert files.candidates(run / "nothing") == []


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
    assert _first_sound(run, heard.append) == run / "checkpoints" / files.name_of(20)
    assert len(heard) == 2 and all("__0_0.distcp is missing; going back to step_00000020" in text for text in heard)
    for step in (20, 10):
        (run / "checkpoints" / files.name_of(step) / files.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"step_00000040: damaged: .*missing\n.*(\n.*)*step_00000010: damaged: manifest.json"):
        _first_sound(run)


def test_which_may_go() -> None:
    found = [Path(files.name_of(step)) for step in (1, 2, 3, 4, 5, 6, 9)]

    def gone(newest: int, keep: int, every: int | None, paths: list[Path] = found) -> list[int]:
        return _steps(files.removable(paths, newest, keep, every))

    assert gone(6, 2, None) == [1, 2, 3, 4]  # 9 is of a future that was left
    assert gone(6, 2, 2) == [1, 3]
    assert gone(9, 1, None) == [1, 2, 3, 4, 5, 6]
    assert gone(0, 1, None, []) == []
    assert files.removable([Path("step_5"), found[-1]], 9, 1, None) == [Path("step_5")]


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


def _damage(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_bytes(b"weighty")  # as long as before


def test_prune_reads_what_it_keeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    _damage(root / files.name_of(40))
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert _steps(files.all_of(root)) == [30, 40]
    assert f"left {root / files.name_of(40)}: damaged: __0_0.distcp has the checksum" in capsys.readouterr().out
    _damage(root / files.name_of(30))
    make(root, 20)
    _damage(root / files.name_of(20))
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
    assert _steps(files.all_of(root)) == [20, 30, 40]
    assert "no checkpoint there is sound: nothing was removed" in capsys.readouterr().err


def test_prune_leaves_a_run_alone_that_is_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune = ["checkpoint", "prune", "--keep", "1"]
    with Lock(run / LOCK, "train"):
        for path in (run, run / "checkpoints"):
            assert cli.main([*prune, str(path)]) == 2
            assert f"{run}: in use by `megatron-synth train` of" in capsys.readouterr().err
        assert cli.main([*prune, str(run), "--dry-run"]) == 0
        assert _steps(files.all_of(run / "checkpoints")) == [10, 20, 30, 40]
    assert cli.main([*prune, str(run / "checkpoints")]) == 0
    assert _steps(files.all_of(run / "checkpoints")) == [40] and not (run / LOCK).exists()


def test_prune_of_a_link_and_of_a_name_that_is_not_padded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run / "checkpoints"
    (root / files.name_of(10)).rename(tmp_path / "elsewhere")
    (root / files.name_of(10)).symlink_to(tmp_path / "elsewhere")
    (root / files.name_of(20)).rename(root / "step_20")
    assert cli.main(["checkpoint", "ls", str(run)]) == 0
    assert "step_20 " in capsys.readouterr().out
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert [path.name for path in root.glob("step_*")] == [files.name_of(40)]
    assert not files.faults(tmp_path / "elsewhere", checksums=True)
    assert "(the link, not what it points to)" in capsys.readouterr().out


@pytest.mark.parametrize("step", [25, 99])
def test_prune_never_removes_what_a_kept_link_points_to(run: Path, step: int) -> None:
    root = run / "checkpoints"
    for damaged in (30, 40):
        _damage(root / files.name_of(damaged))
    (root / files.name_of(step)).symlink_to(files.name_of(20))
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert {20, step} <= set(_steps(files.all_of(root)))
    assert not files.faults(root / files.name_of(20), checksums=True)
    make(root, 10)
    # two names of one are one: the other that is kept is another, and was read
    _damage(root / files.name_of(10))
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0
    assert {10, 20, step} <= set(_steps(files.all_of(root)))


def test_a_save_never_removes_what_a_later_link_points_to(tmp_path: Path) -> None:
    for number in (10, 20, 30, 40):
        make(tmp_path, number)
    (tmp_path / files.name_of(50)).symlink_to(files.name_of(10))
    assert _steps(files.removable(files.all_of(tmp_path), 40, 1, None)) == [20, 30]
    assert _steps(files.removable(files.all_of(tmp_path), 50, 1, None)) == [20, 30, 40]


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", "..", "", "a\nb"])
def test_names_in_a_manifest_are_plain(run: Path, name: str) -> None:
    checkpoint = run / "checkpoints" / files.name_of(40)
    manifest = json.loads((checkpoint / files.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["__0_0.distcp"]
    (checkpoint / files.MANIFEST).write_text(json.dumps(manifest))
    (found,) = files.faults(checkpoint, checksums=True)
    assert "manifest.json is damaged" in found and "the name of a file" in found


def test_files_of_a_checkpoint_are_its_own(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / files.name_of(40)
    (checkpoint / "__0_0.distcp").rename(tmp_path / "weights")
    (checkpoint / "__0_0.distcp").symlink_to(tmp_path / "weights")
    assert "is a link" in files.faults(checkpoint, checksums=True)[0]


def test_what_a_disk_does_not_hold_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "hash_file", lambda path: "0" * 16)
    with pytest.raises(OSError, match="the disk does not hold what is written to it"):
        files.write_hashed(tmp_path / "file", b"content")
