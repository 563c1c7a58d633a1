"""Sources that a study makes itself: by a generator that is one of its own runs, once or in rounds.

    generated   a source by name: which synthesis, by the model of which run, with which seed
    rounds      a loop `generate -> prepare -> train -> generate`, unfolded here into generated sources and arms

A source with several `seeds` is unfolded into one for each, and so is every arm that takes of it: the spread between corpora of
one generator then stands beside that between seeds of training. What is unfolded is written back into the study with the names
of its parts, so that a study that was written out is not unfolded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megatron_synth.config.errors import Problem
from megatron_synth.config.section import Amount, Ratio, Section, Seed
from megatron_synth.study.plan.arms import Arm, Share

if TYPE_CHECKING:
    from megatron_synth.study.plan.study_file import Study

MOST_ROUNDS = 100


class RunOf(Section):
    """A run of this study, whose model generates."""

    arm: str
    """Its arm."""
    size: str | None = None
    """Its size. Default: that of the run which reads the text."""
    tokens: Amount | None = None
    """Its budget, as in the grid. Default: that of the run which reads the text."""
    seed: Seed | None = None
    """Its seed. Default: that of the run which reads the text, so that seeds are independent of each other throughout."""


class Generated(Section):
    """A source that is made by a synthesis inside the study."""

    synthesis: str | None = None
    """A synthesis file. Its `output` and `seed` do not count, nor its generator where one is given here."""
    settings: dict[str, Any] = {}
    """Sections of a synthesis file, instead of it or over it."""
    generator: RunOf | None = None
    """The run that generates. Default: `settings.generator`, which may name any model."""
    against: RunOf | None = None
    """Contrastive decoding: the run of the worse model."""
    hardest: RunOf | None = None
    """Parents by loss: the run that is weakest on them. `settings.hardest.count` says how many."""

    seed: Seed | None = None
    """Of the synthesis. Default: that of the run which reads the text."""
    seeds: tuple[Seed, ...] = ()
    """Several corpora: the source NAME becomes NAME-<seed>, and every arm that takes of it an arm for each."""
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """How often a run may see it. How much there is shows when it is made."""
    unique_tokens: Amount | None = None
    """Use only so many tokens of it."""
    shift_windows: bool = False
    """As in a training configuration."""
    tokens: Amount | None = None
    """How many it will have, for planning."""

    @property
    def models(self) -> tuple[tuple[str, RunOf | None], ...]:
        """The runs of the study that it needs, by the key of each."""
        return (("generator", self.generator), ("against", self.against), ("hardest", self.hardest))


class Rounds(Section):
    """A loop: each round's text is made by the model that the round before has trained; the baseline's run makes the first."""

    count: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 1
    """Rounds."""
    protocol: Literal["replace", "accumulate"] = "replace"
    """replace: a round trains on the text of the last model alone, as far as it is synthetic. accumulate: on that of all models
    so far, in equal parts (arXiv 2404.01413), of as many tokens as every other run."""
    real: Ratio | None = None
    """Share of the baseline's text in each round, fixed (arXiv 2310.00429). Default: none to replace; to accumulate, a part
    equal to that of each corpus."""
    corpus: Generated
    """How the text is made; without a generator."""
    arms: tuple[str, ...] | None = None
    """Arm of each round. Default: NAME-1, NAME-2, ... This is filled in."""


def unfold(study: Study) -> tuple[Study, list[Problem]]:
    """The study with its rounds and its several corpora as sources and arms, and what is wrong with them."""
    if study.baseline_arm not in study.arms:  # which is told elsewhere
        return study, []
    work = _Unfolding(study)
    problems = [*work.copies(), *work.rounds()]
    if problems:
        return study, problems
    return study.model_copy(update=work.parts()), []


class _Unfolding:
    def __init__(self, study: Study):
        self.study = study
        self.generated, self.arms, self.loops = dict(study.generated), dict(study.arms), dict(study.rounds)
        self.in_order, self.copied = dict(study.in_order), dict(study.copies)

    def parts(self) -> dict[str, Any]:
        """What changes in the study."""
        names = {**self.copied, **{name: loop.arms or () for name, loop in self.loops.items()}}
        grid = tuple(
            cells if cells.arms is None else cells.model_copy(update={"arms": _spelled_out(cells.arms, names, self.arms)})
            for cells in self.study.grid
        )
        return {
            "generated": self.generated,
            "arms": self.arms,
            "rounds": self.loops,
            "in_order": self.in_order,
            "copies": self.copied,
            "grid": grid,
        }

    def copies(self) -> Iterator[Problem]:
        """A source with several seeds as one for each."""
        for name, one in self.study.generated.items():
            if not one.seeds:
                continue
            if one.seed is not None or len(set(one.seeds)) < len(one.seeds):
                yield Problem(f"generated.{name}.seeds", "give either `seed` or different `seeds`")
                return
            for seed in one.seeds:
                copy = f"{name}-{seed}"
                if copy in self.generated:
                    yield Problem(f"generated.{name}.seeds", f"makes a source '{copy}', which is there already; rename it")
                    return
                self.generated[copy] = one.model_copy(update={"seed": seed, "seeds": ()})
            del self.generated[name]
            for arm in [arm for arm, shares in self.arms.items() if name in shares]:
                made = []
                for seed in one.seeds:
                    copy = f"{arm}-{seed}"
                    if copy in self.arms:
                        yield Problem(f"generated.{name}.seeds", f"makes an arm '{copy}', which is there already; rename it")
                        return
                    self.arms[copy] = {
                        f"{name}-{seed}" if source == name else source: share for source, share in self.arms[arm].items()
                    }
                    if arm in self.in_order:
                        order = self.in_order[arm]
                        self.in_order[copy] = tuple(f"{name}-{seed}" if source == name else source for source in order)
                    made.append(copy)
                del self.arms[arm]
                self.in_order.pop(arm, None)
                self.copied[arm] = tuple(made)

    def rounds(self) -> Iterator[Problem]:
        """A loop as a source and an arm for each round; what two loops have in common is there once."""
        for name, loop in self.study.rounds.items():
            if loop.arms is not None:
                continue
            if loop.corpus.generator is not None or loop.corpus.seeds:
                yield Problem(f"rounds.{name}.corpus", "each round's generator is the model of the round before; remove it")
                continue
            if loop.real == 1:
                yield Problem(f"rounds.{name}.real", "leaves no synthetic text; give a share below 1")
                continue
            arms = [self.study.baseline_arm]
            sources: list[str] = []
            for number in range(1, loop.count + 1):
                corpus = loop.corpus.model_copy(update={"generator": RunOf(arm=arms[-1])})
                sources.append(_known(self.generated, corpus) or f"{name}-{number}")
                shares = self._shares(loop, sources)
                arm = _known(self.arms, shares) or f"{name}-{number}"
                if sources[-1] in self.study.sources or self.generated.get(sources[-1], corpus) != corpus:
                    yield Problem(f"rounds.{name}", f"makes a source '{sources[-1]}', which is there already; rename it")
                    return
                if self.arms.get(arm, shares) != shares:
                    yield Problem(f"rounds.{name}", f"makes an arm '{arm}', which is there already; rename it")
                    return
                self.generated[sources[-1]], self.arms[arm] = corpus, shares
                arms.append(arm)
            self.loops[name] = loop.model_copy(update={"arms": tuple(arms[1:])})

    def _shares(self, loop: Rounds, sources: list[str]) -> Arm:
        """The mixture of a round, given the corpora so far."""
        real = loop.real
        if real is None:
            real = Fraction(0) if loop.protocol == "replace" else Fraction(1, len(sources) + 1)
        natural = self.study.arms[self.study.baseline_arm]
        shares = {name: share.model_copy(update={"ratio": share.ratio * real}) for name, share in natural.items() if real}
        chosen = sources[-1:] if loop.protocol == "replace" else sources
        return shares | {source: Share(ratio=(1 - real) / len(chosen)) for source in chosen}


def _known(known: Mapping[str, Any], value: Any) -> str | None:
    return next((name for name, other in known.items() if other == value), None)


def _spelled_out(arms: tuple[str, ...], names: Mapping[str, tuple[str, ...]], known: Mapping[str, Any]) -> tuple[str, ...]:
    """Arms of a grid's entry, with those of a loop or of several corpora in place of its name."""
    found = [one for arm in arms for one in (names[arm] if arm in names and arm not in known else (arm,))]
    return tuple(dict.fromkeys(found))


