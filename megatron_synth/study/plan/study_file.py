"""The study file: which mixtures, sizes, budgets and seeds are compared, and under which one protocol.

    arms x sizes x budgets x seeds, with a grid that says which of them are run

A study file is read like every other configuration: `base:` inheritance, `a.b=c` overrides, all problems at once. What
the runs share stands once, in `protocol`, as the sections of a training configuration. `runs.py` expands it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.load import apply_overrides, load_yaml, merge
from megatron_synth.config.schema import ValidationConfig
from megatron_synth.config.section import Amount, PositiveInt, Section, Seed
from megatron_synth.config.validation import examine, suggest
from megatron_synth.estimate.hardware import peak_flops
from megatron_synth.study.plan.arms import Arm
from megatron_synth.study.plan.generated import Generated, Rounds, check_generated, unfold
from megatron_synth.study.plan.rates import Rates, check_rates
from megatron_synth.study.plan.references import references

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWNED = {
    "data.sources": "sources and arms",
    "data.validation": "validation",
    "data.seed": "seeds",
    "data.phases": "arms and in_order",
    "train.steps": "grid (budgets in tokens)",
    "train.seed": "seeds",
    "train.batch_ramp": "nothing: a budget is whole steps of one batch size",
    "optim.lr": "rates.lr",
    "optim.min_lr": "rates.min_lr_fraction",
    "optim.warmup_steps": "rates.warmup_fraction",
    "optim.decay_steps": "rates.decay_fraction",
    "checkpoint.init_from": "nothing: every run starts from its seed",
    "checkpoint.branch_from": "design.trunk",
    "checkpoint.keep_steps": "design.trunk",
}
"""Keys of a training configuration that a study decides itself, and by what."""


class StudySource(Section):
    """A source of text that arms draw on."""

    path: str
    """A prepared source, as in a training configuration."""
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """How often a run may see it; a study with a run that needs more is refused before anything runs."""
    unique_tokens: Amount | None = None
    """Use only so many tokens of it: simulated epoching, where a small run repeats its text as the real one would."""
    shift_windows: bool = False
    """As in a training configuration."""
    tokens: Amount | None = None
    """How many it will have, for planning while it is not prepared."""
    generation_flops: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """FLOPs that each of its tokens took to generate, for `report.count_generation`. Default: as the record of its synthesis in
    its manifest says."""
    reference: str | None = None
    """The kind of text in published studies that it is like: `hq`, `qa`, `textbook`, `table`, `math`, `faq` or `tutorial`. The
    report shows what these found beside its own answer."""


def _sizes_by_name(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    return {name: {} if size is None else size for name, size in value.items()} if isinstance(value, dict) else value


class StudySize(Section):
    """A model size."""

    model: dict[str, Any] | str | None = None
    """The `model` section of a training configuration, or a file that has one. Default: configs/model/<name>.yaml."""
    ranks: PositiveInt = 1
    """GPUs, or processes on a CPU, of one run."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Default: by the rule in `rates`."""
    mfu: Annotated[float, Field(gt=0, le=1)] | None = None
    """Utilisation that the cost of this size is computed with. Default: that in `costs`."""
    settings: dict[str, Any] = {}
    """Sections of a training configuration that only this size needs: `parallel`, `train.micro_batch_size`."""


class Cells(Section):
    """Some of the runs: every given arm at every given size, budget and seed. What several entries name is run once."""

    sizes: tuple[str, ...] | None = None
    """Default: all."""
    tokens: tuple[Amount, ...] = ()
    """Budgets in tokens."""
    tokens_per_parameter: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Budgets in tokens per non-embedding parameter."""
    arms: tuple[str, ...] | None = None
    """Default: all."""
    seeds: tuple[Seed, ...] | None = None
    """Default: all."""


class Costs(Section):
    """What a device computes and costs. Nothing here decides a result."""

    device: str | None = None
    """GPU, as its driver names it: its peak is known."""
    mfu: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of the peak that a run reaches."""
    flops_per_second: Annotated[float, Field(gt=0)] | None = None
    """What one device reaches, instead of `device` and `mfu`."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of a device for an hour."""
    currency: str = "USD"
    """Of the price."""

    def rate(self, mfu: float | None = None) -> float:
        """FLOP/s of one device; `mfu` replaces that of the section."""
        if self.flops_per_second is not None:
            return self.flops_per_second
        peak = peak_flops(self.device or "")
        assert peak is not None and self.mfu is not None
        return peak * (mfu or self.mfu)


