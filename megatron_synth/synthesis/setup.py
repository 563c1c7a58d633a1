"""A synthesis made ready: settings, template, generator, parents and engine, checked before any long work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.log import show
from megatron_synth.synthesis.documents.chunks import Chunk, Skipped, chunks
from megatron_synth.synthesis.documents.counting import TokenCounter, TokenizerCounter
from megatron_synth.synthesis.documents.parents import Parent, Parents
from megatron_synth.synthesis.engines.base import Engine
from megatron_synth.synthesis.generator import Generator, generator_of
from megatron_synth.synthesis.kinds.keywords import Keywords
from megatron_synth.synthesis.kinds.template import Template, template_of
from megatron_synth.synthesis.recombined import walk_chunks
from megatron_synth.synthesis.requests import Asking, Request, Wording, constant_part, requests
from megatron_synth.synthesis.selection.hardest import hardest
from megatron_synth.synthesis.shares import Share
from megatron_synth.synthesis.synthesis_file import SynthesisConfig

ANSWERS = "answers"
LOG = "vllm.log"
AGAINST = "against"
CHAT_TOKENS = 64
"""What a chat template adds to a prompt at most, with some room."""


@dataclass
class Counted:
    """What was counted on the way from documents to requests."""

    documents: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    asking: Asking = field(default_factory=Asking)


@dataclass(frozen=True)
class Setup:
    """A synthesis file with what it names."""

    config: SynthesisConfig
    template: Template
    generator: Generator
    parents: Parents
    counter: TokenCounter
    against: Generator | None = None
    """The worse model of contrastive decoding."""
    study_counter: TokenCounter | None = None
    """Counts as the models that are trained on the text do; None where that is not known."""

    @classmethod
    def of(cls, config: SynthesisConfig, *, export: bool) -> Setup:
        """Look up what the file names. export: of a run, write its weights.

        Raises:
            UserError: something is missing or does not fit.
        """
        template = template_of(config.kind, config.template)
        if config.filters.choice is not None and template.reassemble and config.missing_chunks == "drop":
            raise UserError(
                f"filters.choice: chooses answers, and template {template.name} makes documents of several: one that is left "
                f"out would take all with it; set missing_chunks to join, or take a kind that asks once for a document"
            )
        if (config.walks is not None) != (template.made_from == "concepts"):
            raise UserError(
                f"walks: template {template.name} is made from {template.made_from}; those made from concepts, such as "
                f"`kind: recombined`, need `walks`, and no others have them"
            )
        parents = Parents(config.parents)
        parents.check()
        if config.hardest is not None:
            parents = hardest(config.hardest, config.engine, parents, config.folder, evaluate=export)
        if export and config.generator.run is not None:  # refused before the weights are written
            known = generator_of(config.generator, config.folder, export=False)
            cls(config, template, known, parents, known.counter()).check_known_context()
        generator = generator_of(config.generator, config.folder, export=export)
        against = None
        if config.decoding is not None and config.decoding.against is not None:
            against = generator_of(config.decoding.against, config.folder / AGAINST, export=export)
        study = None
        if config.study_tokenizer is not None:
            if not Path(config.study_tokenizer).is_file():
                raise UserError(f"study_tokenizer: {config.study_tokenizer}: no such file")
            study = TokenizerCounter(Path(config.study_tokenizer))
        return cls(config, template, generator, parents, generator.counter(), against, study)

    def corpus_counters(self) -> dict[str, TokenCounter]:
        """Whose tokens of the corpus are counted: those of tokenizers that are here, by whose they are."""
        found = {"generator": self.counter} if self.counter.exact else {}
        return found if self.study_counter is None else {**found, "study": self.study_counter}

    @cached_property
    def wording(self) -> Wording:
        """How prompts are made. Templates from keywords read all parents once, to count words."""
        keywords = None
        if self.template.made_from == "keywords":
            keywords = Keywords(parent.text for parent in self.parents)
        special = self.counter.special if isinstance(self.counter, TokenizerCounter) else ()
        return Wording(self.template, self.config.generator.api, special, keywords)

    def requests(self, counted: Counted, share: Share | None = None) -> Iterator[Request]:
        """All requests in order, the same each time; with a share those of its parents. Parents of others are not counted."""
        config = self.config

        def count() -> None:
            counted.documents += 1

        def documents() -> Iterator[Parent]:
            for parent in self.parents:
                count()
                yield parent

        wanted = (lambda parent: True) if share is None else share.has_parent
        if config.walks is not None:
            walks = walk_chunks(config, self.template, self.counter, self.parents, count)
            found: Iterator[Chunk] = (chunk for chunk in walks if wanted(chunk.parents[0].id))
        else:
            found = chunks(documents(), self.template, self.counter, counted.skipped, wanted)
        identity = {**self.generator.identity(), **self._decoding()}
        return requests(found, self.wording, identity, config.sampling, config.seed, config.per_parent, counted.asking)

    def _decoding(self) -> dict[str, Any]:
        """What a request's key, and the record, hold of decoding by probabilities; nothing without it."""
        if self.config.decoding is None:
            return {}
        settings = self.config.decoding.model_dump(mode="json", exclude={"against"})
        against = {} if self.against is None else {"against": self.against.identity()}
        return {"decoding": {**settings, **against}}

    @property
    def parameters(self) -> int | None:
        """Those that a token is computed with: of both models of contrastive decoding."""
        models = [self.generator, *([] if self.against is None else [self.against])]
        counts = [model.parameters for model in models if model.parameters is not None]
        return sum(counts) if len(counts) == len(models) else None

    def prompt_tokens(self, request: Request) -> int:
        """About as many as the generator reads for a request."""
        (count,) = self.counter.count([request.prompt.characters()])
        return count + (CHAT_TOKENS if request.prompt.messages else 0)

    def constant_tokens(self) -> int:
        """About as many as all prompts begin with, which a server with a prefix cache reads once."""
        (count,) = self.counter.count([constant_part(self.template)])
        return count

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that the template can make."""
        (words,) = self.counter.count([self.wording.prompt(("", "")).characters()])
        room = CHAT_TOKENS if self.config.generator.api == "chat" else 8
        template, walks = self.template, self.config.walks
        of_slot = {
            "text": template.parent_tokens,
            "keywords": 16 * template.keywords,
            "concepts": 0 if walks is None else walks.parents * (template.parent_tokens + words) + 16 * walks.length,
        }[template.made_from]
        return words + of_slot + room

    def check_context(self, context: int | None) -> None:
        """Refuse a model whose context does not hold prompt and answer.

        Raises:
            UserError: it does not.
        """
        longest, answer = self.longest_prompt(), self.config.sampling.max_tokens
        if context is not None and longest + answer > context:
            about = "" if self.counter.exact else "about "
            raise UserError(
                f"generator: its context has {context} tokens, prompts have up to {about}{longest} and answers up to {answer}; "
                f"lower parent_tokens of the template (copy its file, and name the copy as `template:`) or "
                f"sampling.max_tokens, or take a model of a longer context"
            )

    def check_known_context(self) -> None:
        """The same for a model in this process, by what is known without loading it.

        Raises:
            UserError: its context is too short.
        """
        if self.config.engine.name == "transformers" and self.config.decoding is None:
            self.check_context(self.generator.context)

    def check_key(self) -> None:
        """Look for the key of the servers, where one is needed.

        Raises:
            UserError: it is not there.
        """
        from megatron_synth.synthesis.engines.openai import key_of

        key_of(self.config.engine)

    def engine(self, folder: Path) -> Engine:
        """The engine of the file, not started. folder: for the log of a server that is started."""
        from megatron_synth.synthesis.engines.protocol import Shape

        config, generator, settings = self.config, self.generator, self.config.engine
        if config.decoding is not None:
            from megatron_synth.synthesis.decoding.engine import DecodingEngine

            against = None if self.against is None else self.against.model
            return DecodingEngine(generator.model, against, config.decoding, settings, config.sampling)
        if settings.name == "transformers":
            from megatron_synth.synthesis.engines.embedded import Embedded

            return Embedded(generator.model, generator.revision, settings, config.sampling, self.template.stop)
        shape = Shape(generator.model, config.generator.api, config.sampling, self.template.stop)
        if settings.name == "vllm":
            from megatron_synth.synthesis.engines.vllm import Vllm

            return Vllm(generator.model, generator.revision, settings, shape, folder / LOG)
        from megatron_synth.synthesis.engines.openai import HttpEngine, key_of

        return HttpEngine(shape, settings, settings.servers, key_of(settings))

    @property
    def group(self) -> int:
        """Requests that the engine must be given together, for an answer to be the same to the last bit."""
        return self.config.engine.batch_size if self.config.engine.name == "transformers" else 1

    @property
    def answers(self) -> Path:
        """The folder of raw answers."""
        return self.config.folder / ANSWERS

    def warn(self) -> None:
        """Say what is likely a mistake."""
        if not self.counter.exact:
            show(
                "note: prompts are counted by their bytes; set generator.tokenizer to a tokenizer.json to count tokens",
                error=True,
            )

    def about_generator(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What a record says of it."""
        return {
            **self.generator.identity(),
            "parameters": self.generator.parameters,
            "license": self.generator.license,
            **self._decoding(),
            **facts,
        }
