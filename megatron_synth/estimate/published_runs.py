"""Published training speeds on Hopper GPUs, and what the step-time model says of the same runs.

Shapes are those of the models; a GELU MLP of width 4 H stands as SwiGLU of width 8/3 H, which has as many parameters. Layouts
and micro-batch sizes are mostly not published: the fastest that fits stands for them. All figures by one convention of FLOPs,
see `estimate/flops.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_synth.config.schema import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from megatron_synth.estimate.hardware import ACCELERATORS
from megatron_synth.estimate.search import Candidate, search
from megatron_synth.estimate.step_time import Assumptions


@dataclass(frozen=True)
class Published:
    """One run that others measured."""

    who: str
    model: ModelConfig
    sequence_length: int
    gpus: int
    gpu: str
    fp8: bool
    tokens_per_s: float
    """Per GPU."""
    fitted: bool
    """Whether `Assumptions.sustained` was fitted to it; the others only check."""
    remark: str = ""


def _shape(name: str, layers: int, hidden: int, heads: int, vocab: int, mlp: int = 0, groups: int | None = None) -> ModelConfig:
    width = mlp or round(8 * hidden / 3 / 64) * 64
    return ModelConfig(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=width,
        vocab_size=vocab,
    )


_LLAMA3 = _shape("Llama-3 8B", 32, 4096, 32, 128256, 14336, 8)
RUNS = (
    Published("Megatron-LM", _shape("1.7B", 24, 2048, 16, 131072), 4096, 48, "h100", False, 36_300, True),
    Published("llm-foundry", _shape("MPT-1B", 24, 2048, 16, 50368), 4096, 8, "h100", False, 38_535, True),
    Published("llm-foundry", _shape("MPT-3B", 32, 2560, 20, 50368), 4096, 8, "h100", False, 20_964, True),
    Published("llm-foundry", _shape("MPT-7B", 32, 4096, 32, 50368), 2048, 8, "h100", False, 10_643, True),
    Published("NeMo 24.07", _shape("Llama-2 7B", 32, 4096, 32, 32000, 11008), 4096, 8, "h100", True, 16_847, True),
    Published("Megatron-Bridge", _LLAMA3, 8192, 8, "h100", True, 14_451, True),
    Published("torchtitan", _LLAMA3, 8192, 8, "h100", False, 6_667, False, "GPUs limited to 500 W"),
    Published("torchtitan", _LLAMA3, 8192, 8, "h100", True, 8_532, False, "GPUs limited to 500 W"),
    Published("torchtitan", _LLAMA3, 8192, 32, "h200", True, 10_938, True),
)


def configuration(model: ModelConfig, sequence_length: int, global_batch_size: int) -> Config:
    """A bf16 run of `model` whose data are never read."""
    return Config(
        model=model,
        data=DataConfig(sources={"none": SourceConfig(path="none", ratio=1)}),
        train=TrainConfig(steps=1, sequence_length=sequence_length, global_batch_size=global_batch_size),
    )


def predict(run: Published, assume: Assumptions | None = None) -> Candidate:
    """The model's fastest layout that fits, on 16 sequences per GPU and step, with logits whole, as there."""
    config = configuration(run.model, run.sequence_length, 16 * run.gpus)
    config = config.model_copy(update={"train": config.train.model_copy(update={"fused_loss": False})})
    return search(config, run.gpus, ACCELERATORS[run.gpu], fp8=run.fp8, assume=assume)[0]


def fit() -> float:
    """The value of `Assumptions.sustained` at which the fitted rows' geometric mean of predicted / published is 1."""
    low, high = 0.3, 1.5
    for _ in range(9):
        middle = (low + high) / 2
        assume = Assumptions(sustained=middle)
        mean = sum(math.log(predict(run, assume).tokens_per_s / run.tokens_per_s) for run in RUNS if run.fitted)
        low, high = (middle, high) if mean < 0 else (low, middle)
    return (low + high) / 2


def table_rows() -> list[list[str]]:
    """Predicted beside published."""
    rows = [
        ["who", "model", "on", "format", "published tokens/s", "predicted", "ratio", "MFU", "layout of the prediction", "use"]
    ]
    for run in RUNS:
        best = predict(run)
        use = ("fitted" if run.fitted else "check") + (f"; {run.remark}" if run.remark else "")
        rows.append(
            [
                run.who,
                f"{run.model.name}, S{run.sequence_length}",
                f"{run.gpus} {run.gpu.upper()}",
                "FP8" if run.fp8 else "BF16",
                f"{run.tokens_per_s:,.0f}",
                f"{best.tokens_per_s:,.0f}",
                f"{best.tokens_per_s / run.tokens_per_s:.2f}",
                f"{100 * best.mfu:.0f}%",
                best.describe() if best.fits else f"{best.describe()} (does not fit)",
                use,
            ]
        )
    return rows
