"""The mixture of a run as tables: who gives how much, phase by phase, and when a source runs out."""

from __future__ import annotations

from collections.abc import Collection

from megatron_synth.config.schema import NOT_BEGUN, Config, Progress
from megatron_synth.core.log import table
from megatron_synth.data.mixing.mixture import MixturePlan
from megatron_synth.data.mixing.schedule import Phase


def source_table(config: Config, plan: MixturePlan, prepared: Collection[str], progress: Progress = NOT_BEGUN) -> str:
    """One row per source for the whole run. prepared: names of the sources whose sizes are known; progress: of the run."""
    length, total = config.window_length, _reached(config, plan, progress)
    rows: list[tuple[str, ...]] = [("source", "ratio", "tokens", "available", "epochs", "max epochs", "lasts for")]
    overall = plan.overall_ratios(total)
    for source_id, samples in enumerate(plan.counts(total).tolist()):
        spec = plan.sources[source_id]
        ratio = f"{float(overall[source_id]):.4%}" if plan.phased else str(spec.ratio)
        row = (spec.name, ratio, f"{samples * length:,}")
        limit = f"{config.data.sources[spec.name].max_epochs:g}"
        if spec.name not in prepared:
            rows.append((*row, "not prepared", "-", limit, "-"))
            continue
        available, epochs = f"{spec.epoch_windows * length:,}", f"{samples / spec.epoch_windows:.3f}"
        longest = plan.longest_run(source_id)
        # whole optimizer steps that the source can serve
        lasts = "no end" if longest is None else f"{config.step_after(longest, progress):,} steps"
        rows.append((*row, available, epochs, limit, lasts))
    return table(rows)


def phase_tables(config: Config, plan: MixturePlan, prepared: Collection[str], progress: Progress = NOT_BEGUN) -> str:
    """One table per phase: shares asked for and given, in samples and tokens, and the passes over each source."""
    length, total = config.window_length, _reached(config, plan, progress)
    starts = plan.schedule.starts
    blocks = []
    for number, (phase, start) in enumerate(zip(plan.schedule.phases, starts, strict=True)):
        start = plan.skips.position(start)
        if start >= total:
            blocks.append(f"phase {number} begins at sample {start:,}: the run ends before, at sample {total:,}")
            continue
        end = total if phase.samples is None else min(total, plan.skips.position(starts[number] + phase.samples))
        size = f"samples {start:,} to {end:,}, {end - start:,} of {length} tokens = {(end - start) * length:,} tokens"
        cut = (
            ""
            if phase.samples is None or end == plan.skips.position(starts[number] + phase.samples)
            else f"; the run ends before the phase, {phase.samples:,}"
        )
        ramp = "" if phase.ramp_to is None else f", a ramp in {phase.blocks} blocks"
        blocks.append(f"phase {number}: {size}{ramp}{cut}\n{_phase_table(plan, phase, start, end, length, prepared)}")
    return "\n\n".join(blocks)


def _phase_table(plan: MixturePlan, phase: Phase, start: int, end: int, length: int, prepared: Collection[str]) -> str:
    heads = ("source", "ratio", "asked", "given", "off by", "samples", "tokens", "epochs", "so far", "runs out at sample")
    rows: list[tuple[str, ...]] = [heads]
    before, after = plan.counts(start), plan.counts(end)
    due = [late - early for early, late in zip(plan.due(start), plan.due(end), strict=True)]
    for source_id, spec in enumerate(plan.sources):
        ratio = str(phase.ratios[source_id])
        if phase.ramp_to is not None:
            ratio += f" -> {phase.ramp_to[source_id]}"
        samples, asked = int(after[source_id] - before[source_id]), due[source_id]
        shares = (f"{float(asked / (end - start)):.4%}", f"{samples / (end - start):.4%}", f"{float(samples - asked):+.2f}")
        epochs: tuple[str, ...] = ("-", "-", "-")
        if spec.name in prepared:
            longest = plan.longest_run(source_id)
            out = f"{longest:,}" if longest is not None and start <= longest < end else "-"
            windows = spec.epoch_windows
            epochs = (f"{samples / windows:.3f}", f"{after[source_id] / windows:.3f}", out)
        rows.append((spec.name, ratio, *shares, f"{samples:,}", f"{samples * length:,}", *epochs))
    return table(rows)


def _reached(config: Config, plan: MixturePlan, progress: Progress) -> int:
    """Samples of the run, as far as its phases go."""
    total = config.samples_at_end(progress)
    return total if plan.samples is None else min(total, plan.samples)
