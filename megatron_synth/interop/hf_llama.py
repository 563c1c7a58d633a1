"""Weights and settings between megatron-core's GPT model and Hugging Face's Llama, without either library.

Both sides compute the same function: RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU, no biases. They differ
in names and in how two matrices are stored:

- `linear_qkv.weight` [(A + 2 G) D, H] holds, for each of the G query groups, its A / G query heads, then its key
  head, then its value head; Hugging Face has `q_proj` [A D, H], `k_proj` and `v_proj` [G D, H], heads in that order.
- `linear_fc1.weight` [2 F, H] is `gate_proj` [F, H] above `up_proj` [F, H].

Padding of the vocabulary. Our embedding and output layer have V' = `padded_vocab_size(V)` rows. Those beyond V are no tokens:
the loss gives them no probability, and nothing depends on them. So `to_hf_state` leaves them out and `hf_config` writes V as
`vocab_size`; `from_hf_state` adds rows of zeros.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import ModelConfig
from megatron_synth.core.files import read_regular
from megatron_synth.core.names import plain_name
from megatron_synth.model.architecture import Weight, weights
from megatron_synth.train.checkpoint.companions import Companions

if TYPE_CHECKING:
    from torch import Tensor

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
MAX_SHARD_BYTES = 5_000_000_000


def _check(state: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]], vocabulary: set[str]) -> None:
    """UserError unless `state` has exactly these tensors; those of `vocabulary` may have any one number of rows."""
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - state.keys())]
    problems += [f"{name} is not part of the model" for name in sorted(state.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in state and name not in vocabulary and tuple(state[name].shape) != shape
    ]
    tables = {name: tuple(state[name].shape) for name in sorted(vocabulary) if name in state}
    rows = {shape[0] for shape in tables.values()}
    if len(rows) > 1 or any(len(shape) != 2 or shape[1] != shapes[name][1] for name, shape in tables.items()):
        width = shapes[next(iter(tables))][1]
        found = ", ".join(f"{name} {list(shape)}" for name, shape in tables.items())
        problems.append(f"expected [vocabulary, {width}] for both ends of the model, found {found}")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError("the weights do not fit the model's settings:\n  " + "\n  ".join(problems[:8]) + more)


def _places(model: ModelConfig, vocab_size: int | None = None) -> Iterator[tuple[str, list[str], Weight]]:
    """Every tensor of the model: our name, Hugging Face's names of what it is made of, and its row of the table."""
    for weight in weights(model, vocab_size):
        for layer, name in enumerate(weight.names(model.num_layers)):
            yield name, weight.hf_names(layer), weight