class ReportConfig(Section):
    """What the report computes."""

    aggregate: Literal["macro", "micro"] | tuple[str, ...] = "macro"
    """The loss that fits and answers are about: mean over domains, mean over tokens, or mean over the named domains."""
    bootstraps: PositiveInt = 1000
    """Resamples behind each interval."""
    holdout_tokens: Amount | None = None
    """Fit budgets up to this, and say how well the fit predicts those above."""
    holdout_parameters: Amount | None = None
    """The same in model size."""
    seed: Seed = 0
    """Seed of the resampling."""
    count_generation: bool = False
    """Count what the text took to generate, as tokens that the same compute would have trained on, in speed-ups and in
    comparisons at equal cost."""


OWN_TRUNK = "own"


class Design(Section):
    """Which runs share their training."""

    trunk: str | None = None
    """`own`: the longest run of each arm, size and seed is the trunk of the shorter ones, which branch from it where their
    decay begins. The name of an arm: that arm's longest run is the trunk of all arms, which see their mixture in the decay
    alone. Needs the schedule wsd. Default: every run starts from its seed."""


class Study(Section):
    """A study."""

    name: str
    """Names the folder and the report."""
    description: str = ""
    """A sentence or two for the report."""
    output: str | None = None
    """Folder of the study. Default: runs/study/<name>."""
    prepare: str | None = None
    """The data file that `study prepare` makes the sources with."""
    sources: dict[str, StudySource] = Field(min_length=1)
    """Sources by name."""
    arms: dict[str, Arm] = Field(min_length=1)
    """Mixtures by name: source to ratio."""
    generated: dict[str, Generated] = {}
    """Sources that the study makes itself, by the models of its runs."""
    rounds: dict[str, Rounds] = {}
    """Loops `generate -> prepare -> train`, each of which becomes such sources and arms of them."""
    in_order: dict[str, tuple[str, ...]] = {}
    """Arms whose sources are read one after the other and not mixed: the names of these, in order. Shares become lengths."""
    copies: dict[str, tuple[str, ...]] = {}
    """Arms that differ in the seed of a generated source alone, under one name. This is filled in."""
    baseline: str | None = None
    """The arm that speed-ups are measured against. Default: the first."""
    sizes: Annotated[dict[str, StudySize], BeforeValidator(_sizes_by_name)] = Field(min_length=1)
    """Model sizes by name, or a list of names."""
    grid: tuple[Cells, ...] = Field(min_length=1)
    """Which runs."""
    seeds: tuple[Seed, ...] = Field(default=(1,), min_length=1)
    """Seeds of weights and data order. Runs that differ only in the mixture share both."""
    validation: dict[str, ValidationConfig] = Field(min_length=1)
    """Validation domains by name."""
    design: Design = Design()
    """Which runs share their training."""
    rates: Rates
    """Learning rates."""
    protocol: dict[str, Any]
    """What all runs share: sections of a training configuration, without what the rest of this file decides."""
    ours: dict[str, str] = {}
    """Choices that the study which is reproduced does not state: dotted key of this file, and why it is so."""
    costs: Costs | None = None
    """For GPU-hours and money in the plan."""
    report: ReportConfig = ReportConfig()
    """The report."""
    keep_checkpoints: bool = False
    """Keep the weights of finished runs. Default: they are deleted once the result is written."""

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return Path(self.output) if self.output else Path("runs") / "study" / self.name

    @property
    def baseline_arm(self) -> str:
        """The baseline, after the default."""
        return self.baseline or next(iter(self.arms))

    def family(self, arm: str) -> str:
        """The sources that an arm has beyond those of the baseline, joined by `+`; empty for the baseline's own."""
        natural = self.arms[self.baseline_arm]
        return "+".join(name for name, share in self.arms[arm].items() if share.ratio and name not in natural)

    def share(self, arm: str) -> Fraction:
        """Share of an arm's tokens that are not from the baseline's sources."""
        natural = self.arms[self.baseline_arm]
        return sum((share.ratio for name, share in self.arms[arm].items() if name not in natural), Fraction(0))


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """The study in a file, with overrides applied; the models of its sizes are resolved into it.

    Raises:
        UserError: a file is missing or cannot be read.
        ConfigError: with all problems of the study.
    """
    overrides = tuple(overrides)
    problems, study = examine(Study, apply_overrides(load_yaml(path), overrides))
    if study is not None and not problems:
        study, problems = _with_settings(study)
    if study is not None and not problems:
        study, problems = unfold(study)
    if study is not None and not problems:
        problems = list(_check(study))
        models: dict[str, Any] = {}
        for name, size in study.sizes.items():
            try:
                models[name] = size.model_copy(update={"model": _model_of(name, size)})
            except UserError as error:
                problems.append(Problem(f"sizes.{name}", str(error)))
        study = study.model_copy(update={"sizes": models})
    if problems:
        raise ConfigError(f"{path} with {' '.join(overrides)}" if overrides else str(path), problems)
    assert study is not None
    return study


