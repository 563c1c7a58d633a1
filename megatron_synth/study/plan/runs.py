"""From a study to its runs, each with an id that follows from its content.

The id is a digest of what decides the result: model, mixture, data, seed, batch, length, optimizer, precision and
evaluation. The layout, the micro-batch size, logging, checkpoints and the caps on repetition are not part of it, since
they do not change a run: a study may be continued on other machines, and its report may be made again, with the same ids.
Settings at their default do not count either, so that a later version with more settings knows the runs of an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatron_synth.config.errors import ConfigError, Problem
from megatron_synth.config.load import merge
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config, ModelConfig
from megatron_synth.config.validation import examine
from megatron_synth.core.log import compact
from megatron_synth.estimate.flops import count_parameters, flops_per_token
from megatron_synth.parallel.plan import plan
from megatron_synth.study.plan.corpora import Corpus, corpus_of
from megatron_synth.study.plan.generated import Generated, RunOf
from megatron_synth.study.plan.rates import variants
from megatron_synth.study.plan.study_file import Study, StudySource

_ANY_VOCABULARY = 1  # non-embedding parameters do not depend on it
_IDENTITY_VERSION = 1  # raised when a default that decides a result changes, or what the digest is made of
# the digest says what a run is; these only say how it is carried out
_NO_PART_OF_A_RESULT: dict[str, tuple[str, ...]] = {
    "train": ("micro_batch_size", "max_consecutive_skips"),
    "model": ("name",),
    "eval": ("interval",),
}
_RESULT_SECTIONS = ("model", "data", "train", "optim", "precision", "eval")


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    size: str
    budget: int
    """Tokens asked for."""
    seed: int
    ranks: int
    config: Config
    corpora: Mapping[str, Corpus] = field(default_factory=dict)
    """The sources that the study makes, by their names."""
    sweep: bool = False
    """A run of `rates.sweep`, which takes no part in the laws."""
    branch_step: int = 0
    """Of a branch: the step of its trunk that it goes on from."""
    family: tuple[str, ...] = ()
    """Ids of a trunk and of its branches, the trunk's first, of a run that is one of them."""

    @property
    def trunk(self) -> str:
        """Id of the trunk of its family; empty for a run that depends on no other."""
        return self.family[0] if self.family else ""

    @cached_property
    def id(self) -> str:
        """12 hexadecimal characters that follow from what decides the result."""
        return identity(self.config, self.corpora)

    @property
    def cell(self) -> tuple[str, str, int]:
        """Arm, size and budget: runs of one cell differ in the seed alone."""
        return self.arm, self.size, self.budget

    @property
    def name(self) -> str:
        """Name of its folder: what it is, for people, and the id."""
        rates = f"-lr{self.config.optim.lr:g}-b{self.config.train.global_batch_size}" if self.sweep else ""
        return f"{self.arm}-{self.size}-{compact(self.budget)}{rates}-s{self.seed}-{self.id}"

    @property
    def tokens(self) -> int:
        """Tokens trained on: the budget in whole steps."""
        return self.config.train.steps * self.config.train.tokens_per_step

    @property
    def parameters(self) -> int:
        """Non-embedding parameters."""
        return count_parameters(self.config.model, _ANY_VOCABULARY).non_embedding

    @property
    def own_tokens(self) -> int:
        """Of `tokens`, those that are not its trunk's."""
        return (self.config.train.steps - self.branch_step) * self.config.train.tokens_per_step

    def own_flops(self, vocab_size: int) -> float:
        """FLOPs of the steps that are not its trunk's."""
        return self.flops(vocab_size) * (1 - self.branch_step / self.config.train.steps)

    def flops(self, vocab_size: int) -> float:
        """FLOPs of the run, by the convention of `core.flops`."""
        return float(self.tokens * flops_per_token(self.config.model, self.config.train.sequence_length, vocab_size))


