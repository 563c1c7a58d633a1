"""From plain data to a frozen section, with every problem told at once, in a user's words."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_synth.config.errors import ConfigError, Problem

Model = TypeVar("Model", bound=BaseModel)

# What other programs call our keys. Spelling alone would not find them.
_SYNONYMS = {
    "batch_size": "global_batch_size",
    "gradient_clipping": "clip_grad",
    "grad_clip": "clip_grad",
    "iterations": "steps",
    "learning_rate": "lr",
    "max_seq_len": "sequence_length",
    "max_steps": "steps",
    "n_head": "num_attention_heads",
    "n_layer": "num_layers",
    "num_key_value_heads": "num_query_groups",
    "pp": "pipeline_model_parallel_size",
    "seq_len": "sequence_length",
    "tp": "tensor_model_parallel_size",
    "train_iters": "steps",
    "vp": "virtual_pipeline_model_parallel_size",
    "weight": "ratio",
}
_TOKENIZER = (
    "a tokenizer is one tokenizer.json, named in the data file (tokenizer.path); docs/from-megatron-lm.md converts others"
)
_ABSENT = {
    "exit_duration_in_mins": "the time limit is the launcher's: `--time` of submit, or `timeout -s USR1 90m` before the "
    "command; the run saves, and the same command resumes",
    "lr_warmup_fraction": "give steps: optim.warmup_steps = fraction x train.steps",
    "lr_warmup_samples": "give steps: optim.warmup_steps = samples / train.global_batch_size",
    "merge_file": _TOKENIZER,
    "qk_layernorm": "say which norm: model.qk_norm: head (as in Qwen 3) or all_heads (as in OLMo 2)",
    "rampup_batch_size": "train.batch_ramp: [{steps: 1000, global_batch_size: 64}, ...], stages of whole steps before "
    "train.global_batch_size",
    "tensorboard_dir": "every step is in metrics.jsonl of the run directory, and in wandb where log.wandb says so",
    "tokenizer_model": _TOKENIZER,
    "train_samples": "give steps: train.steps = samples / train.global_batch_size",
    "use_rope_scaling": "model.rope_scaling: {rope_type: llama3, factor: 8, original_max_position_embeddings: 8192}",
    "vocab_file": _TOKENIZER,
    "window_size": "model.sliding_window: tokens that a token sees, itself included; (W, 0) there is W + 1 here",
}
"""Settings of Megatron-LM that have no counterpart of their own -> what to do instead."""
_FILES = {
    ("tokenizer", "sources"): "megatron-synth prepare",
    ("arms", "grid"): "megatron-synth study",
    ("generator", "parents"): "megatron-synth synthesize",
    ("train", "data"): "megatron-synth train",
}
"""Keys that only the files of one verb have at their top -> that verb."""


def validate(model_class: type[Model], data: Any, source: str) -> Model:
    """`data` as a `model_class`.

    Raises:
        ConfigError: with all problems of `data`, each with its dotted path; `source` names where the data came from.
    """
    problems, model = examine(model_class, data)
    if problems:
        raise ConfigError(source, problems)
    assert model is not None
    return model


def examine(model_class: type[Model], data: Any) -> tuple[list[Problem], Model | None]:
    """All problems of `data`, and the model that is left when what is wrong is taken out (None: nothing is left).

    With no problems the model is that of `data`. Otherwise it serves only to look for further problems.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        return [Problem("", f"expected sections (key: value lines), got {_show(data)}")], None
    other = _verb_of(model_class, data)
    if other is not None:
        return [Problem("", f"this is a file of `{other}`, by its keys: {', '.join(list(data)[:8])}")], None
    try:
        model = model_class.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = [
            # what nobody reads gets no hint: looking for close names takes its time
            Problem(_dotted(item["loc"]), _message(model_class, dict(item), hint=number < _HINTS))
            for number, item in enumerate(errors)
        ]
        return problems, _salvage(model_class, data, errors)
    return [], model


def _verb_of(model_class: type[BaseModel], data: Mapping[str, Any]) -> str | None:
    """The verb whose file `data` is, where it is a whole file of another one."""
    known = {field.alias or name for name, field in model_class.model_fields.items()}
    ours = len(known & data.keys())
    return next((verb for keys, verb in _FILES.items() if data.keys() >= set(keys) and ours < len(keys)), None)