def _with_settings(study: Study) -> tuple[Study, list[Problem]]:
    """The study with the synthesis files that it names read into it."""
    problems = []

    def read(path: str, one: Generated) -> Generated:
        if one.synthesis is None:
            return one
        try:
            content = {key: value for key, value in load_yaml(one.synthesis).items() if key not in ("output", "seed")}
            settings = merge(content, one.settings)
        except UserError as error:
            problems.append(Problem(f"{path}.synthesis", str(error)))
            return one
        return one.model_copy(update={"synthesis": None, "settings": settings})

    generated = {name: read(f"generated.{name}", one) for name, one in study.generated.items()}
    rounds = {
        name: loop.model_copy(update={"corpus": read(f"rounds.{name}.corpus", loop.corpus)})
        for name, loop in study.rounds.items()
    }
    return study.model_copy(update={"generated": generated, "rounds": rounds}), problems


def _model_of(name: str, size: StudySize) -> dict[str, Any]:
    if isinstance(size.model, dict):
        return {"name": name, **size.model}
    try:
        model = load_yaml(size.model or f"model/{name}.yaml").get("model")
    except ConfigError:
        raise
    except UserError as error:
        if size.model is not None:
            raise
        hint = re.search(r"did you mean '(?:model/)?(.+?)(?:\.yaml)?'", str(error))
        close = f"; did you mean '{hint[1]}'?" if hint else ""
        raise UserError(f"unknown size: there is no configs/model/{name}.yaml{close} Or describe it under `model`") from None
    if not isinstance(model, dict):
        raise UserError(f"{size.model} has no section `model`")
    return {**model, "name": name}


def _check(study: Study) -> Iterator[Problem]:
    """Rules between the sections of a study."""
    sections: dict[str, Iterable[str]] = {
        "arms": study.arms,
        "sizes": study.sizes,
        "sources": study.sources,
        "generated": study.generated,
        "rounds": study.rounds,
        "validation": study.validation,
    }
    for section, names in {"name": [study.name], **sections}.items():
        for name in names:
            if not _NAME.fullmatch(name):
                path = section if section == "name" else f"{section}.{name}"
                yield Problem(path, f"'{name}': a name has letters, digits, '.', '_' and '-': it becomes part of file names")
    for section in ("arms", "sizes"):
        lower: dict[str, str] = {}
        for name in sections[section]:
            if name.lower() in lower:
                yield Problem(f"{section}.{name}", f"differs from '{lower[name.lower()]}' only in its capitals; rename one")
            lower.setdefault(name.lower(), name)
    for name, source in study.sources.items():
        if source.reference is not None and source.reference not in references():
            hint = suggest(source.reference, list(references())) or f"; known: {', '.join(references())}"
            yield Problem(f"sources.{name}.reference", f"no published answers about '{source.reference}'{hint}")
    yield from _arms(study)
    yield from check_generated(study)
    yield from _grid(study)
    trunk = study.design.trunk
    if trunk not in (None, OWN_TRUNK, *study.arms):
        yield Problem("design.trunk", f"'{trunk}' is neither '{OWN_TRUNK}' nor an arm{suggest(str(trunk), list(study.arms))}")
    if OWN_TRUNK in study.arms and trunk == OWN_TRUNK:
        yield Problem(f"arms.{OWN_TRUNK}", "is also what design.trunk calls an arm's own longest run; rename it")
    yield from _report(study)
    budgets = {budget for cells in study.grid for budget in cells.tokens}
    named = () if any(cells.tokens_per_parameter for cells in study.grid) else sorted(budgets)
    yield from check_rates(study.rates, arms=study.arms, sizes=study.sizes, seeds=study.seeds, tokens=named)
    for key, instead in _OWNED.items():
        value: Any = study.protocol
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            yield Problem(f"protocol.{key}", f"a study decides this by {instead}; remove it here")
    dumped = study.model_dump(mode="json")
    for key in study.ours:
        value = dumped
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            yield Problem(
                f"ours.{key}", "names no setting of this file: give the dotted key of the choice, such as protocol.optim"
            )