def _split(tensor: Tensor, weight: Weight) -> list[Tensor]:
    """Hugging Face's tensors of one of ours, each in memory of its own."""
    import torch

    parts = [tensor]
    if len(weight.hf) > 1:
        rest = weight.shape[1:]
        split = tensor.reshape(weight.blocks, -1, *rest).split([rows for _, rows in weight.hf], dim=1)
        parts = [part.reshape(-1, *rest) for part in split]
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _join(parts: list[Tensor], weight: Weight) -> Tensor:
    """One of our tensors from Hugging Face's."""
    import torch

    if len(weight.hf) == 1:
        return parts[0].clone()
    rest = weight.shape[1:]
    return torch.cat([part.reshape(weight.blocks, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def to_hf_state(state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Hugging Face Llama's weights from ours (full tensors, our names); every tensor has its own memory.

    The first `vocab_size` rows of the vocabulary are tokens; its padding is left out. UserError names tensors that are missing,
    unknown or misshapen.
    """
    places = list(_places(model, vocab_size))
    _check(state, {name: weight.shape for name, _, weight in places}, set())
    hf: dict[str, Tensor] = {}
    for name, theirs, weight in places:
        tensor = state[name][:vocab_size] if weight.has_vocabulary else state[name]
        hf.update(zip(theirs, _split(tensor, weight), strict=True))
    return hf


def from_hf_state(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights (full tensors) from Hugging Face Llama's.

    The vocabulary is padded as `model` asks, see the module's docstring. UserError names tensors that are missing,
    unknown or misshapen. An `lm_head` beside tied embeddings must equal them.
    """
    import torch

    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.share_embeddings_and_output_weights and HF_OUTPUT in state:
        head = state.pop(HF_OUTPUT)
        if HF_EMBEDDING in state and not torch.equal(head, state[HF_EMBEDDING]):
            raise UserError(
                f"{HF_OUTPUT} differs from {HF_EMBEDDING}, but the settings tie them; set tie_word_embeddings false"
            )
    places = list(_places(model))
    shapes = {
        name: (rows * weight.blocks, *weight.shape[1:])
        for _, theirs, weight in places
        for name, (_, rows) in zip(theirs, weight.hf, strict=True)
    }
    _check(state, shapes, {name for _, theirs, weight in places if weight.has_vocabulary for name in theirs})
    ours = {name: _join([state[theirs] for theirs in parts], weight) for name, parts, weight in places}
    for name, _, weight in places:
        if weight.has_vocabulary:
            ours[name] = _pad_rows(ours[name], model)
    return ours


def _pad_rows(table: Tensor, model: ModelConfig) -> Tensor:
    """[V, H] -> [V', H]; the new rows are zeros."""
    import torch

    rows, width = table.shape
    missing = model.padded_vocab_size(rows) - rows
    return torch.cat([table, table.new_zeros((missing, width))]) if missing else table


# ---- settings


def hf_config(
    model: ModelConfig,
    vocab_size: int,
    sequence_length: int,
    dtype: Literal["fp32", "bf16"],
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The config.json of the exported model.

    vocab_size: tokens of the tokenizer (V), as many as the exported weights have rows for.
    eos_token_id: what ends a text; of a model that was not imported, the end-of-document token of the training data.
    """
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,  # read by transformers 4, which does not know rope_parameters
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
# field -> the values that our model can represent; a field that is absent has the first one
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "quantization_config": (None,),
}


def model_config_from_hf(config: Mapping[str, Any], name: str = "custom") -> ModelConfig:
    """Our settings from a Llama's config.json; UserError names each field that our model cannot represent."""
    if config.get("model_type") != "llama":
        raise UserError(f"config.json: model_type: expected 'llama', found {config.get('model_type')!r}")
    problems = [f"{field}: missing" for field in _REQUIRED if config.get(field) is None]
    problems += [
        f"{field}: expected {allowed[0]!r}, found {config[field]!r}"
        for field, allowed in _ONLY.items()
        if field in config and config[field] not in allowed
    ]
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        problems.append(f"{field}: expected unscaled rotary embeddings, found {kind!r}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor: expected 1.0, rotary embeddings on all channels")
    if not problems:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        if width % heads:
            problems.append(f"num_attention_heads: {heads} does not divide hidden_size {width}")
        elif config.get("head_dim") not in (None, width // heads):
            expected = f"hidden_size / num_attention_heads = {width // heads}"
            problems.append(f"head_dim: expected {expected}, found {config['head_dim']}")
        if heads % (config.get("num_key_value_heads") or heads):
            problems.append(f"num_key_value_heads: {config['num_key_value_heads']} does not divide {heads} query heads")
    if problems:
        raise UserError("config.json: not a model that we can represent\n  " + "\n  ".join(problems))
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return ModelConfig(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        rotary_base=10_000.0 if theta is None else theta,
        norm_epsilon=config["rms_norm_eps"],
        init_method_std=config.get("initializer_range") or 0.02,
    )


# ---- files


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
    from safetensors.torch import save_file

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
            save_file({name: hf_state[name] for name in names}, partial / file, metadata={"format": "pt"})
            os.chmod(partial / file, stat.S_IMODE(partial.stat().st_mode) & 0o666)  # safetensors makes files private
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in hf_state.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        _write_json(partial / "config.json", config)
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
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
