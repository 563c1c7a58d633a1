"""A study as text: what it would take (`plan`), and how far it is (`status`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_synth.cluster.status import goodput_of
from megatron_synth.config.errors import UserError
from megatron_synth.core.log import compact, counted, duration, human, scientific, table
from megatron_synth.study.execute.folder import STATES, Folder, State
from megatron_synth.study.plan.costs import Cost, Sources, Use, cost_of, mapping_of_epochs, total, use_key
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import Study
from megatron_synth.train.record.goodput import Goodput, together

Uses = Mapping[tuple[str, int, int], Mapping[str, Use]]


def plan_text(study: Study, runs: Sequence[Run], sources: Sources, uses: Uses, folder: Folder, *, each: bool) -> str:
    """Arms, sizes, runs and what they cost.

    each: one line per run; otherwise runs that differ in the seed alone share one.
    """
    vocab_size = sources.required_vocab_size
    states = {run.id: folder.state(run) for run in runs}
    costs = {run.id: cost_of(study, run, vocab_size) for run in runs}
    sections = [
        f"study {study.name}: {counted(len(study.arms), 'arm')}, {counted(len(study.sizes), 'size')}, "
        f"seeds {', '.join(map(str, study.seeds))}: {counted(len(runs), 'run')}, "
        f"{human(sum(run.own_tokens for run in runs))} tokens; nothing is trained by this command",
        *_trunks(runs),
        *_arms(study),
        *_sizes(runs, vocab_size),
        f"runs{'' if each else ' (seeds of a cell share a line; --runs shows each)'}",
        _runs(study, runs, uses, costs, states, each=each),
        *_totals(study, runs, costs, states),
    ]
    if sources.missing:
        sections.append(f"not prepared: {', '.join(sources.missing)}; epochs of these follow from `tokens`, where it is set")
    if study.ours:
        sections.append("choices of this file's own, not of the study that it follows (`ours`)")
        sections.append("\n".join(f"  {key}: {why}" for key, why in study.ours.items()))
    return "\n\n".join(_joined(sections))


def _joined(sections: Sequence[str]) -> list[str]:
    """A heading goes with the table that follows it."""
    result: list[str] = []
    for text in sections:
        if result and text.startswith("  ") and "\n" not in result[-1]:
            result[-1] += "\n" + text
        else:
            result.append(text)
    return result


def _trunks(runs: Sequence[Run]) -> list[str]:
    """What `design.trunk` saves."""
    branches = [run for run in runs if run.branch_step]
    if not branches:
        return []
    trained, whole = (sum(counts) for counts in ((run.own_tokens for run in runs), (run.tokens for run in runs)))
    return [
        f"{len(branches)} runs are branches of {len({run.trunk for run in branches})} others (design.trunk): {human(trained)} "
        f"tokens are trained, {trained / whole:.1%} of the {human(whole)} from scratch; of a branch its own part is counted"
    ]


def _arms(study: Study) -> list[str]:
    rows: list[tuple[str, ...]] = [("arm", "mixture", "family", "share")]
    for name, arm in study.arms.items():
        mixture = ", ".join(f"{source} {share.ratio}" for source, share in arm.items() if share.ratio)
        baseline = " (baseline)" if name == study.baseline_arm else ""
        rows.append((name + baseline, mixture, study.family(name) or "-", str(study.share(name))))
    return ["arms", table(rows)]


def _sizes(runs: Sequence[Run], vocab_size: int) -> list[str]:
    from megatron_synth.estimate.flops import count_parameters

    rows: list[tuple[str, ...]] = [("size", "non-embedding", "all", "layers", "hidden", "lr", "batch", "ranks")]
    grid = [run for run in runs if not run.sweep]
    by_size = {run.size: run for run in sorted(grid, key=lambda run: run.parameters)}
    for size, run in by_size.items():
        rates = sorted({one.config.optim.lr for one in grid if one.size == size})
        shown = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        model, train = run.config.model, run.config.train
        counted = count_parameters(model, vocab_size)
        batch = f"{train.global_batch_size} x {train.sequence_length}"
        numbers = (human(counted.non_embedding), human(counted.total), str(model.num_layers), str(model.hidden_size))
        rows.append((size, *numbers, shown, batch, str(run.ranks)))
    return [f"sizes, vocabulary {vocab_size:,}", table(rows)]


def _runs(
    study: Study, runs: Sequence[Run], uses: Uses, costs: Mapping[str, Cost], states: Mapping[str, State], *, each: bool
) -> str:
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        own = (run.sweep, run.config.optim.lr, run.config.train.global_batch_size)
        groups.setdefault((*run.cell, *own, run.seed) if each else (*run.cell, *own), []).append(run)
    rated = len({(run.size, run.config.optim.lr) for run in runs}) > len({run.size for run in runs})
    heads = [
        "arm",
        "size",
        "N",
        "D",
        "seed" if each else "seeds",
        *(["lr", "batch"] if rated else []),
        "steps",
        "epochs",
        "FLOPs",
    ]
    priced = study.costs is not None
    if priced:
        heads.append("hours")
    if study.costs is not None and study.costs.price_per_hour is not None:
        heads.append(study.costs.currency)
    heads.append("state")
    rows: list[tuple[str, ...]] = [tuple(heads)]
    for members in groups.values():
        run = members[0]
        cost = total([costs[member.id] for member in members])
        row = [run.arm, run.size, human(run.parameters), compact(run.tokens)]
        row += [str(run.seed) if each else str(len(members))]
        if rated:
            row += [f"{run.config.optim.lr:.3g}", f"{run.config.train.global_batch_size}{' (sweep)' if run.sweep else ''}"]
        row += [f"{run.config.train.steps:,}"]
        row += [mapping_of_epochs(uses[use_key(run)]), scientific(cost.flops)]
        row += [] if cost.hours is None else [_hours(cost.hours)]
        row += [] if cost.money is None else [f"{cost.money:,.2f}"]
        counted = Counter(states[member.id] for member in members)
        told = [f"{counted[state]} {state}" for state in STATES if counted[state]]
        rows.append((*row, states[run.id] if len(counted) == 1 and each else ", ".join(told)))
    return table(rows)


def _totals(study: Study, runs: Sequence[Run], costs: Mapping[str, Cost], states: Mapping[str, State]) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "runs", "tokens", "FLOPs", "device-hours", "price")]
    left = [run for run in runs if states[run.id] != "done"]
    for name, members in (("all", list(runs)), ("still to do", left)):
        cost = total([costs[run.id] for run in members])
        hours = "n/a" if cost.hours is None else _hours(cost.hours)
        price = "n/a" if cost.money is None or study.costs is None else f"{cost.money:,.2f} {study.costs.currency}"
        rows.append(
            (name, str(len(members)), human(sum(run.own_tokens for run in members)), scientific(cost.flops), hours, price)
        )
    told = _basis(study)
    return [f"in all{told}", table(rows)]


def _basis(study: Study) -> str:
    costs = study.costs
    if costs is None:
        return " (no `costs` in the file: neither hours nor money)"
    if costs.flops_per_second is not None:
        return f", at {human(costs.flops_per_second)}FLOP/s per device"
    return f", on {costs.device} at {costs.mfu:.0%} of its peak: {human(costs.rate())}FLOP/s"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def status_text(study: Study, runs: Sequence[Run], folder: Folder, *, each: bool) -> str:
    """How many runs are done, running, failed and to do, by arm; what runs and what failed; the time left."""
    states = {run.id: folder.state(run) for run in runs}
    heads = ("arm", *STATES, "tokens")
    rows: list[tuple[str, ...]] = [heads]
    for arm in study.arms:
        rows.append(_status_row(arm, [run for run in runs if run.arm == arm], states, folder))
    rows.append(_status_row("all", list(runs), states, folder))
    sections = [f"study {study.name} in {folder.path}", table(rows)]
    running = [run for run in runs if states[run.id] == "running"]
    if running:
        sections += ["running", table([("run", "step", "of"), *(_running_row(run, folder) for run in running)])]
    failed = [run for run in runs if states[run.id] == "failed"]
    if failed:
        lines = []
        for run in failed:
            lines.append(f"  {run.name}: {folder.describe_failure(run) or 'failed'}; {folder.log(run)}")
        sections += ["failed; the next submit tries them again\n" + "\n".join(lines)]
    if each:
        rest = [run for run in runs if states[run.id] in ("to do", "stopped")]
        sections.append("to do\n" + "\n".join(f"  {run.name} ({states[run.id]})" for run in rest))
    spent = together([one for run in runs if (one := _goodput(folder.run(run))) is not None])
    if spent is not None:
        sections.append(f"time of all runs: {spent.text()}")
    eta = _eta(runs, states, folder)
    sections.append(f"time left at the pace of the last hour: {'n/a' if eta is None else duration(eta)}")
    return "\n\n".join(_joined(sections))


def _goodput(run: Path) -> Goodput | None:
    try:
        return goodput_of(run)
    except UserError:  # its own status tells
        return None


def _status_row(name: str, runs: Sequence[Run], states: Mapping[str, State], folder: Folder) -> tuple[str, ...]:
    counted = Counter(states[run.id] for run in runs)
    done = sum((folder.steps_done(run) - run.branch_step) * run.config.train.tokens_per_step for run in runs)
    tokens = f"{human(done)} of {human(sum(run.own_tokens for run in runs))}"
    return (name, *(str(counted[state]) for state in STATES), tokens)


def _running_row(run: Run, folder: Folder) -> tuple[str, ...]:
    return run.name, f"{folder.steps_done(run):,}", f"{run.config.train.steps:,}"


_PACE_S = 3600.0


def _eta(runs: Sequence[Run], states: Mapping[str, State], folder: Folder) -> float | None:
    """Seconds left, by the FLOPs that were finished within the last hour; None when nothing was."""
    now = time.time()
    finished = []
    for run in runs:
        if states[run.id] == "done":
            file = folder.run(run) / "result.json"
            finished.append((file.stat().st_mtime, run))
    recent = [(when, run) for when, run in finished if now - when < _PACE_S]
    left = sum(run.own_flops(1) for run in runs if states[run.id] != "done")
    if not left:
        return 0.0
    if not recent or not any(state == "running" for state in states.values()):
        return None
    began = min((folder.run(run) / "run.json").stat().st_mtime for _, run in recent)
    pace = sum(run.own_flops(1) for _, run in recent) / max(now - began, 1.0)
    for run in runs:
        if states[run.id] == "running":
            left -= run.flops(1) * (folder.steps_done(run) - run.branch_step) / run.config.train.steps
    return max(0.0, left / pace)
