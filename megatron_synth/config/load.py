"""Configuration files: YAML with `base:` inheritance, and `a.b=c` overrides.

A file names one or more others under `base:`; they are merged in order, then the file itself, later values winning
key by key. `null` over a section removes what the base had there. Files are looked for where they are named (in the
working directory, or beside the file whose `base:` names them) and then in the configs/ folder that ships with the
package. Paths of data and checkpoints inside a configuration stay relative to the working directory.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from megatron_synth.config import rules, yaml12
from megatron_synth.config.errors import ConfigError, Problem, UserError
from megatron_synth.config.model import ModelConfig
from megatron_synth.config.schema import Config, KernelsConfig, OptimConfig
from megatron_synth.config.validation import examine, validate

__all__ = ["apply_overrides", "digest", "load_file", "load_yaml", "merge", "resolve", "shipped", "to_yaml", "validate"]

Model = TypeVar("Model", bound=BaseModel)
MAX_FILES = 100
"""That a configuration is made of."""


def shipped(folder: str) -> Path:
    """A folder that is installed with the package: `configs` or `launch`."""
    package = Path(__file__).resolve().parents[1]
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def resolve(path: str | Path, beside: Path | None = None) -> Path:
    """The configuration file that `path` names.

    Args:
        path: absolute, or relative to `beside` (default: the working directory) or to the shipped configs/ folder,
            with or without the leading `configs/`.
        beside: the folder of the file whose `base:` names `path`.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    shipped_folder = shipped("configs")
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    candidates = [(beside or Path()) / path, shipped_folder / inside]
    for candidate in candidates:
        with contextlib.suppress(OSError):  # a name that no file can have
            if candidate.is_file():
                return candidate
    known = [str(file.relative_to(shipped_folder)) for file in sorted(shipped_folder.rglob("*.yaml"))]
    close = difflib.get_close_matches(str(inside)[:255], known, n=1, cutoff=0.6)
    with contextlib.suppress(OSError, ValueError):
        close = [str(file) for file in (path.with_suffix(".yaml"), path.with_suffix(".yml")) if file.is_file()] or close
    hint = f"; did you mean '{close[0]}'?" if close else ""
    text = f"no configuration file {path}, neither as {candidates[0]} nor in {shipped_folder}{hint}"
    raise UserError(text if len(text) < 2000 else f"no configuration file {str(path)[:200]}...")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a configuration file, merged over its `base:` files.

    Raises:
        UserError: a file is missing, is not YAML, has a key twice, or is its own base.
    """
    return _load(resolve(path), (), [])


def _load(path: Path, above: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """The content of a file over its bases. above: files that it is a base of; read: all files so far."""
    identity = path.resolve()
    read.append(identity)
    if len(read) > MAX_FILES:  # each may name the next one twice
        raise UserError(f"{path}: more than {MAX_FILES} files are read for one configuration, by `base:`")
    if identity in above:
        chain = " -> ".join(str(file) for file in (*above[above.index(identity) :], identity))
        raise UserError(f"{path}: a file cannot be its own base: {chain}")
    try:
        # what the user names may be a pipe of the shell; a base that is one would wait for whoever does not write
        if above and not path.is_file():
            raise UserError(f"{path}: cannot be read: not a regular file")
        with path.open("rb") as stream:
            text = stream.read(yaml12.MAX_BYTES + 1)
        if len(text) > yaml12.MAX_BYTES:
            raise UserError(f"{path}: a configuration has at most {yaml12.MAX_BYTES} bytes")
        content = yaml12.parse(text.decode("utf-8").replace("\r\n", "\n"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(str(path), [Problem("", "expected sections (key: value lines) at the top level")])
    bases = content.pop("base", None)
    bases = [] if bases is None else [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(str(path), [Problem("base", f"expected a path or a list of paths, got {bases!r}")])
    merged: dict[str, Any] = {}
    for base in bases:
        try:
            file = resolve(base, path.parent)
        except UserError as error:
            raise ConfigError(str(path), [Problem("base", str(error))]) from None
        merged = merge(merged, _load(file, (*above, identity), read))
    return merge(merged, content)


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`, key by key in sections; null over a section removes it."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = merge(before, value)
        elif isinstance(before, dict) and value is None:
            del merged[key]
        else:
            merged[key] = value
    return merged


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=c` applied in order; values are YAML, so that `a.b=null` unsets.

    Raises:
        ConfigError: overrides that cannot be read, all of them at once.
    """
    result, problems = copy.deepcopy(data), []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not text.strip() or not all(path):
            problems.append(Problem("", f"'{override}': expected key=value, such as train.steps=100 or a.b=null"))
            continue
        try:
            value = yaml12.parse(text, f"'{override}'")
        except ConfigError as error:
            problems.append(Problem(key, "; ".join(problem.message for problem in error.problems)))
            continue
        change: dict[str, Any] = {path[-1]: value}
        for depth in range(len(path) - 1, 0, -1):
            above = _at(result, path[:depth])
            if above is not None and not isinstance(above, dict):
                message = f"cannot be set: {'.'.join(path[:depth])} is {above!r}, not a section"
                problems.append(Problem(key, message))
                break
            change = {path[depth - 1]: change}
        else:
            result = merge(result, change)
    if problems:
        raise ConfigError("overrides", problems)
    return result


