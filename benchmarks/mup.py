"""Whether a learning rate carries from a narrow model to wide ones: coordinate check and rate sweep, with and without muP.

Conventions: the data of configs/train/quickstart.yaml, prepared; two layers, heads of 16 channels, MLP of 3 x the width, fp32,
one process. Coordinate check: constant rate; root mean square of what the first `--check-steps` steps change, on the tokens of
the first batch, in the output of the last layer and in the logits; under muP it should not depend on the width. Sweep:
cosine to zero with warm-up of a tenth; loss over the last tenth of the steps, which in a run of this length are all on
text not seen before; the mean of `--seeds` seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import EXIT_OK
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.core.log import say

HEAD, LAYERS = 16, 2


def main(argv: list[str]) -> int:
    """Run both and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mup", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256", help="hidden sizes; the first is the base")
    parser.add_argument("--rates", default="-10,-9,-8,-7,-6,-5,-4", help="learning rates, as powers of two")
    parser.add_argument("--steps", type=int, default=60, help="of a run of the sweep")
    parser.add_argument("--check-steps", type=int, default=5, help="of the coordinate check")
    parser.add_argument("--check-rate", type=float, default=2**-7, help="of the coordinate check")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write what was measured")
    arguments = parser.parse_args(argv)
    widths, rates = ([int(part) for part in text.split(",")] for text in (arguments.widths, arguments.rates))
    found: dict[str, Any] = {"check": [], "sweep": []}
    for mup in (False, True):
        for width in widths:
            config = _config(width, widths[0] if mup else None, arguments.check_rate, arguments.check_steps, 1, "constant")
            layer, logits = _changes(config)
            found["check"].append({"mup": mup, "width": width, "layer": layer, "logits": logits})
            say(f"check mup={mup} width {width}: last layer {layer:.4f}, logits {logits:.4f}")
    for mup in (False, True):
        for width in widths:
            for power in rates:
                losses = []
                for seed in range(1, arguments.seeds + 1):
                    config = _config(width, widths[0] if mup else None, 2.0**power, arguments.steps, seed, "cosine")
                    history = list(_losses(config))
                    last = history[-max(1, arguments.steps // 10) :]
                    losses.append(sum(last) / len(last))
                loss = sum(losses) / len(losses)
                found["sweep"].append({"mup": mup, "width": width, "power": power, "loss": loss})
                say(f"sweep mup={mup} width {width} rate 2^{power}: {loss:.4f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    say(_tables(found, widths, rates))
    return EXIT_OK


def _config(width: int, base: int | None, rate: float, steps: int, seed: int, schedule: str) -> Config:
    overrides = [
        f"model={{num_layers: {LAYERS}, hidden_size: {width}, ffn_hidden_size: {3 * width}, "
        f"num_attention_heads: {width // HEAD}, num_query_groups: null, mup_base_hidden_size: {base or 'null'}}}",
        f"train={{steps: {steps}, sequence_length: 128, global_batch_size: 8, micro_batch_size: 8, seed: {seed}}}",
        f"optim={{lr: {rate}, schedule: {schedule}, warmup_steps: {steps // 10 if schedule == 'cosine' else 0}}}",
        "kernels={rms_norm: torch, rms_norm_residual: torch, swiglu: torch, rope: torch}",  # nothing to compile for each width
    ]
    return load_file(Config, "configs/train/quickstart.yaml", overrides)


def _losses(config: Config, watch: Any = None) -> Iterator[float]:
    """The loss of each step; `watch` is called with the model and the first batch, before the first step and after the last."""
    import torch

    from megatron_synth.data.loading.run_data import open_data
    from megatron_synth.model.run_plan import decide
    from megatron_synth.parallel.groups import process_group
    from megatron_synth.parallel.plan import plan

    torch.manual_seed(0)
    data, layout = open_data(config), plan(config, 1)
    decided = decide(config, layout)
    with process_group(layout, config.train.seed) as ranks:
        from megatron_synth.bench.train.data import real_batches
        from megatron_synth.model.build import build_model
        from megatron_synth.parallel.wrap import build_optimizer, wrap_ddp
        from megatron_synth.train.batch import LABELS, LOSS
        from megatron_synth.train.schedule import learning_rate
        from megatron_synth.train.step import Stepper

        chunks = wrap_ddp(build_model(decided, data.vocab_size), config)
        stepper = Stepper(config, chunks, build_optimizer(chunks, config), ranks, layout.replicas)
        with real_batches(config, layout, ranks, data) as batches:
            first = None
            for step in range(config.train.steps):
                batch = batches[step]
                if first is None:
                    first = batch[0].inputs.clone()
                    if watch is not None:
                        watch(chunks[0], first)
                sums = stepper.step(batch, len(data.plan.names), learning_rate(step, config.optim, config.train.steps)).sums
                yield float(sums[LOSS].sum() / sums[LABELS].sum())
            if watch is not None:
                watch(chunks[0], first)


def _changes(config: Config) -> tuple[float, float]:
    """Root mean square of what training changes in the last layer's output [S, B, H] and in the logits [B, S, V]."""
    import torch

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(model: Any, tokens: torch.Tensor) -> None:
        outputs: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, made: Any) -> None:
            outputs.append(made[0] if isinstance(made, tuple) else made)

        handle = model.module.decoder.layers[-1].register_forward_hook(keep)
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        handle.remove()
        seen.append((outputs[0].clone(), logits.clone()))

    for _ in _losses(config, watch):
        pass
    (layer, logits), (layer_after, logits_after) = seen
    return float((layer_after - layer).square().mean().sqrt()), float((logits_after - logits).square().mean().sqrt())


def _tables(found: dict[str, Any], widths: list[int], rates: list[int]) -> str:
    """The two tables as Markdown."""
    lines = ["| parametrization | changed | " + " | ".join(f"width {width}" for width in widths) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(widths))
    for mup in (False, True):
        rows = {row["width"]: row for row in found["check"] if row["mup"] == mup}
        for key, name in (("layer", "last layer"), ("logits", "logits")):
            values = " | ".join(f"{rows[width][key]:.3f}" for width in widths)
            lines.append(f"| {'muP' if mup else 'standard'} | {name} | {values} |")
    lines += ["", "| parametrization | width | " + " | ".join(f"2^{power}" for power in rates) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(rates))
    for mup in (False, True):
        for width in widths:
            losses = [row["loss"] for row in found["sweep"] if (row["mup"], row["width"]) == (mup, width)]
            best = min(losses)
            cells = " | ".join(f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses)
            lines.append(f"| {'muP' if mup else 'standard'} | {width} | {cells} |")
    return "\n".join(lines)
