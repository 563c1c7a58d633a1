"""Runs as branches: one long run with a constant rate is the trunk, and shorter ones are decays from it.

With `design.trunk: own` the longest run of an arm, size and seed is the trunk of the shorter ones. Under the schedule wsd they
share all steps before their decays, so a branch gives what a run from scratch would: budgets of 1, 2, 4, 8 and 16 with a decay
of a tenth take 16 + 0.1 x (1 + 2 + 4 + 8) = 17.5, not 31. With the name of an arm that arm's longest run is the trunk of all
arms, which see their mixture in the decay alone (micro-anneals, as in arXiv 2406.03476, section 3.3).

What comes of one trunk is not independent: a trunk that is ahead by chance is so in all its branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from megatron_synth.config.errors import Problem
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config, PhaseConfig
from megatron_synth.study.plan.runs import Run
from megatron_synth.study.plan.study_file import OWN_TRUNK, Study

_KEY = "design.trunk"


def arranged(study: Study, runs: Sequence[Run], problems: dict[Problem, None]) -> list[Run]:
    """The runs as trunks and branches, in the order given; `problems` hears of what keeps one from being a branch."""
    if study.design.trunk is None:
        return list(runs)
    if runs and runs[0].config.optim.schedule != "wsd":
        message = f"a branch decays from the constant rate of its trunk; set protocol.optim.schedule: wsd, or {_KEY}: null"
        problems[Problem("protocol.optim.schedule", message)] = None
        return []
    made: dict[int, Run] = {}
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        arm = run.arm if study.design.trunk == OWN_TRUNK else study.design.trunk
        groups.setdefault((arm, run.size, run.seed), []).append(run)
    for (arm, size, seed), members in groups.items():
        longest = max((run for run in members if run.arm == arm), key=lambda run: run.budget, default=None)
        if longest is None:
            message = f"'{arm}' has no run of size {size} and seed {seed} in the grid, which others could branch from"
            problems[Problem(_KEY, message)] = None
            continue
        found = dict(_family(longest, members))
        problems.update(dict.fromkeys(_problems(longest, found.values())))
        made |= {id(run): found[run.cell] for run in members}
    return [made[id(run)] for run in runs if id(run) in made]


def _family(trunk: Run, members: Sequence[Run]) -> Iterator[tuple[tuple[str, str, int], Run]]:
    """By cell, the trunk and its branches."""
    branches = {run.cell: _branch(trunk, run) for run in members if run is not trunk}
    steps = tuple(sorted({run.branch_step for run in branches.values()}))
    checkpoint = trunk.config.checkpoint.model_copy(update={"keep_steps": steps})
    kept = replace(trunk, config=trunk.config.model_copy(update={"checkpoint": checkpoint}))
    family = (kept.id, *sorted(run.id for run in branches.values())) if branches else ()
    yield trunk.cell, replace(kept, family=family)
    for cell, run in branches.items():
        yield cell, replace(run, family=family)


def decay_steps(config: Config) -> int:
    """Steps of the final decay, after the default (`train.schedule`)."""
    return config.optim.decay_steps or max(1, round(config.train.steps / 10))


def _branch(trunk: Run, run: Run) -> Run:
    """A run whose steps before its decay are the trunk's."""
    begin = run.config.train.steps - decay_steps(run.config)
    optim = run.config.optim.model_copy(update={"warmup_steps": trunk.config.optim.warmup_steps})
    update: dict[str, object] = {"optim": optim}
    if run.arm != trunk.arm:
        ours, theirs = (one.config.data.sources for one in (run, trunk))
        sources = {name: {**theirs, **ours}[name].model_copy(update={"ratio": None}) for name in [*theirs, *ours]}
        end = max(begin, 1) * trunk.config.train.tokens_per_step
        shares = [{name: source.ratio for name, source in side.items()} for side in (theirs, ours)]
        phases = (PhaseConfig(until=end, ratios=shares[0]), PhaseConfig(ratios=shares[1]))
        update["data"] = run.config.data.model_copy(update={"sources": sources, "phases": phases})
    return replace(run, config=run.config.model_copy(update=update), branch_step=begin)


def _problems(trunk: Run, runs: Iterable[Run]) -> Iterator[Problem]:
    stable = trunk.config.train.steps - decay_steps(trunk.config)
    for run in runs:
        if not run.branch_step:
            continue
        what = f"{run.arm}, {run.size}, {run.tokens:,} tokens: branches at step {run.branch_step}"
        if run.branch_step < max(1, trunk.config.optim.warmup_steps):
            message = f"within the trunk's warm-up of {trunk.config.optim.warmup_steps} steps"
            yield Problem(_KEY, f"{what}, {message}; set rates.max_warmup_steps, or leave the budget out")
        if run.branch_step > stable:
            yield Problem(_KEY, f"{what}, the trunk's constant rate ends at {stable}; give arm {trunk.arm} a budget as large")
        for name, source in run.config.data.sources.items():
            before = trunk.config.data.sources.get(name)
            if before is not None and before.unique_tokens != source.unique_tokens:
                yield Problem(f"arms.{run.arm}.{name}.unique_tokens", f"differs from that of the trunk's arm, {trunk.arm}")
        yield from (Problem(f"protocol.{one.path}", one.message) for one in check(run.config))
