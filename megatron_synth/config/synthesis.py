"""The file that `megatron-synth synthesize` reads: which documents become which synthetic text, by which generator."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from megatron_synth.config.prepare import HubInput, PrepareSource, as_tuple
from megatron_synth.config.section import Amount, NonNegativeInt, PositiveInt, Ratio, Section, Seed

MAX_TEMPERATURE = 10.0
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ParentsConfig(Section):
    """Natural documents, read as `prepare` reads them. Give exactly one of `input`, `hf` and `builtin`."""

    input: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = None
    """Files or globs, read in sorted order: .txt, .jsonl (both also .gz and .zst), .parquet."""
    hf: HubInput | None = None
    """A data set of the `datasets` library."""
    builtin: Literal["natural", "qa", "unseen"] | None = None
    """Text that comes with the program."""
    text_key: str = "text"
    """Field or column that holds the text (.jsonl, .parquet, hf)."""
    text_as: Literal["file", "line"] = "file"
    """.txt: a document is the whole file, or one line."""
    holdout: Ratio | None = None
    """The share that `prepare` holds out of this text for validation: those documents are no parents. Give the same here
    as there, or validation text is rephrased into training text."""
    max_bytes: Amount | None = None
    """Stop reading once this many bytes of text were read."""
    max_documents: PositiveInt | None = None
    """Parents at most: the first ones."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a record that is no text does: end the run, or be left out."""
    max_errors: PositiveInt = 1000
    """With `on_error: skip`: records that may be left out; one more ends the run."""

    @model_validator(mode="after")
    def _check(self) -> ParentsConfig:
        self.as_source()
        return self

    def as_source(self) -> PrepareSource:
        """The same, as `prepare` knows it."""
        names = ("input", "hf", "builtin", "text_key", "text_as", "holdout", "max_bytes", "on_error", "max_errors")
        return PrepareSource(kind="natural", **{name: getattr(self, name) for name in names})


class GeneratorConfig(Section):
    """What writes the text. Give exactly one of `model` and `run`."""

    model: Annotated[str, Field(max_length=4096)] | None = None
    """A folder in Hugging Face's format, a name on its Hub, or the name that a server gives its model."""
    run: str | None = None
    """A run directory, or a checkpoint: it is exported to the output's folder `generator` and used from there."""
    revision: str | None = None
    """Branch, tag or commit (Hub only)."""
    api: Literal["chat", "completions"] = "chat"
    """chat: for models that follow instructions and have a chat template. completions: for base models."""
    tokenizer: str | None = None
    """A tokenizer.json to count prompts by. Default: that of the model's folder; without one, four bytes count as a token."""
    parameters: Amount | None = None
    """Parameters of a model behind a server, for FLOPs. Counted where the model is a folder."""
    license: Annotated[str, Field(max_length=200)] | None = None
    """The generator's license, such as llama3.1, for the manifest. Default: what a README.md in its folder says."""
    tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Tokens that one device writes a second, for `plan`. Default: what was published for models of about its size."""

    @model_validator(mode="after")
    def _check(self) -> GeneratorConfig:
        given = [key for key in ("model", "run") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model and run, found {' and '.join(given) or 'none'}")
        return self


class EngineConfig(Section):
    """What runs the generator."""

    name: Literal["transformers", "openai", "vllm"] = "transformers"
    """transformers: in this process. openai: servers with the OpenAI API. vllm: a server that is started here."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """transformers: requests at a time."""
    device: str = "auto"
    """transformers: cpu, cuda, or auto for a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """transformers: type of the weights; auto takes the one that they are stored in."""
    servers: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """openai: addresses, such as http://node1:8000/v1."""
    key_variable: str | None = None
    """openai: the environment variable that holds the key. A key stands in no file."""
    concurrency: Annotated[int, Field(ge=1, le=65_536)] = 64
    """openai, vllm: requests in flight at each server at most; fewer where the server's queue grows or it says 429."""
    queue: PositiveInt = 8
    """openai, vllm: requests that may wait in a server's own queue, where it tells (/metrics of vLLM)."""
    timeout_s: Seconds = 600.0
    """openai, vllm: for one answer."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 6
    """openai, vllm: times that a request is sent before it stays unanswered in this run."""
    backoff_s: Seconds = 0.5
    """openai, vllm: pause before the second attempt; doubled for each further one, up to a minute."""
    breaker: PositiveInt = 16
    """openai, vllm: failures in a row after which a server gets no requests until it answers a probe."""
    patience_s: Seconds = 120.0
    """openai, vllm: how long no server may answer, before the run ends with exit code 75."""
    tensor_parallel_size: PositiveInt = 1
    """vllm: GPUs that share the model."""
    copies: Annotated[int, Field(ge=1, le=64)] = 1
    """vllm: servers that are started on a machine, each with `tensor_parallel_size` GPUs of its own."""
    arguments: tuple[str, ...] = ()
    """vllm: more arguments of `vllm serve`."""
    startup_s: Seconds = 1800.0
    """vllm: how long its server may take to load the model."""
    restarts: NonNegativeInt = 5
    """vllm: times that a server that has died is started again."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.name == "openai" and not self.servers:
            raise ValueError("servers: name at least one, such as http://node1:8000/v1")
        if self.name != "openai" and self.servers:
            raise ValueError(f"servers are for `name: openai`, found `name: {self.name}`")
        ours = ("--api-key", "--host", "--port", "--served-model-name", "--uds")
        if wrong := [one for one in self.arguments if one.partition("=")[0] in ours]:
            raise ValueError(
                f"arguments: {wrong[0].partition('=')[0]} is set here: a server listens on the loopback, with a key that is "
                f"made for it and stands in no list of processes"
            )
        for server in self.servers:
            if not _is_address(server):
                raise ValueError(
                    f"servers: expected http://HOST:PORT or https://..., without a user or key, got {server!r:.80}"
                )
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ValueError("key_variable: expected the name of an environment variable; the key itself stands in no file")
        return self


