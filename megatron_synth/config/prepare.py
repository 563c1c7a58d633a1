"""The file that `megatron-synth prepare` reads: which text becomes which prepared source, and by which tokenizer."""

from __future__ import annotations

import keyword
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_synth.config.section import Amount, PositiveInt, Ratio, Section, Seed

Kind = Literal["natural", "rephrased", "qa", "textbook", "other"]
Split = Literal["train", "validation"]
VALID_SUFFIX = "-valid"
BYTE_ALPHABET = 256


def as_tuple(value: Any) -> Any:
    """A single string as a list of one, for settings that are mostly given one value."""
    return (value,) if isinstance(value, str) else value


MAX_COLUMNS = 64
MAX_CATEGORIES, MAX_CATEGORY_BYTES = 65_536, 1024
ColumnType = Literal["int32", "float32", "category", "host", "id", "parent", "text_id"]
_RESERVED = frozenset(keyword.kwlist)


def column_name(name: str) -> str:
    """`name`, if expressions of `where` can speak of it.

    Raises:
        ValueError: they cannot.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in _RESERVED:
        raise ValueError(f"column {name!r:.80}: use a letter, then letters, digits and `_`, and no word of Python")
    return name


def as_column(value: Any) -> Any:
    """A type alone as a column."""
    return {"type": value} if isinstance(value, str) else value


class ColumnConfig(Section):
    """A value of each document that is kept beside its tokens. In short, its type alone: `score: float32`."""

    type: ColumnType
    """int32 and float32; category, one of at most 65,536 texts; host, the category of a URL's host; id, a text of which a
    number of 64 bits is kept; parent, the id of a document that this one was made from; text_id, the id that `synthesize`
    gives a text as a parent, which takes no field."""
    field: str | None = None
    """Field or column that holds it, such as `url`; `meta.url` and `parents.0` look into objects and lists. Default: the name
    of the column. Documents without it have no value."""


class FimConfig(Section):
    """Fill in the middle: documents cut in three, whose middle comes last, for models that complete code."""

    share: Ratio
    """Of the training documents, such as `1/2`; exact to within one of every 64."""
    spm: Ratio = Fraction(1, 2)
    """Of these, those with the suffix before the prefix (SPM); the others have the prefix first (PSM)."""
    by: Literal["characters", "tokens"] = "characters"
    """What documents are cut between: characters, so that a cut may lie within a word as where code is completed, or tokens."""
    seed: Seed = 0
    """Of which documents are cut, and where."""
    prefix: str = "<|fim_prefix|>"
    """Special token of the tokenizer before the prefix."""
    suffix: str = "<|fim_suffix|>"
    """Before the suffix."""
    middle: str = "<|fim_middle|>"
    """Before the middle."""

    @model_validator(mode="after")
    def _check(self) -> FimConfig:
        if len({self.prefix, self.suffix, self.middle}) < 3:
            raise ValueError("prefix, suffix and middle need a token each")
        return self


class PromptConfig(Section):
    """What comes before the text of a record, and is read but not learned. In short, its field alone: `prompt: question`."""

    field: str
    """Field or column of the prompt; a record without it is text, all of which is learned."""
    before: str = ""
    """Text before it, such as `"Question: "`; not learned."""
    after: str = ""
    """Text between it and the answer, such as `"\\nAnswer: "`; not learned."""


PLAIN_TURNS = {"system": ("", "\n\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "\n")}


class MessagesConfig(Section):
    """Records that are chats. In short, their field alone: `messages: messages`."""

    field: str = "messages"
    """Field or column with the list of `{"role": ..., "content": ...}`; one without it is text, all of which is learned."""
    learned: tuple[str, ...] = Field(("assistant",), min_length=1)
    """Roles whose messages are learned, with what ends them; those of the others are read."""
    turns: dict[str, tuple[str, str]] | None = Field(None, min_length=1)
    """A plain template: by role what stands before a message, which is not learned, and after it. Default: the chat template of
    the tokenizer; of one that has none `User: ` and `Assistant: ` before, and the end of the line after."""
    jinja: str | None = None
    """A chat template in Jinja, in place of the tokenizer's."""
    tokens: dict[str, str] = {}
    """Special tokens by the names that the template has for them, such as bos_token. Default: the tokenizer's."""
    special: tuple[str, ...] = ()
    """Texts that no message may hold, as the template's tokens are spelled so. Default: the tokenizer's special tokens."""

    @model_validator(mode="after")
    def _check(self) -> MessagesConfig:
        if self.turns is not None and self.jinja is not None:
            raise ValueError("one template is enough: drop one of turns and jinja")
        unknown = [role for role in self.learned if self.turns is not None and role not in self.turns]
        if unknown:
            raise ValueError(f"learned: {unknown[0]!r} is no role of turns, which has {', '.join(self.turns or ())}")
        return self