def check_generated(study: Study) -> Iterator[Problem]:
    """Rules of the generated sources."""
    for name, one in study.generated.items():
        path = f"generated.{name}"
        if name in study.sources:
            yield Problem(path, "a source has this name already; rename one")
        for key, run in one.models:
            if run is None:
                continue
            if run.arm not in study.arms:
                yield Problem(f"{path}.{key}.arm", f"no arm is called '{run.arm}'; known: {', '.join(study.arms)}")
            if run.size is not None and run.size not in study.sizes:
                yield Problem(f"{path}.{key}.size", f"no size is called '{run.size}'; known: {', '.join(study.sizes)}")
            if run.seed is not None and run.seed not in study.seeds:
                yield Problem(f"{path}.{key}.seed", f"{run.seed} is not among the seeds, {', '.join(map(str, study.seeds))}")
        if one.generator is None and "generator" not in one.settings and one.synthesis is None:
            yield Problem(f"{path}.generator", "nothing generates: name a run of the study, or a model in settings.generator")
    for name, order in study.in_order.items():
        taken = [source for source, share in study.arms.get(name, {}).items() if share.ratio]
        if sorted(order) != sorted(taken):
            yield Problem(f"in_order.{name}", f"name the sources of this arm, each once: {', '.join(taken) or 'there is none'}")