def _is_address(server: str) -> bool:
    """Whether it is http:// or https://, with a host, without a user, a key or a query, in characters that a head can carry."""
    if not re.fullmatch(r"https?://[!-~]+", server) or set(server) & set("@?#\\"):
        return False
    try:
        parts = urlsplit(server)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


class SamplingConfig(Section):
    """How tokens are drawn."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 0.7
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Only the most likely tokens that together have this probability."""
    top_k: NonNegativeInt = 0
    """Only so many of the most likely tokens; 0 for all."""
    max_tokens: PositiveInt = 512
    """Tokens of an answer at most. One that reaches it is cut, and rejected as such."""


DECODED = {"token-editing": "token-editing", "continuation": "contrastive"}
"""Kinds that are made from a model's probabilities, and how."""


class DecodingConfig(Section):
    """How text is made from a model's probabilities, in this process; the kinds `token-editing` and `continuation` need it."""

    method: Literal["token-editing", "contrastive"]
    """token-editing: tokens of a natural text that the generator is sure of are drawn anew. contrastive: prefixes are continued
    by what the generator says and a worse model does not."""
    p: Annotated[float, Field(gt=0, le=2)] = 0.99
    """token-editing: probability from which on a token is drawn anew. Above 1 nothing is edited."""
    against: GeneratorConfig | None = None
    """contrastive: the worse model, a smaller one or an earlier checkpoint, of the same tokenizer: `model` or `run`."""
    strength: Annotated[float, Field(ge=0, le=100)] = 1.0
    """contrastive: lambda in log p_good - lambda log p_bad. 0 is plain sampling from the generator."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    """contrastive: only tokens with this share of the best one's probability."""

    @model_validator(mode="after")
    def _check(self) -> DecodingConfig:
        if (self.against is not None) != (self.method == "contrastive"):
            raise ValueError("against: name the worse model with `method: contrastive`, and only there")
        return self