def _at(data: Any, path: Sequence[str]) -> Any:
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def load_file(model_class: type[Model], path: str | Path, overrides: Iterable[str] = (), *, first: Iterable[str] = ()) -> Model:
    """The configuration in a file, with overrides applied; before them those of the program, `first`, which no message counts.

    A `Config` is also held against `rules.check`; what it finds stands in the same report.

    Raises:
        UserError: a file is missing or cannot be read.
        ConfigError: with all problems of the configuration.
    """
    overrides = tuple(overrides)
    changes = " ".join(overrides) if len(overrides) <= 3 else f"{len(overrides)} overrides"
    source = f"{path} with {changes}" if overrides else str(path)
    problems, model = examine(model_class, apply_overrides(load_yaml(path), (*first, *overrides)))
    if isinstance(model, Config):
        # a section with a mistake in it was completed with defaults: rules would speak of values nobody chose
        doubtful = {part.split(".")[0] for problem in problems for part in (problem.path, *_quoted(problem.message))}
        problems += [problem for problem in rules.check(model) if problem.path.split(".")[0] not in doubtful]
    if problems:
        raise ConfigError(source, problems)
    assert model is not None
    return model


def _quoted(text: str) -> list[str]:
    return text.split("'")[1::2]


def to_yaml(config: BaseModel) -> str:
    """Every setting of `config`, defaults filled in, as YAML that `load_file` reads back as an equal configuration."""
    return yaml12.dump(config.model_dump(mode="json", by_alias=True))


def digest(config: BaseModel) -> str:
    """12 hexadecimal characters that name `config`: SHA-256 over its JSON, in the order of the schema.

    The order of the sources counts, because the order of the samples depends on it. Backends of operations count only where
    they are named: `auto` is another one on another device, and the same run. So it is with overlaps: their default counts as
    off. FP8's settings count where it is on, and how windows are cut where it is not the plain way.
    """
    content = config.model_dump(mode="json", by_alias=True)
    if isinstance(config, Config):
        _drop_what_names_no_other_run(config, content)
    canonical = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _drop_what_names_no_other_run(config: Config, content: dict[str, Any]) -> None:
    """Leave out of a configuration's content what makes no other run, and settings at a default that is older than they are."""
    parallel, precision = content["parallel"], content["precision"]
    for key in ("overlap_grad_reduce", "overlap_param_gather"):
        parallel[key] = parallel[key] or False
    _drop_default(parallel, "ddp_bucket_size", None)
    _drop_default(parallel, "context_parallel_size", 1)
    model = content["model"]
    del model["hf_family"]  # what an export is called
    newer = ("rope_scaling", "kv_channels", "add_qkv_bias", "qk_norm", "norm_placement")
    for name in (*newer, "sliding_window", "sliding_window_first_layer", "mup_base_hidden_size"):
        _drop_default(model, name, ModelConfig.model_fields[name].default)
    if config.kernels == KernelsConfig():
        del content["kernels"]
    else:
        for name in ("swiglu_quantise", "rms_norm_quantise"):
            _drop_default(content["kernels"], name, "auto")
    del precision["fp8_fused"]  # the same numbers in fewer passes
    del content["checkpoint"]["interval_s"]
    _drop_default(precision, "fp8_param_gather", False)
    if config.precision.fp8 == "off":
        content["precision"] = {key: value for key, value in precision.items() if not key.startswith("fp8")}
    _drop_default(content["checkpoint"], "keep_steps", [])
    _drop_default(content["checkpoint"], "branch_from", None)
    _drop_default(content["checkpoint"], "init_ema", False)
    del content["checkpoint"]["upload_to"]
    _drop_default(content["checkpoint"], "init_vocabulary", "same")
    for name in ("name", "muon_momentum", "muon_ns_steps", "ema_decay", "qk_clip"):
        _drop_default(content["optim"], name, OptimConfig.model_fields[name].default)
    _drop_default(content["data"], "skip", [])
    _drop_default(content["data"], "answers", {})
    del content["data"]["staging_bytes"]
    _drop_default(content["train"], "skip", None)
    _drop_default(content["train"], "batch_ramp", [])
    _drop_default(content["log"], "health_interval", None)
    _drop_default(content["log"], "loss_by", [])
    _drop_default(content["eval"], "at_start", False)
    for phase in content["data"]["phases"]:
        if phase["ramp"] is not None:
            _drop_default(phase["ramp"], "until", None)
    _drop_default(content["data"], "windows_per_sequence", 1)
    for source in content["data"]["sources"].values():
        _drop_default(source, "shift_windows", False)
        _drop_default(source, "where", None)
    for domain in content["data"]["validation"].values():
        _drop_default(domain, "where", None)
    _drop_default(content["data"], "exclude_parents_of", None)
    del content["data"]["cache"]


def _drop_default(section: dict[str, Any], name: str, default: object) -> None:
    if section[name] == default:
        del section[name]
