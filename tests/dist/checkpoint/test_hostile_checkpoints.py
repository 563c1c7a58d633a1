"""Checkpoints made by a stranger, and damaged ones: verbs refuse them or go back to a sound one; nothing in them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.train.checkpoint import files
from megatron_synth.train.checkpoint.files import FileInfo
from tests.dist.conftest import Run
from tests.dist.pool import RankPool, RankResult
from tests.support import STEPS, rewound

LAST = f"step_{STEPS:08d}"
VERBS = ("resume", "eval", "convert", "init_from")


class Command:
    """Pickled as a call of os.system."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _use(verb: str, run: Path, ranks: RankPool, config: Path, out: Path) -> RankResult:
    arguments = {
        "resume": ["train", str(config), f"train.steps={STEPS + 1}", "--run-dir", str(run)],
        "eval": ["eval", str(run)],
        "convert": ["convert", "to-hf", str(run), str(out)],
        "init_from": ["train", str(config), "train.steps=4", f"checkpoint.init_from={run}", "--run-dir", str(out)],
    }[verb]
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", arguments)
    return result


def _sign(checkpoint: Path) -> None:
    """Make the manifest fit the files, as whoever made them would."""
    names = [path.name for path in checkpoint.iterdir() if path.name != files.MANIFEST]
    sizes = {name: FileInfo((checkpoint / name).stat().st_size, files.hash_file(checkpoint / name)) for name in names}
    files.write_manifest(checkpoint, sizes)


def _in_the_index(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Command(mark)))


def _in_common(checkpoint: Path, mark: Path) -> None:
    torch.save({"a": Command(mark)}, checkpoint / "common.pt")


def _as_an_object(checkpoint: Path, mark: Path) -> None:
    _point_to(checkpoint, lambda name: "_extra_state" in name, mark)


def _instead_of_a_tensor(checkpoint: Path, mark: Path) -> None:
    _point_to(checkpoint, lambda name: name == "output_layer.weight", mark)


def _point_to(checkpoint: Path, chosen: Callable[[str], bool], mark: Path) -> None:
    """Let the entries of some names be objects that run a command."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    content = io.BytesIO()
    torch.save([Command(mark)], content)
    file = checkpoint / "__0_0.distcp"
    begin = file.stat().st_size
    file.write_bytes(file.read_bytes() + content.getvalue())
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for name in list(filter(chosen, index.state_dict_metadata)):
        index.state_dict_metadata[name] = BytesStorageMetadata()
        place = _StorageInfo(file.name, begin, len(content.getvalue()))
        index.storage_data[MetadataIndex(name)] = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def _in_another_folder(checkpoint: Path, mark: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = f"../{checkpoint.name}/{place.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...], str]] = {
    "a command in the index": (_in_the_index, VERBS, "it names 'posix.system'"),
    "a command in common.pt": (_in_common, VERBS, "common.pt holds more than"),
    "a command as an object": (_as_an_object, ("resume",), "posix.system"),
    "a command instead of a tensor": (_instead_of_a_tensor, ("eval", "resume"), "output_layer.weight is stored as an object"),
    "files of another folder": (_in_another_folder, ("convert",), "expected a plain name"),
}


@pytest.mark.parametrize(("kind", "verb"), [(kind, verb) for kind, (_, verbs, _) in HOSTILE.items() for verb in verbs])
def test_nothing_in_a_checkpoint_runs(
    kind: str, verb: str, trained: Callable[..., Run], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run, mark = rewound(trained("single").path, tmp_path / "run", STEPS), tmp_path / "ran"
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS // 2:08d}")
    harm, _, says = HOSTILE[kind]
    harm(run / "checkpoints" / LAST, mark)
    _sign(run / "checkpoints" / LAST)
    result = _use(verb, run, ranks, config, tmp_path / "out")
    assert not mark.exists()
    assert result.value == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1 and LAST in result.stderr and says in result.stderr, result.stderr


@pytest.mark.parametrize("verb", ["eval", "convert", "init_from"])
def test_a_damaged_checkpoint_is_not_used_by_any_verb(
    verb: str, trained: Callable[..., Run], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("single").path, run)
    steps = (LAST, f"step_{STEPS // 2:08d}")
    for step in steps:
        file = run / "checkpoints" / step / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 4] = bytes(4)
        content[len(content) // 3] ^= 64
        file.write_bytes(content)
        result = _use(verb, run, ranks, config, tmp_path / "out")
        if step == LAST:
            assert result.value == 0, result.stderr
            assert f"{LAST}: damaged: __0_0.distcp has the checksum" in result.stdout
            assert f"going back to {steps[1]}" in result.stdout
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        else:
            assert result.value == 2 and "no checkpoint of it can be used" in result.stderr
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer": "../secret"}, None),
        ({"step": "20"}, "step: Input should be a valid integer"),
        ({"config": {}}, "config.model"),
        ({"config": {"model": {"num_layers": "many"}}}, "config.model"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_stranger_s_trainer_json(
    change: dict[str, Any], says: str | None, trained: Callable[..., Run], ranks: RankPool, config: Path, tmp_path: Path
) -> None:
    run = rewound(trained("single").path, tmp_path / "run", STEPS)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS // 2:08d}")
    (run / "checkpoints" / "secret").write_text("a password")
    (run / "secret").write_text("a password")
    (run / "tokenizer.json").unlink(missing_ok=True)  # as in the run of a version that did not keep it
    file = run / "checkpoints" / LAST / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    _sign(run / "checkpoints" / LAST)
    result = _use("convert", run, ranks, config, tmp_path / "out")
    assert result.value == 2 and "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    assert (says or "secret: not a tokenizer.json") in result.stderr, result.stderr


def test_what_megatron_core_writes_itself_is_read(ranks: RankPool, tmp_path: Path) -> None:
    """As checkpoints were written before the writer of this project."""
    (result,) = ranks.run(1, "tests.dist.jobs.read_what_megatron_writes", str(tmp_path / "checkpoint"))
    assert result.value == []


def test_changed_files_are_refused_or_read(ranks: RankPool, tmp_path: Path) -> None:
    """A short campaign; `python -m tests.faults.mutations` is the long one."""
    (result,) = ranks.run(1, "tests.faults.mutations.campaign", str(tmp_path), 60, 7)
    assert sum(result.value.values()) == 60 and result.value["refused"] > 30