def identity(config: Config, corpora: Mapping[str, Corpus] | None = None) -> str:
    """12 hexadecimal characters that name the result of `config`. corpora: sources that count by their ids, not their paths."""
    content = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    kept = {section: content.get(section, {}) for section in _RESULT_SECTIONS}
    for section, names in _NO_PART_OF_A_RESULT.items():
        kept[section] = _without(kept[section], *names)
    sources = {name: _without(source, "max_epochs") for name, source in kept["data"]["sources"].items()}
    for name, corpus in (corpora or {}).items():
        sources[name] = {**sources[name], "path": f"generated/{corpus.id}"}
    kept["data"] = {**_without(kept["data"], "verify"), "sources": sources}
    # keys in one order: that of the schema may change; the order of the sources decides that of the samples
    canonical = json.dumps([_IDENTITY_VERSION, list(sources), kept], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _without(section: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def needs_of(job: Run | Corpus) -> Sequence[Run | Corpus]:
    """What must be finished before a run can be trained, or a corpus be made."""
    return job.needs if isinstance(job, Corpus) else tuple(job.corpora.values())


def jobs_of(runs: Sequence[Run]) -> list[Run | Corpus]:
    """Runs in their order, each behind the corpora that it reads, as far as no run before it does."""
    found: dict[str, Run | Corpus] = {}
    for run in runs:
        for corpus in run.corpora.values():
            found.setdefault(corpus.id, corpus)
        found[run.id] = run
    return list(found.values())


def expand(study: Study) -> list[Run]:
    """The runs of a study: by seed, then the largest first, so that an early report covers every cell.

    Raises:
        ConfigError: with all problems of the configurations that the study makes, in the study's own keys.
    """
    expansion = _Expansion(study)
    runs = [expansion.run(*cell) for cell in expansion.cells]
    found = [run for run in runs if run is not None]
    swept = _sweep(study, found, expansion.problems)
    if not expansion.problems:
        from megatron_synth.study.plan.trunks import arranged

        found = [*arranged(study, found, expansion.problems), *swept]
    if expansion.problems:
        raise ConfigError(f"study {study.name}", list(expansion.problems))
    seeds, arms = list(study.seeds), list(study.arms)
    return sorted(found, key=lambda run: (seeds.index(run.seed), -run.flops(_ANY_VOCABULARY), arms.index(run.arm)))


_Cell = tuple[str, str, int, int]
"""Arm, size, budget and seed."""


class _Expansion:
    """Runs by their cells, each made once: those whose models generate before those that read what they wrote."""

    def __init__(self, study: Study):
        self.study = study
        self.problems: dict[Problem, None] = {}
        self.cells = dict.fromkeys(_combinations(study, self.problems))
        self._made: dict[_Cell, Run | None] = {}
        self._under_way: list[_Cell] = []

    def run(self, *cell: Any) -> Run | None:
        """The run of a cell; None where there are problems, which are noted."""
        arm, size, budget, seed = cell
        if cell not in self._made:
            self._under_way.append(cell)
            corpora = self._corpora(arm, size, budget, seed)
            self._under_way.pop()
            found, config = _config(self.study, arm, size, budget, seed, corpora or {})
            self.problems.update(dict.fromkeys(found))
            complete = config is not None and not found and corpora is not None
            self._made[cell] = (
                Run(arm, size, budget, seed, self.study.sizes[size].ranks, config, corpora or {})
                if complete and config is not None
                else None
            )
        return self._made[cell]

    def _corpora(self, arm: str, size: str, budget: int, seed: int) -> dict[str, Corpus] | None:
        """The generated sources of a run; None where there are problems."""
        found: dict[str, Corpus] = {}
        for name, source in self.study.generated.items():
            share = self.study.arms[arm].get(name)
            if share is None or not share.ratio:
                continue
            runs, before = [], len(self.problems)
            for key, run in source.models:
                runs.append(None if run is None else self._generator(f"generated.{name}.{key}", run, size, budget, seed))
                if run is not None and runs[-1] is None and len(self.problems) == before:
                    return None  # its own problems are noted already
            if len(self.problems) > before:
                return None
            try:
                found[name] = corpus_of(name, source, seed, runs, self.study.folder / "corpora")
            except ConfigError as error:
                for one in error.problems:
                    inside = one.path.startswith("generated.")
                    path = one.path if inside else f"generated.{name}.settings.{one.path}"
                    self.problems[Problem(path, one.message)] = None
                return None
        return found

    def _generator(self, path: str, run: RunOf, size: str, budget: int, seed: int) -> Run | None:
        cell = (run.arm, run.size or size, run.tokens or budget, seed if run.seed is None else run.seed)
        if cell in self._under_way:
            names = [one[0] for one in [*self._under_way[self._under_way.index(cell) :], cell]]
            self.problems[Problem(path, f"needs its own text, by way of arms {' > '.join(names)}: name another arm")] = None
            return None
        if cell not in self.cells:
            what = f"arm {cell[0]} at size {cell[1]} on {compact(cell[2])} tokens with seed {cell[3]}"
            message = f"no run of the grid is {what}: add it to the grid, or name a size and a budget that are in it"
            self.problems[Problem(path, message)] = None
            return None
        return self.run(*cell)


def _sweep(study: Study, runs: Sequence[Run], problems: dict[Problem, None]) -> list[Run]:
    """The runs at other rates and batches than the rule's."""
    own = [(run.arm, run.size, run.budget, run.seed, run.parameters, study.sizes[run.size].lr, run.config) for run in runs]
    found = []
    for one in variants(study.rates, own, study.baseline_arm, study.seeds[0], problems):
        run = replace(runs[one.of], config=one.config, sweep=True)
        try:
            plan(run.config, run.ranks)
        except ConfigError as error:
            batch = run.config.train.global_batch_size
            told = [Problem("rates.sweep.batches", f"batch {batch} at {run.size}: {part.message}") for part in error.problems]
            problems.update(dict.fromkeys(told))
        found.append(run)
    return found


def _combinations(study: Study, problems: dict[Problem, None]) -> Iterator[tuple[str, str, int, int]]:
    for number, cells in enumerate(study.grid):
        for size in cells.sizes or tuple(study.sizes):
            found, model = examine(ModelConfig, study.sizes[size].model)
            if found or model is None:
                problems.update(dict.fromkeys(Problem(f"sizes.{size}.model.{one.path}", one.message) for one in found))
                continue
            parameters = count_parameters(model, _ANY_VOCABULARY).non_embedding
            multiples = tuple(round(factor * parameters) for factor in cells.tokens_per_parameter)
            for budget in (*cells.tokens, *multiples):
                step = _tokens_per_step(study, size)
                if step is not None and budget < step:
                    message = f"a budget of {budget:,} tokens is below one batch of {step:,} (sequences x length); raise it"
                    problems[Problem(f"grid.{number}.tokens", message)] = None
                    continue
                for arm in cells.arms or tuple(study.arms):
                    for seed in cells.seeds or study.seeds:
                        yield arm, size, budget, seed


def _tokens_per_step(study: Study, size: str) -> int | None:
    """Tokens of a batch; None where the protocol does not say, which is reported elsewhere."""
    train = merge(study.protocol, study.sizes[size].settings).get("train")
    values = [train.get(key) for key in ("global_batch_size", "sequence_length")] if isinstance(train, dict) else [None]
    if not all(isinstance(value, int) and value > 0 for value in values):
        return None
    return math.prod(value for value in values if isinstance(value, int))


def _config(
    study: Study, arm: str, size: str, budget: int, seed: int, corpora: Mapping[str, Corpus]
) -> tuple[list[Problem], Config | None]:
    """The training configuration of a run, or what is wrong with it."""
    entry = study.sizes[size]
    assert isinstance(entry.model, dict), "load_study resolves models"
    shared = merge(study.protocol, entry.settings)
    step = _tokens_per_step(study, size) or budget
    steps = max(1, round(Fraction(budget, step)))
    sections = merge({"model": entry.model}, shared)
    found, model = examine(ModelConfig, sections["model"])
    if model is None or found:
        return [Problem(f"sizes.{size}.model.{one.path}", one.message) for one in found], None
    parameters = count_parameters(model, _ANY_VOCABULARY).non_embedding
    lr = study.rates.peak(entry.lr, parameters, budget, step)
    decided = {
        "data": {
            "sources": _sources(study, arm, corpora),
            "validation": _dump(study.validation),
            **_in_order(study, arm, steps * step),
        },
        "train": {"steps": steps, "seed": seed},
        "optim": study.rates.schedule(lr, steps),
    }
    content = merge(_quiet(), merge(sections, decided))
    problems, config = examine(Config, content)
    if config is not None and not problems:
        problems = check(config)
        if not problems:
            try:
                plan(config, entry.ranks)
            except ConfigError as error:
                problems = [Problem(one.path, f"{one.message} (sizes.{size}.ranks: {entry.ranks})") for one in error.problems]
    return [_in_study(study, size, problem) for problem in problems], config


def _quiet() -> dict[str, Any]:
    """Defaults of a study's runs: hundreds of small runs need no tracker of their own."""
    return {"log": {"wandb": {"mode": "disabled"}}}


def _sources(study: Study, arm: str, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """The sources of an arm, in the order of the study: one order for all arms."""
    taken = study.arms[arm]
    result = {}
    paths = {name: source.path for name, source in study.sources.items()}
    paths |= {name: str(corpus.prepared) for name, corpus in corpora.items()}
    sources: dict[str, StudySource | Generated] = {**study.sources, **study.generated}
    for name, source in sources.items():
        if name not in taken or not taken[name].ratio:
            continue
        share = taken[name]
        result[name] = {
            "path": paths.get(name, "."),  # one that cannot be made is told already
            "ratio": None if arm in study.in_order else str(share.ratio),
            "max_epochs": source.max_epochs if share.max_epochs is None else share.max_epochs,
            "unique_tokens": share.unique_tokens or source.unique_tokens,
            "shift_windows": source.shift_windows,
        }
    return result


def _in_order(study: Study, arm: str, tokens: int) -> dict[str, Any]:
    """Phases of an arm whose sources follow each other, the shares of the whole as their lengths."""
    if arm not in study.in_order:
        return {}
    *first, last = study.in_order[arm]
    phases: list[dict[str, Any]] = [
        {"tokens": max(1, round(study.arms[arm][name].ratio * tokens)), "ratios": {name: 1}} for name in first
    ]
    return {"phases": [*phases, {"ratios": {last: 1}}]}


def _dump(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section.model_dump(mode="json") for name, section in sections.items()}


def _in_study(study: Study, size: str, problem: Problem) -> Problem:
    """A problem of a training configuration, told at the place of the study that it comes from."""
    section = problem.path.split(".")[0]
    settings = study.sizes[size].settings
    if section == "model":
        return Problem(f"sizes.{size}.{problem.path}", problem.message)
    if section in settings and section not in study.protocol:
        return Problem(f"sizes.{size}.settings.{problem.path}", problem.message)
    return Problem(f"protocol.{problem.path}" if problem.path else f"sizes.{size}", problem.message)