def as_field(value: Any) -> Any:
    """The name of a field alone as settings."""
    return {"field": value} if isinstance(value, str) else value


class HubInput(Section):
    """A data set of the `datasets` library."""

    path: str
    """A folder written by `save_to_disk`, or a name on the Hugging Face Hub, which is streamed."""
    subset: str | None = None
    """Configuration of the data set (Hub only)."""
    split: str = "train"
    """Split to read; ignored for a folder that holds a single split."""
    revision: str | None = None
    """Branch, tag or commit (Hub only). Name a commit to be sure of the same text next time."""


class PrepareSource(Section):
    """One source. Give exactly one of `input`, `hf`, `builtin` and `synthesized`."""

    kind: Kind
    """What the text is."""
    generator: str | None = None
    """What wrote it: a model's name, `rule`; none for natural text."""
    input: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = None
    """Files or globs, read in sorted order: .txt, .jsonl (both also .gz and .zst), .parquet."""
    hf: HubInput | None = None
    """A data set of the `datasets` library."""
    builtin: Literal["natural", "qa", "unseen"] | None = None
    """Text of Python 3.11.7's standard library, which comes with the program: for trying things out without any data."""
    synthesized: str | None = None
    """The output of `megatron-synth synthesize`. Its record goes into the manifest, and its generator is that of the source."""
    text_key: str = "text"
    """Field or column that holds the text (.jsonl, .parquet, hf)."""
    columns: dict[Annotated[str, AfterValidator(column_name)], Annotated[ColumnConfig, BeforeValidator(as_column)]] = Field(
        {}, max_length=MAX_COLUMNS
    )
    """Values of each document that are kept beside its tokens, by name: what `where` of a training source chooses by."""
    prompt: Annotated[PromptConfig | None, BeforeValidator(as_field)] = None
    """What is read before the text of each record and is not learned (.jsonl, .parquet, hf)."""
    messages: Annotated[MessagesConfig | None, BeforeValidator(as_field)] = None
    """Records are chats, of which some roles are learned (.jsonl, .parquet, hf)."""
    text_as: Literal["file", "line"] = "file"
    """.txt: a document is the whole file, or one line."""
    fim: FimConfig | None = None
    """Fill in the middle. What the source holds out for validation is left as it is."""
    split: Split = "train"
    """What the source is for."""
    holdout: Ratio | None = None
    """Share of the documents, such as `1/50`, chosen by their hash, that goes to a second source `<name>-valid`."""
    max_bytes: Amount | None = None
    """Stop reading once this many bytes of text were read."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a record does that is no text (broken JSON, not UTF-8, no such field, null): end the run, or be left out, counted
    and listed in `skipped.txt` of the source."""
    max_errors: PositiveInt = 1000
    """With `on_error: skip`: records that may be left out; one more ends the run."""

    @model_validator(mode="after")
    def _check(self) -> PrepareSource:
        given = [key for key in ("input", "hf", "builtin", "synthesized") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of input, hf, builtin and synthesized, found {' and '.join(given) or 'none'}")
        named = [name for name, column in self.columns.items() if column.type == "text_id" and column.field is not None]
        if named:
            raise ValueError(f"columns.{named[0]}.field: type text_id is made from the text itself; leave the field out")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("a record is an answer to a prompt or a chat: drop one of `prompt` and `messages`")
        if self.masked and self.input is None and self.hf is None:
            raise ValueError("`prompt` and `messages` are of records: give them as input or hf")
        if self.masked and self.fim is not None:
            raise ValueError("a document that is cut has no prompt: drop one of `fim` and `prompt` or `messages`")
        if self.input == ():
            raise ValueError("input names no file")
        if self.holdout is not None and self.split == "validation":
            raise ValueError("a validation source has no holdout: drop one of `holdout` and `split: validation`")
        if self.fim is not None and self.split == "validation":
            raise ValueError("text for validation is not cut: drop one of `fim` and `split: validation`")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, got {self.holdout}; leave it out for none")
        return self

    @property
    def masked(self) -> bool:
        """Whether parts of its documents are read and not learned."""
        return self.prompt is not None or self.messages is not None

    @property
    def main_key(self) -> str:
        """The field that makes a record a document."""
        return self.text_key if self.messages is None else self.messages.field


class TrainTokenizer(Section):
    """Train a byte-level BPE on the training split of the sources."""

    vocab_size: Annotated[int, Field(gt=BYTE_ALPHABET, le=2**24)]
    """Tokens at most: the 256 bytes, the end-of-document token, and merges."""
    sources: tuple[str, ...] = ()
    """Sources to train on. Default: all whose split is train."""
    max_bytes: Amount = 2**30
    """Text to train on at most, an equal part of it from the start of each source."""


class TokenizerConfig(Section):
    """The tokenizer. Give exactly one of `path`, `name` and `train`."""

    path: str | None = None
    """A tokenizer.json."""
    name: str | None = None
    """A model on the Hugging Face Hub whose tokenizer.json to use."""
    train: TrainTokenizer | None = None
    """Train one."""
    eod: str = "<|endoftext|>"
    """The token that ends each document; it must be in the vocabulary of a given tokenizer."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        given = [key for key in ("path", "name", "train") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, name and train, found {' and '.join(given) or 'none'}")
        if not self.eod:
            raise ValueError("eod is empty: name the token that ends a document")
        return self


class Shuffle(Section):
    """The order of the documents within each source: at random, all of them."""

    seed: Seed


class Packing(Section):
    """Documents of training sources are put into windows whole, best fit first, where they fit in one."""

    sequence_length: PositiveInt
    """Tokens of a window: the train.sequence_length of the runs that will read the sources."""


class PrepareConfig(Section):
    """What to prepare. Paths are relative to the working directory."""

    output: str
    """Folder to make: tokenizer.json and one folder per prepared source."""
    tokenizer: TokenizerConfig
    """The tokenizer of all sources."""
    sources: dict[str, PrepareSource] = Field(min_length=1)
    """Sources by name, which is also the name of the folder."""
    shard_tokens: Amount = 2**30
    """Tokens per shard at most; a longer document gets a shard of its own."""
    shuffle: Shuffle | None = None
    """Shuffle the documents of each source; none keeps the order of the input. Needs disk space for the tokens twice."""
    packing: Packing | None = None
    """Cut fewer documents at the ends of windows; none lays them end to end. For one sequence length."""
    dtype: Literal["auto", "uint16", "int32"] = "auto"
    """Type of stored tokens. auto: uint16 for vocabularies below 65500, as Megatron does, else int32."""

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("tokenizer.json", "prepare.json"):
                raise ValueError(f"source name {name!r}: use letters, digits, `.`, `_` and `-`, as in a folder's name")
            if source.holdout is not None and name + VALID_SUFFIX in self.sources:
                raise ValueError(f"source {name + VALID_SUFFIX!r} has the name that the holdout of {name!r} gets")
        cut = [name for name, source in self.sources.items() if source.fim is not None]
        if cut and self.tokenizer.train is not None:
            raise ValueError(f"sources.{cut[0]}.fim: a tokenizer that is trained has no tokens for it; give one as path")
        if self.tokenizer.train is not None:
            training = [name for name, source in self.sources.items() if source.split == "train"]
            unknown = [name for name in self.tokenizer.train.sources if name not in training]
            if unknown:
                raise ValueError(f"tokenizer.train.sources: {unknown} not among the training sources {training}")
            if not training:
                raise ValueError("tokenizer.train needs a source whose split is train")
        return self
