"""A shard that changed after it was prepared never trains a row of the embedding that is no token, in any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.dealing import deal
from megatron_synth.data.loading.run_data import open_data
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
    _refused(ranks, world_size, arguments, message, "web/shard-00001.bin, byte ", "; read for sample ", "web/shard-00001.bin, document")
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


@pytest.mark.parametrize(("layout", "reader"), [("dp2", (1, 2)), ("pp4", (0, 1))])
def test_ranks_that_read_no_such_id_leave_the_message_to_the_one_that_does(
    layout: str, reader: tuple[int, int], ranks: RankPool, tmp_path: Path
) -> None:
    """In the seventh step. Middle stages of a pipeline read no tokens, and other data-parallel ranks read others."""
    file = write_config(tmp_path / "run.yaml", write_corpus(tmp_path / "corpus"))
    config = load_file(Config, file)
    data = open_data(config)
    dealt = {"micro_batch_size": config.train.micro_batch_size, "data_parallel_rank": reader[0], "data_parallel_size": reader[1]}
    samples = deal(config.data_seed, 6 * config.samples_of_step(0), config.train.global_batch_size, **dealt).ravel()
    sources, windows, _ = data.plan.places(samples)
    source = data.sources[data.plan.names.index("web")]
    place = int(windows[list(sources).index(data.plan.names.index("web"))]) * data.window_length + 16
    number = 0
    while place >= source.shard(number).num_tokens:
        place -= source.shard(number).num_tokens
        number += 1
    shard = source.shard(number)
    tokens = np.fromfile(shard.bin_path, np.uint16)
    tokens[place] = 65535
    tokens.tofile(shard.bin_path)
    world_size, settings = LAYOUTS[layout]
    run = tmp_path / "run"
    results = ranks.run(world_size, "megatron_synth.cli.main.main", ["train", str(file), *settings, "--run-dir", str(run)])
    printed = "".join(result.stderr for result in results)
    message = f"web/shard-{number:05d}.bin, byte {2 * place}: token id 65535"
    assert [result.value for result in results] == [2] * world_size, printed
    assert printed.count("error: ") == printed.count(message) == 1 and "lost" not in printed, printed
    last = (run / "events.log").read_text().splitlines()[-1]
    assert "failed at step 6: " in last and message in last
    assert not list((run / "hang").glob("report-*"))