class WalksConfig(Section):
    """Walks over concepts that documents have in common; the kind `recombined` makes a text about each."""

    count: PositiveInt
    """How many walks."""
    length: Annotated[int, Field(ge=2, le=20)] = 4
    """Concepts of a walk at most."""
    parents: Annotated[int, Field(ge=1, le=8)] = 3
    """Documents at most whose passages are shown with them."""
    concepts: Literal["generator", "keywords"] = "generator"
    """generator: it lists those of each document, in a synthesis of its own. keywords: words of the document, drawn as those of
    `textbook`: for models that follow no instructions, and to see what the lists add. They cost no request."""


class HardestConfig(Section):
    """Only parents on which a model is weakest (S3, arXiv 2310.13671): those with the highest mean loss of a token."""

    run: str | None = None
    """A run directory or a checkpoint, which is exported to the output's folder `hardest`."""
    model: str | None = None
    """Or a folder in Hugging Face's format."""
    count: PositiveInt
    """Parents that are kept; they stay in their order."""
    min_tokens: PositiveInt = 32
    """Shorter documents are left out, as their means scatter."""

    @model_validator(mode="after")
    def _check(self) -> HardestConfig:
        if (self.run is None) == (self.model is None):
            raise ValueError("give exactly one of run and model")
        return self


class SynthesisSettings(Section):
    """What to make. Paths are relative to the working directory."""

    output: str
    """Folder for answers, corpus, account and report. A run that is there already goes on."""
    kind: str | None = None
    """A kind that comes with the program: hq-rephrase, qa-rephrase, textbook, recombined, token-editing, continuation."""
    template: str | None = None
    """Or a template file of your own; copy one of megatron_synth/synthesis/kinds/templates."""
    parents: dict[str, ParentsConfig] = Field(min_length=1)
    """Natural documents by a name, in this order."""
    hardest: HardestConfig | None = None
    """Of these, only those on which a run is weakest. Default: all."""
    generator: GeneratorConfig
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig | None = None
    """Text from probabilities: token editing or contrastive decoding, for the kinds of these names."""
    walks: WalksConfig | None = None
    """For `recombined`, and templates that are made from concepts."""
    study_tokenizer: str | None = None
    """The tokenizer.json of the models that are trained on the text: plan, record, status and report then count by it, too."""
    seed: Seed = 1
    """Each request has a seed of its own, made from this one and from what it asks."""
    per_parent: PositiveInt = 1
    """Texts of each parent, with different seeds."""
    missing_chunks: Literal["drop", "join"] = "drop"
    """A long document of which a chunk was rejected: drop all of it, or join what is left."""
    max_unanswered: NonNegativeInt = 0
    """Requests that may stay without an answer when the corpus is made."""

    @model_validator(mode="after")
    def _check_kind(self) -> SynthesisSettings:
        given = [key for key in ("kind", "template") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of kind and template, found {' and '.join(given) or 'none'}")
        for name in self.parents:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"parents: name {name!r}: use letters, digits, `.`, `_` and `-`")
        if self.decoding is not None:
            self._check_decoding(self.decoding)
        elif self.kind in DECODED:
            raise ValueError(f"kind {self.kind}: needs `decoding`, with `method: {DECODED[self.kind]}`")
        if self.sampling.temperature == 0 and self.per_parent > 1:
            raise ValueError("per_parent: texts of one parent are all equal at temperature 0; set per_parent to 1")
        return self

    def _check_decoding(self, decoding: DecodingConfig) -> None:
        if self.engine.name != "transformers" or self.generator.api != "completions":
            raise ValueError("decoding: needs `engine.name: transformers` and `generator.api: completions`")
        if self.sampling.temperature != 1 or self.sampling.top_p != 1:
            raise ValueError("decoding: takes probabilities as they are: set sampling.temperature and sampling.top_p to 1")
        if decoding.method == "contrastive" and self.sampling.top_k:
            raise ValueError("decoding: contrastive decoding has its own choice of plausible tokens: set sampling.top_k to 0")
        if self.kind is not None and DECODED.get(self.kind) != decoding.method:
            kind = next(name for name, method in DECODED.items() if method == decoding.method)
            raise ValueError(f"decoding: `method: {decoding.method}` is for `kind: {kind}`, found {self.kind!r}")
