"""Folders in Hugging Face's format: config.json, safetensors, and what stands beside them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_synth.config.errors import UserError
from megatron_synth.core.files import read_regular
from megatron_synth.core.names import plain_name
from megatron_synth.train.checkpoint.companions import IDS, Companions

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000


def write_hf(
    folder: Path,
    hf_state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer_path: Path | None = None,
    *,
    companions: Companions | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` reads: whole, or not at all.

    hf_state: from `to_hf_state`, on CPU. config: from `hf_config`. tokenizer_path: a tokenizer.json, None for none.
    companions: what an imported model came with, which takes the place of what would be made up here.
    Weights beyond `max_shard_bytes` go to several files with an index. UserError if the folder holds anything.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; choose another folder, or remove this one")
    if tokenizer_path is not None and not tokenizer_path.is_file():
        raise UserError(f"{tokenizer_path}: no such tokenizer file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        shards = _shards(hf_state, max_shard_bytes)
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _save({name: hf_state[name] for name in names}, partial / file)
            os.chmod(partial / file, stat.S_IMODE(partial.stat().st_mode) & 0o666)  # safetensors makes files private
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in hf_state.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        _write_json(partial / "config.json", config)
        ids = {key: config.get(key) for key in IDS}
        _write_json(partial / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, partial / "tokenizer.json")
            _write_json(partial / "tokenizer_config.json", _tokenizer_config(tokenizer_path, config))
        for name, content in (companions.files() if companions else {}).items():
            if isinstance(content, str):
                (partial / name).write_text(content, encoding="utf-8")
            else:
                _write_json(partial / name, content)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of tensors. OSError where the system refuses, as a full disk does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(state), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_hf(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (on CPU, as stored) and config.json of a Hugging Face folder with safetensors, in one file or several."""
    from safetensors.torch import load_file

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    settings = folder / "config.json"
    if not settings.is_file():
        raise UserError(f"{settings}: no such file; expected a Hugging Face model folder")
    config = _read_json(settings)
    if not isinstance(config, dict):
        raise UserError(f"{settings}: expected a mapping of settings, found {type(config).__name__}")
    if index.is_file():
        weight_map = _weight_map(index)
        files = sorted({folder / file for file in weight_map.values()})
    elif single.is_file():
        weight_map, files = None, [single]
    else:
        raise UserError(f"{folder}: neither {single.name} nor {index.name}; save the model as safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: named by {index.name} but missing; download or copy the folder again")
        try:
            state.update(load_file(file))
        except Exception as error:  # safetensors raises its own, untyped errors
            raise UserError(f"{file}: not a readable safetensors file ({error}); download or copy it again") from error
    if weight_map is not None and set(weight_map) != set(state):
        odd = sorted(set(weight_map) ^ set(state))
        raise UserError(f"{index}: disagrees with the files about {', '.join(odd[:4])}; download or copy it again")
    return state, config


def _weight_map(index: Path) -> dict[str, str]:
    """Tensors and the files that hold them, which are in the folder of the index."""
    content = _read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index}: has no weight_map of tensors to files; download or copy it again")
    try:
        return {name: plain_name(file, name) for name, file in found.items()}
    except ValueError as error:
        raise UserError(f"{index}: weight_map: {error}") from None


def _shards(state: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, cut so that a shard exceeds `max_bytes` only where a single tensor does."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in state.items():
        if shards[-1] and held + tensor.nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def _tokenizer_config(tokenizer_path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the class, the context length, and the text of the special tokens."""
    added = {token["id"]: token["content"] for token in _read_json(tokenizer_path).get("added_tokens", [])}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    for name in ("bos_token", "eos_token"):
        first = config.get(f"{name}_id")
        if isinstance(first, list):
            first = first[0] if first else None
        if first in added:
            settings[name] = added[first]
    return settings


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
