"""The corpora that a study makes: what decides each, by which model it is written, and in which stage its turn comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.load import merge
from megatron_synth.config.validation import validate
from megatron_synth.data.shards.manifest import canonical_digest
from megatron_synth.study.plan.generated import Generated
from megatron_synth.synthesis.kinds.template import Template, template_of
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

if TYPE_CHECKING:
    from megatron_synth.study.plan.runs import Run

_IDENTITY_VERSION = 1
_BY_RUN = "the model of a run"
"""Stands in a synthesis file for a generator whose run directory is known only when it is there."""


@dataclass(frozen=True)
class Corpus:
    """A source that the study makes.

    seed: of the synthesis. generator, against: the runs whose models write it; None where it is another model, or none.
    hardest: the run by whose losses its parents are chosen, if they are by one of the study.
    settings: the synthesis file, but for its output and the directories of these runs. tokens: as many as are expected.
    """

    seed: int
    generator: Run | None
    against: Run | None
    hardest: Run | None
    settings: SynthesisConfig
    template: Template
    folder_of_all: Path
    tokens: int | None

    ranks = 1

    @cached_property
    def id(self) -> str:
        """12 hexadecimal characters that follow from what decides the text."""
        return self._digest()

    @cached_property
    def answers_id(self) -> str:
        """The same of what was generated, whatever is kept of it: corpora that share it can share their answers."""
        return self._digest(without=("filters", "missing_chunks"))

    def _digest(self, without: Sequence[str] = ()) -> str:
        content = {key: value for key, value in self.settings.described().items() if key not in without}
        content |= {"kind": None, "template": self.template.digest}
        for key, run in (("generator", self.generator), ("against", self.against)):
            content[f"{key}_run"] = None if run is None else run.id
        if self.hardest is not None:  # ids of corpora from before there was this stay
            content["hardest_run"] = self.hardest.id
        return canonical_digest([_IDENTITY_VERSION, content])[:12]

    @property
    def name(self) -> str:
        """Name of its folder: what it is, for people, and the id. Not of the source: several may be this corpus."""
        return f"{self.template.name}-s{self.seed}-{self.id}"

    @property
    def folder(self) -> Path:
        """Where it is made: answers and corpus in `text`, the exported generator there, too, and shards in `prepared`."""
        return self.folder_of_all / self.name

    @property
    def prepared(self) -> Path:
        """The prepared source."""
        return self.folder / "prepared" / self.template.name

    @property
    def writers(self) -> tuple[Run, ...]:
        """Runs with whose models each token of the text is computed."""
        return tuple(run for run in (self.generator, self.against) if run is not None)

    @property
    def needs(self) -> tuple[Run, ...]:
        """Runs that must be finished."""
        chooses = () if self.hardest is None else (self.hardest,)
        return tuple({run.id: run for run in (*self.writers, *chooses)}.values())

    def synthesis(self, folders: Sequence[Path]) -> SynthesisConfig:
        """The synthesis file. folders: run directories of `needs`."""
        where = dict(zip((run.id for run in self.needs), map(str, folders), strict=True))
        update: dict[str, Any] = {"output": str(self.folder / "text")}
        if self.generator is not None:
            update["generator"] = self.settings.generator.model_copy(update={"run": where[self.generator.id]})
        if self.against is not None:
            assert self.settings.decoding is not None and self.settings.decoding.against is not None
            worse = self.settings.decoding.against.model_copy(update={"run": where[self.against.id]})
            update["decoding"] = self.settings.decoding.model_copy(update={"against": worse})
        if self.hardest is not None:
            assert self.settings.hardest is not None
            update["hardest"] = self.settings.hardest.model_copy(update={"run": where[self.hardest.id]})
        return self.settings.model_copy(update=update)

    def describe(self) -> str:
        """In words: which text, by whose model."""
        by = self.settings.generator.model if self.generator is None else self.generator.name
        return f"{self.template.name} {self.template.version} by {by}"


def corpus_of(name: str, source: Generated, seed: int, runs: Sequence[Run | None], folder: Path) -> Corpus:
    """The corpus of a generated source.

    Args:
        name: of the source, for messages.
        source: its settings, with the synthesis file read in.
        seed: of the run that reads it.
        runs: that of the generator, that of the worse model, and that whose losses choose parents.
        folder: of all corpora.

    Raises:
        ConfigError: the synthesis is wrong, in the study's keys.
    """
    generator, against, hardest = runs
    seed = seed if source.seed is None else source.seed
    path = f"generated.{name}"
    problems = [
        Problem(f"{path}.settings.{key}", f"a study decides this by {instead}; remove it")
        for key, instead in (("output", "its folder"), ("seed", f"{path}.seed"))
        if source.settings.get(key) is not None
    ]
    if problems:
        raise ConfigError(path, problems)
    decided: dict[str, Any] = {"output": ".", "seed": seed}
    if generator is not None:
        decided["generator"] = {"api": "completions", "run": _BY_RUN}
    if against is not None:
        decided["decoding"] = {"against": {"api": "completions", "run": _BY_RUN}}
    if hardest is not None:
        decided["hardest"] = {"run": _BY_RUN}
    settings = validate(SynthesisConfig, merge(source.settings, decided), path)
    try:
        template = template_of(settings.kind, settings.template)
    except UserError as error:
        raise ConfigError(path, [Problem(f"{path}.settings", str(error))]) from None
    return Corpus(seed, generator, against, hardest, settings, template, folder, source.tokens)


def corpora_of(runs: Iterable[Run]) -> list[Corpus]:
    """The corpora that the runs read, each once, in the order in which they are needed first."""
    return list({corpus.id: corpus for run in runs for corpus in run.corpora.values()}.values())


def stage_of(job: Run | Corpus) -> int:
    """How many corpora must be made one after the other before a run can be trained or a corpus be made."""
    if isinstance(job, Corpus):
        return max((stage_of(run) for run in job.needs), default=0)
    return max((stage_of(corpus) + 1 for corpus in job.corpora.values()), default=0)


def generating(corpora: Iterable[Corpus]) -> set[str]:
    """Ids of the runs whose models are needed."""
    return {run.id for corpus in corpora for run in corpus.needs}
