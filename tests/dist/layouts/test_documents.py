"""Documents in one row of tokens know nothing of each other, in every layout; labels across them have no loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.loading.loader import Loader, validation_batches
from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.dist.layouts.test_huggingface import load_llama
from tests.support import (
    LAYOUTS,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    assert_same_losses,
    read_ledger,
    read_metrics,
    rewound,
    write_source,
)

MASKS = ("data.document_masks=true", "data.eod_mask_loss=true")
STEPS = 5


def tokens(seed: int, rows: int = 2) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (rows, SEQUENCE_LENGTH)).tolist()


def gathered(ranks: RankPool, config: Path, layout: str, batches: list, *settings: str) -> list[np.ndarray]:
    """Logits [B, S, V] of each micro-batch, put together from the tensor- or context-parallel ranks of the last stage."""
    world_size, layout_settings = LAYOUTS[layout]
    results = ranks.run(
        world_size, "tests.dist.layouts.document_jobs.logits", str(config), [*layout_settings, *MASKS, *settings], batches
    )
    join = partial(np.sum, axis=0) if "cp" in layout else partial(np.concatenate, axis=-1)
    return [join(parts) for parts in zip(*(r.value for r in results if r.value), strict=True)]


@pytest.mark.parametrize("layout", ["single", "tp2pp2", "pp2vp2", "cp2", "cp4"])
def test_a_token_sees_nothing_of_another_document(layout: str, ranks: RankPool, config: Path) -> None:
    """Bit-equal: with other tokens in the documents around it, and with other boundaries there."""
    first, other = tokens(1), tokens(2)
    S = SEQUENCE_LENGTH
    cu = [0, 9, 20, S, S + 14, 2 * S]
    changed = [other[0][:9] + first[0][9:20] + other[0][20:], first[1][:14] + other[1][14:]]
    batches = [(first, cu), (changed, cu), (changed, [0, 3, 9, 20, 21, S, S + 14, S + 20, 2 * S]), (first, [0, S, 2 * S])]
    plain, others, splits, whole = gathered(ranks, config, layout, batches)
    for same in (others, splits):
        assert np.array_equal(plain[0, 9:20], same[0, 9:20]) and np.array_equal(plain[1, :14], same[1, :14])
        assert not np.array_equal(plain[0, :9], same[0, :9]) and not np.array_equal(plain[1, 14:], same[1, 14:])
    # and without the boundaries it does see them
    np.testing.assert_allclose(plain[0, :9], whole[0, :9], rtol=0, atol=1e-6)
    assert not np.allclose(plain[0, 9:], whole[0, 9:], atol=1e-4)


def test_a_document_is_what_it_is_alone(ranks: RankPool, config: Path) -> None:
    (row,) = tokens(3, rows=1)
    cu = [0, 1, 2, 17, 20, SEQUENCE_LENGTH]
    alone = [([row[begin:end]], [0, end - begin]) for begin, end in zip(cu, cu[1:], strict=False)]
    (packed,) = gathered(ranks, config, "single", [([row], cu)])
    pieces = [gathered(ranks, config, "single", [one])[0] for one in alone]
    np.testing.assert_allclose(packed, np.concatenate(pieces, axis=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2vp2", "pp4", "tp2pp2", "cp4", "tp2cp2", "cp2dp2-plain"])
def test_every_layout_is_the_same_run(layout: str, trained: Callable[..., Run]) -> None:
    """dp2 above all: its ranks have unequal numbers of labels."""
    reference, run = trained("single", *MASKS), trained(layout, *MASKS)
    assert_same_losses(run.records, reference.records, 1e-5)
    assert run.ledger == reference.ledger


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_mean_over_nothing_is_none(layout: str, train: Train, tmp_path: Path) -> None:
    """Documents of one token have no label; the weights stay as they are, but for their decay."""
    write_source(tmp_path / "ones", 3, 600, longest=1)
    ones = [f"data.sources.{name}.path={tmp_path / 'ones'}" for name in ("web", "qa")]
    ones += [f"data.validation.{name}.path={tmp_path / 'ones'}" for name in ("val",)]
    (first, *_) = train(tmp_path / "run", layout, *ones, *MASKS, "train.steps=3", "data.validation.val2=null")
    for record in read_metrics(tmp_path / "run"):
        assert record["train/loss"] is None and record["optim/grad_norm"] == 0.0 and "train/loss/web" not in record
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["eval/loss"], last["eval/loss/val"], last["eval/tokens/val"]) == (None, None, 0) and "eval/bpb" not in last
    assert "loss n/a" in first.stdout and "eval step 3 | val n/a | mean n/a" in first.stdout
    assert "no label counts" in first.stdout and "no label counts" in (tmp_path / "run" / "events.log").read_text()


def test_resuming_is_bit_equal(trained: Callable[..., Run], train: Train, tmp_path: Path) -> None:
    reference = trained("tp2pp2", *MASKS)
    run = rewound(reference.path, tmp_path / "run", 10)
    train(run, "tp2pp2", *MASKS)
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert read_ledger(run) == reference.ledger


def test_masks_change_the_run_and_only_they_do(trained: Callable[..., Run]) -> None:
    plain = trained("single").records
    for masks in (MASKS, MASKS[:1], MASKS[1:]):
        records = trained("single", *masks).records
        assert records[0][metrics.LOSS] != plain[0][metrics.LOSS]
        names = [name for name in plain[-1] if name.startswith("data/")]
        assert [records[-1][name] for name in names] == [plain[-1][name] for name in names]


def in_documents(model, batch) -> torch.Tensor:
    """Losses of the labels that count, [n], from a model that is shown one document at a time."""
    line, labels = (torch.from_numpy(x.copy()).reshape(-1) for x in (batch.tokens[:, :-1], batch.tokens[:, 1:]))
    places = batch.boundaries.cu_seqlens.tolist()
    logits = torch.cat([model(line[None, a:b]).logits[0] for a, b in zip(places, places[1:], strict=False)])
    counts = torch.from_numpy(batch.boundaries.loss_mask()).reshape(-1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[counts]


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_the_run_is_that_of_a_model_shown_one_document_at_a_time(
    layout: str, ranks: RankPool, trained: Callable[..., Run], config: Path, tmp_path: Path
) -> None:
    """transformers' Llama and torch's AdamW, gradients of the mean over labels of the global batch; losses by source."""
    ranks.run(1, "tests.dist.layouts.hf_jobs.export_initial", str(config), [], str(tmp_path / "hf"))
    model, run = load_llama(tmp_path / "hf"), load_file(Config, config, [*MASKS, f"train.steps={STEPS}"])
    data, size = open_data(run), run.train.global_batch_size
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": run.optim.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(run.optim.beta1, run.optim.beta2),
        eps=run.optim.eps,
    )
    loader = Loader(
        data.plan,
        data.sources,
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=size,
        data_parallel_rank=0,
        data_parallel_size=1,
        with_boundaries=True,
    )
    settings = (*MASKS, f"train.steps={STEPS}", "optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=1e-3")
    records = trained(layout, *settings).records
    assert len(records) == STEPS
    for step, record in enumerate(records):
        (batch,) = loader.micro_batches(step * size, size)
        losses = in_documents(model, batch)
        rows = np.repeat(np.arange(size), batch.boundaries.loss_mask().sum(axis=1))
        for number, name in enumerate(data.plan.names):
            own = losses[torch.from_numpy(batch.source_ids[rows] == number)]
            if len(own):
                assert math.isclose(record[metrics.SOURCE_LOSS + name], own.mean().item(), abs_tol=1e-4)
        assert math.isclose(record[metrics.LOSS], losses.mean().item(), abs_tol=1e-4)
        optimizer.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_grad)
        assert math.isclose(record[metrics.GRAD_NORM], norm.item(), rel_tol=1e-3)
        optimizer.step()
    for name, domain in data.validation.items():
        batches = [b for b in validation_batches(domain, SEQUENCE_LENGTH, 1, 0, 1, with_boundaries=True)]
        with torch.no_grad():
            losses = torch.cat([in_documents(model, batch) for batch in batches])
        assert records[-1][metrics.EVAL_DOMAIN_TOKENS + name] == len(losses) < len(batches) * SEQUENCE_LENGTH
        assert math.isclose(records[-1][metrics.EVAL_DOMAIN_LOSS + name], losses.mean().item(), abs_tol=1e-4)
