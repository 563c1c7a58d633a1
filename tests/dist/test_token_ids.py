"""A shard that changed after it was prepared never trains a row of the embedding that is no token, in any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dist.pool import RankPool
from tests.support import LAYOUTS, checkpoint_names, read_metrics, write_config, write_corpus

PADDED = 384
"""Rows of the embedding in these runs; the vocabulary has 256."""


def _altered(folder: Path, source: str, token: int) -> tuple[Path, str]:
    """A configuration whose source holds `token` in every window of its second shard; what the message must name."""
    config = write_config(folder / "run.yaml", write_corpus(folder / "corpus"))
    path = folder / "corpus" / source / "shard-00001.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[5::20] = token
    tokens.tofile(path)
    return config, f"token id {token}, the ids of the vocabulary are 0 to 255"


def _refused(ranks: RankPool, world_size: int, arguments: list[str], *parts: str) -> None:
    results = ranks.run(world_size, "megatron_synth.cli.main.main", arguments)
    printed = "".join(result.stderr for result in results)
    assert [result.value for result in results] == [2] * world_size, printed
    assert all(part in printed for part in parts), printed


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
@pytest.mark.parametrize("token", [300, 65535])  # a padding row, and none
def test_training_refuses_ids_beyond_the_vocabulary(layout: str, token: int, ranks: RankPool, tmp_path: Path) -> None:
    config, message = _altered(tmp_path, "web", token)
    world_size, settings = LAYOUTS[layout]
    run = tmp_path / "run"
    arguments = ["train", str(config), *settings, f"model.make_vocab_size_divisible_by={PADDED}", "--run-dir", str(run)]
    _refused(ranks, world_size, arguments, message, "web/shard-00001.bin, byte ")
    # the step whose batch holds such an id is not made
    records = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    assert len(records) <= 1 and checkpoint_names(run) == []


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_an_evaluation_refuses_them_after_the_weights_are_saved(layout: str, ranks: RankPool, tmp_path: Path) -> None:
    config, message = _altered(tmp_path, "val", 300)
    world_size, settings = LAYOUTS[layout]
    options = ["train.steps=4", f"model.make_vocab_size_divisible_by={PADDED}", "--run-dir", str(tmp_path / "run")]
    _refused(ranks, world_size, ["train", str(config), *settings, *options], message, "val/shard-00001.bin, byte ")
    assert checkpoint_names(tmp_path / "run") == ["step_00000004"]
