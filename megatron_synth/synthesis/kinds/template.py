"""Templates: how a request is worded. A template is a YAML file with a name, a version and a digest; users copy and change it.

A template is text from outside: it is rendered in a sandbox, knows only its slots, can read no file, and has no construct that
takes more time than its text. The constant part stands first, in `system`, so that a server's prefix cache is of use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_synth.config import yaml12
from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.load import resolve
from megatron_synth.config.section import NonNegativeInt, PositiveInt, Section
from megatron_synth.config.validation import suggest, validate
from megatron_synth.core.records import read_text
from megatron_synth.data.shards.manifest import canonical_digest

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import Template as Compiled

SHIPPED = Path(__file__).parent / "templates"
SLOTS: dict[str, frozenset[str]] = {
    "text": frozenset({"text"}),
    "keywords": frozenset({"keywords"}),
    "concepts": frozenset({"concepts", "passages"}),
}
"""What a template is made from -> the slots that it may have; the one of the same name it must have."""

LISTS = frozenset({"keywords", "passages"})
"""The slots that are lists."""
FILTERS = frozenset({"capitalize", "count", "first", "last", "length", "lower", "title", "trim", "upper", "wordcount"})
LOOP = frozenset({"first", "index", "index0", "last", "length"})
"""Attributes of `loop` within a `for`."""
MAX_CHARACTERS = 2**24
"""Of a prompt."""

Shown = Annotated[str, Field(min_length=1, max_length=100_000)]


class Template(Section):
    """One way to ask for a text."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
    """What it is called in manifests and tables."""
    version: PositiveInt
    """Goes up with each change of a template that others have used."""
    origin: str
    """Where the wording comes from."""
    source_kind: Literal["rephrased", "qa", "textbook", "other"]
    """The `kind` that the text has as a source of `prepare`."""
    made_from: Literal["text", "keywords", "concepts"] = "text"
    """text: slot `text`, a chunk of a document. keywords: slot `keywords`, words drawn from a document. concepts: slot
    `concepts`, those of a walk over several documents in one string, and slot `passages`, a list of one from each."""
    keywords: Annotated[int, Field(ge=1, le=100)] = 6
    """Words drawn for a request."""
    parent_tokens: Annotated[int, Field(ge=8, le=2**20)] = 400
    """A document is cut at paragraphs into chunks of so many tokens at most; from concepts: tokens of a passage."""
    min_parent_tokens: NonNegativeInt = 0
    """A document of fewer tokens is short."""
    short: Literal["skip", "join"] = "skip"
    """Short documents are left out, or joined with the next short ones until they are long enough."""
    reassemble: bool = True
    """Whether texts of a document's chunks become one document again."""
    expected_output: Annotated[float, Field(gt=0, le=2**20)] = 1.0
    """Tokens of an answer for each of the chunk, or, from keywords, tokens of an answer. Only `plan` uses it."""
    reserved: tuple[Annotated[str, Field(min_length=2, max_length=100)], ...] = ()
    """Marks around the slot, which the text in it must not spell: they are broken up there as special tokens are."""
    system: str = ""
    """The constant part: the system message of a chat."""
    prompt: Shown
    """Jinja: the user's message, with the slot."""
    answer: str = ""
    """api completions only: what stands before the answer, as a base model continues a text."""
    keep_answer: bool = False
    """Whether `answer` is the beginning of the text, too."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=4)] = ()
    """An answer ends before these; servers take up to four."""

    @model_validator(mode="after")
    def _check(self) -> Template:
        if self.made_from != "text" and (self.short == "join" or self.reassemble):
            raise ValueError(
                f"a template made from {self.made_from} asks once for a document: set `short: skip` and `reassemble: false`"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return canonical_digest(self.model_dump(mode="json"))

    def beginning(self, api: str) -> str:
        """What stands before an answer in the text: what the prompt has of it already."""
        return self.answer.rstrip() if api == "completions" and self.keep_answer else ""

    def render(self, slots: Mapping[str, str | Sequence[str]]) -> str:
        """The user's message.

        Raises:
            UserError: the template fails, asks for what the sandbox forbids, or makes gigantic prompts.
        """
        from jinja2 import TemplateError

        parts: list[str] = []
        size = 0
        try:
            for part in _compiled(self.prompt).generate(slots):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS:
                    raise UserError(f"template {self.name}: prompt: makes more than {MAX_CHARACTERS:,} characters; shorten it")
            return "".join(parts)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
            raise UserError(f"template {self.name}: prompt: cannot be rendered: {error}; correct the template") from None


@dataclass(frozen=True)
class Kinds:
    """Templates that come with the program."""

    folder: Path = SHIPPED

    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(file.stem for file in self.folder.glob("*.yaml"))

    def load(self, name: str) -> Template:
        """One of them; a UserError where there is none of that name."""
        if name not in self.names():
            hint = suggest(name, self.names()) or f"; one of: {', '.join(self.names())}"
            raise UserError(f"kind: there is no kind {name!r}{hint}, or name a file of your own with `template:`")
        return load_template(self.folder / f"{name}.yaml")


def load_template(file: Path) -> Template:
    """Read and check a template.

    Raises:
        UserError: it cannot be read, is no template, or lacks its slot.
    """
    try:
        content = read_text(file, yaml12.MAX_BYTES)
    except UserError as error:
        raise UserError(f"template: {error}") from None
    template = validate(Template, yaml12.parse(content.replace("\r\n", "\n"), str(file)), str(file))
    _check_slots(template, file)
    return template


def _check_slots(template: Template, file: Path) -> None:
    from jinja2 import TemplateError, meta

    try:
        # before it is compiled: constants are worked out then, and 9 ** 9 ** 9 takes for ever
        tree = _environment().parse(template.prompt)
        if (problem := _forbidden(tree)) is not None:
            raise ConfigError(str(file), [problem])
        found = meta.find_undeclared_variables(tree)
        _environment().from_string(template.prompt)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        at = "" if line is None else f", line {line} of it"
        raise ConfigError(str(file), [Problem("prompt", f"not a Jinja template: {error.message}{at}")]) from None
    slot = template.made_from
    problems = [
        Problem("prompt", f"unknown slot {{{{ {name} }}}}; a template made from {slot} has {{{{ {slot} }}}}")
        for name in sorted(found - SLOTS[slot])
    ]
    if slot not in found:
        problems.append(Problem("prompt", f"has no slot: write {{{{ {slot} }}}} where the parent's {slot} is to stand"))
    if "{{" in template.system or "{%" in template.system:
        problems.append(Problem("system", "is the constant part and has no slots; put them into prompt"))
    if problems:
        raise ConfigError(str(file), problems)


def _forbidden(tree: Any) -> Problem | None:
    """The first thing in a prompt that is none of slots, text, `if`, filters and one loop over a list; None: there is none.

    All else, such as loops in loops and arithmetic, can take any time and memory.
    """
    from jinja2 import TemplateSyntaxError, nodes

    plain = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If, nodes.CondExpr)
    logic = (nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)
    loops = 0
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        waiting += node.iter_child_nodes()
        if isinstance(node, nodes.For):
            loops += 1
            fits = loops == 1 and isinstance(node.iter, nodes.Name) and node.iter.name in LISTS and not node.recursive
        elif isinstance(node, nodes.Filter):
            over_a_list = isinstance(node.node, nodes.Name) and node.node.name in LISTS
            fits = node.name in FILTERS or (node.name == "join" and over_a_list)
            if not fits and node.name not in _environment().filters:
                raise TemplateSyntaxError(f"no filter named {node.name!r}", node.lineno)
        elif isinstance(node, nodes.Getitem):
            fits = isinstance(node.node, nodes.Name) and isinstance(node.arg, nodes.Const)
        elif isinstance(node, nodes.Getattr):
            fits = isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in LOOP
        else:
            fits = isinstance(node, (*plain, *logic))
        if not fits:
            what = f"the filter {node.name}" if isinstance(node, nodes.Filter) else type(node).__name__
            expected = f"`if`, one `for` over keywords or passages, their `join`, and the filters {', '.join(sorted(FILTERS))}"
            return Problem("prompt", f"line {node.lineno}: {what} is not allowed; a prompt has text, slots, {expected}")
    return None


@cache
def _compiled(prompt: str) -> Compiled:
    return _environment().from_string(prompt)


def _environment() -> Environment:
    """A sandbox without globals and without a way to other files."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=False)
    environment.globals.clear()
    return environment


def template_of(kind: str | None, file: str | None) -> Template:
    """The template that a file names: a kind that comes with the program, or a file of the user's."""
    if kind is not None:
        return Kinds().load(kind)
    assert file is not None
    return load_template(resolve(file))


def as_json(template: Template) -> dict[str, Any]:
    """What a manifest says of a template."""
    return {
        "name": template.name,
        "version": template.version,
        "origin": template.origin,
        "digest": template.digest,
    }