_HINTS = 50
"""Unknown keys that get a hint."""


def suggest(word: str, candidates: list[str]) -> str:
    """` Did you mean 'x'?` when `word` looks like one of `candidates`, else an empty string."""
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "[key]")


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(model_class: type[BaseModel], error: dict[str, Any], *, hint: bool = True) -> str:
    """One pydantic error in a user's words; https://docs.pydantic.dev/latest/errors/validation_errors/ lists them."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    got = f", got {_show(value)}"
    match kind:
        case "extra_forbidden":
            return "unknown key" + (_suggest_key(model_class, tuple(error["loc"])) if hint else "")
        case "missing":
            return "required, but not set"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return f"expected a whole number{got}"
        case "float_parsing" | "float_type":
            return f"expected a number{got}"
        case "bool_parsing" | "bool_type":
            return f"expected true or false{got}"
        case "finite_number":
            return f"must be a finite number{got}"
        case "string_type":
            quote = f'; in quotes it is text: "{value}"' if isinstance(value, int | float) else ""
            return f"expected text{got}{quote}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}{got}"
        case "greater_than":
            return f"must be greater than {context['gt']}{got}"
        case "less_than_equal":
            return f"must be at most {context['le']}{got}"
        case "less_than":
            return f"must be less than {context['lt']}{got}"
        case "literal_error":
            allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
            return f"expected {context['expected']}{got}" + suggest(str(value), allowed)
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected a section (key: value lines){got}"
        case "list_type" | "tuple_type":
            return f"expected a list{got}"
        case "too_short":
            return "needs at least one entry"
        case "value_error":
            return str(context["error"])
    return f"{error['msg']}{got}"


def _suggest_key(model_class: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """A hint for an unknown key: its synonym here, the same name elsewhere, a close one here, a close one elsewhere."""
    word, here = str(location[-1]), location[:-1]
    instead = _ABSENT.get(word.lower().lstrip("-").replace("-", "_"))
    if instead is not None:
        return f"; {instead}"
    keys = list(keys_of(model_class))
    siblings = [path[-1] for path in keys if len(path) == len(location) and matches(path[:-1], here)]
    name = _SYNONYMS.get(word.lower(), word)
    if name in siblings:
        return f"; did you mean '{_dotted((*here, name))}'?"
    same = [path for path in keys if path[-1] == name]
    if same:
        shown = [f"'{'.'.join(path)}'" for path in same[:3]]
        return f"; did you mean {' or '.join([', '.join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)}?"
    close = difflib.get_close_matches(word, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{_dotted((*here, close[0]))}'?"
    elsewhere = difflib.get_close_matches(word, list(dict.fromkeys(path[-1] for path in keys)), n=1, cutoff=0.75)
    if elsewhere:
        return f"; did you mean '{next('.'.join(path) for path in keys if path[-1] == elsewhere[0])}'?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def matches(path: tuple[str, ...], location: tuple[int | str, ...]) -> bool:
    """Whether a path of `keys_of` is the place of a value."""
    return all(known == "<name>" or known == part for known, part in zip(path, location, strict=True))


def keys_of(model_class: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key below `model_class`, as a path; a mapping's free names stand as `<name>`."""
    for name, field in model_class.model_fields.items():
        path = (*above, field.alias or name)
        yield path
        for section, free in _sections(field.annotation):
            yield from keys_of(section, (*path, "<name>") if free else path)


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections that a field's type speaks of, and whether they stand below free names (a mapping)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _sections(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _sections(argument)
    elif origin in (dict, Mapping):
        for section, _ in _sections(arguments[1]):
            yield section, True
    elif origin is tuple:  # the place in the list is a free name
        for section, _ in _sections(arguments[0]):
            yield section, True


def _salvage(model_class: type[Model], data: dict[str, Any], errors: list[Any]) -> Model | None:
    """The model of `data` without the values that are at fault, if what is left makes one."""
    rest = copy.deepcopy(data)
    for error in errors:
        location = [part for part in error["loc"] if part != "[key]"]
        section: Any = rest
        for part in location[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and location:
            section.pop(location[-1], None)
    try:
        return model_class.model_validate(rest)
    except ValidationError:
        return None
