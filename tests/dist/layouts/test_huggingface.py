"""The engine against transformers' LlamaForCausalLM: same weights, same logits; same batches, same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.loading.loader import Loader
from megatron_synth.train.record import metrics
from megatron_synth.train.schedule import learning_rate
from tests.dist.conftest import Run, Train
from tests.dist.pool import RankPool
from tests.support import CLIP_GRAD, LAYOUTS, VOCAB_SIZE, read_metrics

STEPS = 10
VARIANTS = {
    "grouped-query": (),
    "multi-head": ("model.num_query_groups=4",),
    "tied": ("model.share_embeddings_and_output_weights=true",),
    "multi-head-tied": ("model.num_query_groups=4", "model.share_embeddings_and_output_weights=true"),
}


def load_llama(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def convert(ranks: RankPool, *arguments: str) -> None:
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", ["convert", *arguments])
    assert result.value == 0, result.stderr


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("grouped-query", "tp2pp2"), ("multi-head", "single"), ("tied", "tp2pp2"), ("multi-head-tied", "pp2vp2")],
)
def test_logits_of_a_trained_checkpoint(
    ranks: RankPool, trained: Callable[..., Run], tmp_path: Path, variant: str, layout: str
) -> None:
    run = trained(layout, *VARIANTS[variant])
    convert(ranks, "to-hf", str(run.path), str(tmp_path / "hf"))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 32), generator=torch.Generator().manual_seed(5))
    (ours,) = ranks.run(1, "tests.dist.layouts.hf_jobs.logits", str(run.path), tokens.numpy())
    with torch.no_grad():
        theirs = load_llama(tmp_path / "hf")(tokens).logits
    assert theirs.std() > 0.1, "an untrained model would agree too easily"
    torch.testing.assert_close(torch.from_numpy(ours.value), theirs, rtol=0, atol=1e-4)


def train_llama(model: Any, config: Config, changed: Config | None = None) -> list[float]:
    """The losses of plain AdamW steps on the run's own batches, in the plainest way.

    changed: whose optimizer it is from the middle on.
    """
    data = open_data(config)
    train, optim = config.train, config.optim
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    loader = Loader(
        data.plan,
        data.sources,
        sequence_length=train.sequence_length,
        micro_batch_size=train.global_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    losses = []
    for step in range(STEPS):
        if changed is not None and step == STEPS // 2:
            optim = changed.optim
        (batch,) = loader.micro_batches(step * train.global_batch_size, train.global_batch_size)
        tokens = torch.from_numpy(batch.tokens)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim, train.steps)
            group["betas"], group["eps"] = (optim.beta1, optim.beta2), optim.eps
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_of_adamw(ranks: RankPool, trained: Callable[..., Run], config: Path, tmp_path: Path, variant: str) -> None:
    settings = VARIANTS[variant]
    ranks.run(1, "tests.dist.layouts.hf_jobs.export_initial", str(config), list(settings), str(tmp_path / "hf"))
    layout = {"grouped-query": "tp2pp2", "multi-head": "single", "tied": "tp2pp2", "multi-head-tied": "pp2vp2"}[variant]
    records = trained(layout, *settings).records[:STEPS]
    norms = [record[metrics.GRAD_NORM] for record in records]
    assert min(norms) < CLIP_GRAD < max(norms), "clipping must be tried both ways"
    expected = train_llama(load_llama(tmp_path / "hf"), load_file(Config, config, settings))
    assert [record[metrics.LOSS] for record in records] == pytest.approx(expected, abs=1e-4, rel=0)
    assert expected[-1] < expected[0] - 0.05


def test_an_optimizer_changed_at_a_resume(ranks: RankPool, train: Train, config: Path, tmp_path: Path) -> None:
    """betas, eps and clipping are those of the configuration from the first step on, not those of the checkpoint."""
    constant = ("optim.schedule=constant", "optim.warmup_steps=0")
    new = ("optim.beta1=0.3", "optim.beta2=0.6", "optim.eps=1e-3", "optim.lr=2e-3", "optim.clip_grad=1.0")
    ranks.run(1, "tests.dist.layouts.hf_jobs.export_initial", str(config), list(constant), str(tmp_path / "hf"))
    train(tmp_path / "run", "dp2", *constant, f"train.steps={STEPS // 2}")
    results = train(tmp_path / "run", "dp2", *constant, *new, f"train.steps={STEPS}")
    found = [record[metrics.LOSS] for record in read_metrics(tmp_path / "run")]
    before, after = load_file(Config, config, constant), load_file(Config, config, (*constant, *new))
    expected = train_llama(load_llama(tmp_path / "hf"), before, after)
    unchanged = train_llama(load_llama(tmp_path / "hf"), before)
    assert found == pytest.approx(expected, abs=1e-4, rel=0)
    assert abs(expected[-1] - unchanged[-1]) > 0.01
    assert "changed: optim.beta1: 0.9 -> 0.3" in results[0].stdout


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE + 1])
def test_from_hf_starts_any_layout(ranks: RankPool, train: Train, config: Path, tmp_path: Path, vocab_size: int) -> None:
    """A Llama of transformers' own making: its loss on the first batch is the first loss of a run from its weights.

    An odd vocabulary is padded, so that tensor-parallel ranks can share it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    )
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    llama.save_pretrained(tmp_path / "llama")
    convert(ranks, "from-hf", str(tmp_path / "llama"), str(tmp_path / "imported"))
    assert "model:" in (tmp_path / "imported" / "model.yaml").read_text()
    expected = train_llama(llama, load_file(Config, config))
    # 5.545 = ln 256 is what weights that were not taken over would give
    assert abs(expected[0] - 5.545) > 0.05
    for layout in ("single", "tp2pp2"):
        assert layout in LAYOUTS
        run = tmp_path / layout
        train(run, layout, f"checkpoint.init_from={tmp_path / 'imported'}", f"model.vocab_size={vocab_size}")
        losses = [record[metrics.LOSS] for record in read_metrics(run)[:STEPS]]
        assert losses == pytest.approx(expected, abs=1e-4, rel=0)
    # and back
    convert(ranks, "to-hf", str(tmp_path / "imported"), str(tmp_path / "back"))
    for name, weight in load_llama(tmp_path / "back").state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_convert_refuses(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for arguments, expected in (
        (["to-hf", str(tmp_path / "none"), str(tmp_path / "out")], "no whole checkpoint"),
        (["to-hf", str(tmp_path / "none"), str(tmp_path / "there")], "exists already"),
        (["from-hf", str(tmp_path / "none"), str(tmp_path / "out")], "config.json"),
    ):
        (result,) = ranks.run(1, "megatron_synth.cli.main.main", ["convert", *arguments])
        assert result.value == 2 and expected in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()