def _arms(study: Study) -> Iterator[Problem]:
    known = [*study.sources, *study.generated]
    mixtures: dict[tuple[Any, ...], str] = {}
    for name, arm in study.arms.items():
        for source in arm:
            if source not in known:
                hint = suggest(source, known) or f"; known: {', '.join(known)}"
                yield Problem(f"arms.{name}.{source}", f"no source has this name{hint}")
        total = sum((share.ratio for share in arm.values()), Fraction(0))
        if total != 1:
            parts = " + ".join(f"{source} {share.ratio}" for source, share in arm.items()) or "nothing"
            decimal = "" if total.denominator == 1 else f" ({float(total):.10g})"
            yield Problem(f"arms.{name}", f"the ratios must sum to exactly 1, but {parts} = {total}{decimal}")
        parts_of = {source: share for source, share in arm.items() if share.ratio}
        taken = sorted((source, share.ratio, share.unique_tokens) for source, share in parts_of.items())
        mixture = (*taken, study.in_order.get(name))
        if mixture in mixtures:
            yield Problem(f"arms.{name}", f"is the same mixture as '{mixtures[mixture]}'; remove one")
        mixtures.setdefault(mixture, name)
    if study.baseline is not None and study.baseline not in study.arms:
        yield Problem("baseline", f"'{study.baseline}' is no arm{suggest(study.baseline, list(study.arms))}")


def _grid(study: Study) -> Iterator[Problem]:
    for number, cells in enumerate(study.grid):
        path = f"grid.{number}"
        if not cells.tokens and not cells.tokens_per_parameter:
            yield Problem(path, "needs budgets: set `tokens` or `tokens_per_parameter`")
        choices: list[tuple[str, tuple[Any, ...] | None, list[Any]]] = [
            ("sizes", cells.sizes, list(study.sizes)),
            ("arms", cells.arms, list(study.arms)),
            ("seeds", cells.seeds, list(study.seeds)),
        ]
        for key, given, known in choices:
            for value in given or ():
                if value not in known:
                    what = {"sizes": "unknown size", "arms": "unknown arm", "seeds": "not among the seeds"}[key]
                    hint = suggest(str(value), [str(item) for item in known])
                    yield Problem(f"{path}.{key}", f"{what} '{value}'{hint or '; known: ' + ', '.join(map(str, known))}")
    if len(set(study.seeds)) < len(study.seeds):
        yield Problem("seeds", f"{list(study.seeds)} names a seed twice")


def _report(study: Study) -> Iterator[Problem]:
    if isinstance(study.report.aggregate, tuple):
        known = list(study.validation)
        for name in study.report.aggregate:
            if name not in known:
                yield Problem("report.aggregate", f"no validation domain '{name}'{suggest(name, known)}")
    costs = study.costs
    if costs is None or costs.flops_per_second is not None:
        return
    if costs.device is None or costs.mfu is None:
        yield Problem("costs", "needs `device` and `mfu`, or `flops_per_second`")
    elif peak_flops(costs.device) is None:
        yield Problem("costs.device", f"no peak is known for '{costs.device}'; give costs.flops_per_second instead")
