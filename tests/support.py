"""What many tests share: small learnable sources, a base configuration, comparison of runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_synth.config.schema import ModelConfig
from megatron_synth.data.shards import native
from megatron_synth.data.shards.columns import SUFFIX, ColumnInfo, file_content, missing_values, text_id
from megatron_synth.data.shards.indexed import ShardWriter, with_suffix
from megatron_synth.data.shards.learned import SUFFIX as LEARNED
from megatron_synth.data.shards.learned import LearnedWriter
from megatron_synth.data.shards.manifest import Counts, Manifest, Provenance, ShardInfo, TokenizerInfo
from megatron_synth.data.shards.source import open_source
from megatron_synth.data.tokenizer import Tokenizer
from megatron_synth.train.record import metrics

LLAMA3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
)

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**more: str) -> dict[str, str]:
    """Environment of a process that imports this clone, and what this process finds: its packages may be carried along."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **more}


VOCAB_SIZE = 256
EOD = "<|endoftext|>"
SEQUENCE_LENGTH = 32
STEPS = 20
GLOBAL_BATCH_SIZE = 8
CLIP_GRAD = 1.3
RATIOS = {"web": "2/3", "qa": "1/3"}

# Sizes in tokens. A run of 160 samples passes through each training source more than once; the windows of the domains
# are no multiple of a micro-batch.
_TRAINING_TOKENS = {"web": 2_500, "qa": 1_300}
_VALIDATION_TOKENS = {"val": 32 * 13 + 7, "val2": 32 * 5 + 1}

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"
PLAIN_OPTIMIZER = "parallel.use_distributed_optimizer=false"
OVERLAP_REDUCE = "parallel.overlap_grad_reduce=true"
OVERLAP_GATHER = "parallel.overlap_param_gather=true"

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "single-plain": (1, (PLAIN_OPTIMIZER,)),
    "tp2": (2, (f"{TENSOR}=2",)),
    "tp2-whole-sequence": (2, (f"{TENSOR}=2", "parallel.sequence_parallel=false")),
    "pp2": (2, (f"{PIPELINE}=2",)),
    "pp4": (4, (f"{PIPELINE}=4",)),
    "pp2vp2": (2, (f"{PIPELINE}=2", f"{VIRTUAL}=2")),
    "dp2": (2, ()),
    "dp2-plain": (2, (PLAIN_OPTIMIZER,)),
    "dp2-overlap-reduce": (2, (OVERLAP_REDUCE,)),
    "dp2-overlap-both": (2, (OVERLAP_REDUCE, OVERLAP_GATHER)),
    "tp2pp2": (4, (f"{TENSOR}=2", f"{PIPELINE}=2")),
    "tp2pp2vp2": (4, (f"{TENSOR}=2", f"{PIPELINE}=2", f"{VIRTUAL}=2")),
    "tp2pp2-plain": (4, (f"{TENSOR}=2", f"{PIPELINE}=2", PLAIN_OPTIMIZER)),
    "pp2vp2dp2-overlap-both": (4, (f"{PIPELINE}=2", f"{VIRTUAL}=2", OVERLAP_REDUCE, OVERLAP_GATHER)),
    "tp2dp2": (4, (f"{TENSOR}=2",)),
    "cp2": (2, (f"{CONTEXT}=2",)),
    "cp4": (4, (f"{CONTEXT}=4",)),
    "tp2cp2": (4, (f"{TENSOR}=2", f"{CONTEXT}=2")),
    "cp2dp2-plain": (4, (f"{CONTEXT}=2", PLAIN_OPTIMIZER)),
    "pp2vp2cp2-overlap-both": (4, (f"{PIPELINE}=2", f"{VIRTUAL}=2", f"{CONTEXT}=2", OVERLAP_REDUCE, OVERLAP_GATHER)),
}
"""Name to ranks and settings."""


def run_info(starts: int = 1) -> dict[str, Any]:
    """A run.json."""
    start = {"time": "2026-01-01T00:00:00+00:00", "layout": "TP1", "world_size": 1, "resumed_from_step": None}
    about = {"id": "12345678", "created": "2026-01-01T00:00:00+00:00", "digest": "0" * 12, "host": "node", "device": "CPU"}
    return {**about, "starts": [start] * starts, "layout": "TP1", "world_size": 1, "versions": {}, "git": None}


def learnable_tokens(seed: int, count: int, vocab_size: int = VOCAB_SIZE, *, rule: int = 3) -> np.ndarray:
    """Mostly a function of the token before, which `rule` picks, else noise: uint16 [count]."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, vocab_size, size=count)
    follows = generator.random(count) < 0.8
    tokens = np.empty(count, dtype=np.uint16)
    token = 0
    for place in range(count):
        token = (token * 5 + rule) % vocab_size if follows[place] else int(noise[place])
        tokens[place] = token
    return tokens


def write_source(
    folder: Path,
    seed: int,
    tokens: int,
    *,
    fingerprint: str | None = None,
    vocab_size: int = VOCAB_SIZE,
    shards: int = 2,
    rule: int = 3,
    longest: int = 59,
) -> Path:
    """A prepared source of `tokens` tokens in documents of 5 (or `longest`) to `longest`, with its manifest."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng([seed, 1])
    infos = []
    for number, part in enumerate(np.array_split(learnable_tokens(seed, tokens, rule=rule), shards)):
        ends = np.cumsum(generator.integers(min(5, longest), longest + 1, size=part.size))
        ends = np.append(ends[ends < part.size], part.size)
        name = f"shard-{number:05d}"
        writer = ShardWriter(folder / name, np.dtype(np.uint16))
        writer.add(part, np.diff(ends, prepend=0))
        infos.append(ShardInfo(name=name, **vars(writer.finish())))
    Manifest(
        name=folder.name,
        kind="other",
        generator="rule",
        split="train",
        dtype="uint16",
        tokenizer=TokenizerInfo(
            path="../tokenizer.json", fingerprint=fingerprint or tokenizer().fingerprint, vocab_size=vocab_size, eod_id=0
        ),
        counts=Counts(documents=sum(info.documents for info in infos), tokens=tokens, text_bytes=3 * tokens),
        shards=tuple(infos),
        made=Provenance(program="tests", config_digest="0" * 64, inputs={}, holdout="0"),
    ).save(folder)
    return folder


def with_mask(folder: Path, info: ShardInfo, learned: np.ndarray) -> ShardInfo:
    """A shard with a file that says which of its tokens are learned, bool [tokens]."""
    writer = LearnedWriter(with_suffix(folder / info.name, LEARNED))
    for part in np.array_split(learned, 3):
        writer.add(part)
    sha256, tokens = writer.finish()
    return info.model_copy(update={"learned_sha256": sha256, "learned_tokens": tokens})


def with_masks(folder: Path, seed: int) -> Path:
    """The prepared source in `folder`, of whose documents about a half begin with a prompt that is not learned."""
    manifest, generator, infos = Manifest.load(folder), np.random.default_rng([seed, 2]), []
    source = open_source(folder, folder.name)
    for number, info in enumerate(manifest.shards):
        learned = np.ones(info.tokens, np.bool_)
        starts = source.shard(number).document_starts(0, info.tokens)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), info.tokens], strict=True):
            learned[start : start + int(generator.integers(0, 2)) * int(generator.integers(0, end - start))] = False
        infos.append(with_mask(folder, info, learned))
    manifest.model_copy(update={"shards": tuple(infos)}).save(folder)
    return folder


COLUMNS = (
    ColumnInfo(name="score", type="float32"),
    ColumnInfo(name="year", type="int32"),
    ColumnInfo(name="kind", type="category", categories=("code", "qa", "text")),
    ColumnInfo(name="parent", type="id", parent=True),
    ColumnInfo(name="own", type="id"),
)


def with_columns(folder: Path, seed: int, tokens: int = 40_000, shards: int = 3) -> Path:
    """A prepared source with the columns above: a part of the documents has no value of some of them."""
    write_source(folder, seed, tokens, shards=shards)
    manifest = Manifest.load(folder)
    generator, infos = np.random.default_rng(seed), []
    for info in manifest.shards:
        values = missing_values(COLUMNS, info.documents)
        known = generator.random(info.documents) < 0.9
        values["score"][known] = generator.random(int(known.sum()))
        values["year"] = generator.integers(1990, 2026, info.documents)
        values["kind"] = generator.integers(-1, 3, info.documents)
        values["parent"] = [text_id(str(n % 17)) for n in range(info.documents)]
        values["own"] = [text_id(str(seed + n % 3)) for n in range(info.documents)]
        content = file_content(COLUMNS, values)
        with_suffix(folder / info.name, SUFFIX).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        infos.append(info.model_copy(update={"columns_bytes": len(content), "columns_sha256": digest}))
    manifest.model_copy(update={"columns": COLUMNS, "shards": tuple(infos)}).save(folder)
    return folder


@cache
def tokenizer() -> Tokenizer:
    """That of the sources here: token 0 ends a document, each of the others is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - 1]
    backend = Backend(models.BPE({letter: number for number, letter in enumerate(letters, start=1)} | {EOD: 0}, []))
    backend.add_special_tokens([EOD])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend.to_str(), EOD)


def write_corpus(folder: Path) -> Path:
    """Two training sources and, of the same two kinds, two validation domains."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(folder / "tokenizer.json")
    for seed, (name, tokens) in enumerate({**_TRAINING_TOKENS, **_VALIDATION_TOKENS}.items()):
        write_source(folder / name, seed, tokens, rule=4 if name in ("qa", "val2") else 3)
    return folder


def write_config(path: Path, corpus: Path) -> Path:
    """The base configuration: 20 steps in fp32, gradient norms on both sides of the clipping limit."""
    sources = {name: f"{{path: {corpus / name}, ratio: {ratio}, max_epochs: 5}}" for name, ratio in RATIOS.items()}
    path.write_text(
        f"""model: {{num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}}
data:
  sources: {{web: {sources["web"]}, qa: {sources["qa"]}}}
  validation: {{val: {{path: {corpus / "val"}}}, val2: {{path: {corpus / "val2"}}}}}
train:
  steps: {STEPS}
  global_batch_size: {GLOBAL_BATCH_SIZE}
  micro_batch_size: 2
  sequence_length: {SEQUENCE_LENGTH}
optim: {{lr: 3e-3, warmup_steps: 3, clip_grad: {CLIP_GRAD}}}
precision: {{dtype: fp32}}
checkpoint: {{interval: 10}}
eval: {{interval: 10}}
log: {{interval: 7, wandb: {{mode: disabled}}}}
"""
    )
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run directory."""
    return metrics.read_metrics(run / "metrics.jsonl")


def read_ledger(run: Path) -> dict[str, Any]:
    """ledger.json of a run directory."""
    return dict(json.loads((run / "ledger.json").read_text()))


def is_numeric_result(name: str) -> bool:
    """Whether a metric is computed by the model, and so subject to rounding."""
    return name.startswith(("train/loss", "eval/loss", "eval/bpb")) or name == metrics.GRAD_NORM


def is_exact_result(name: str) -> bool:
    """Whether a metric follows from the configuration alone."""
    return name.startswith(("data/", "eval/tokens")) or name in (metrics.STEP, metrics.LR, metrics.SKIPPED)


def assert_same_losses(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], rtol: float) -> None:
    """Equal steps, equal names; losses, norms and evaluations within `rtol`, 0 for bit-equal; the rest exact."""
    assert [record[metrics.STEP] for record in found] == [record[metrics.STEP] for record in expected]
    wrong: list[str] = []
    compared = 0
    for ours, theirs in zip(found, expected, strict=True):
        step = theirs[metrics.STEP]
        names = {name for name in {*ours, *theirs} if is_numeric_result(name) or is_exact_result(name)}
        for name in sorted(names):
            if name not in ours or name not in theirs:
                wrong.append(f"step {step}: {name} is missing on one side")
                continue
            compared += 1
            a, b = ours[name], theirs[name]
            same = a == b if rtol == 0 or is_exact_result(name) else math.isclose(a, b, rel_tol=rtol)
            if not same:
                wrong.append(f"step {step}: {name} is {a!r}, expected {b!r}, off by {abs(a - b):.1e}")
    assert compared >= 4 * len(expected)
    assert not wrong, "\n".join([f"{len(wrong)} differences, the first:", *wrong[:8]])


def checkpoint_names(run: Path) -> list[str]:
    """Names of the checkpoints of a run, ascending."""
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def rewound(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when the checkpoint of `step` was written, but for its metrics."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (to / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return to


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder; empty if there is none."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def warnings_in(printed: str) -> list[str]:
    """Lines that warn about the run; not the one about the machine, which has no compiled functions of the data."""
    lines = [line for line in printed.splitlines() if line.startswith("warning:")]
    return [line for line in lines if line != f"warning: {native.missing()}"]


def save_tiny_causal_model(
    folder: Path, texts: list[str], seed: int, *, layers: int = 2, family: str = "llama", vocabulary: int = 320, more: int = 0
) -> Path:
    """A Hugging Face folder with a model of random weights and a tokenizer trained on `texts`.

    vocabulary: tokens at most; more: rows of the model's vocabulary beyond the tokenizer's.
    """
    import torch
    from tokenizers import trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": len(tokenizer) + more, "eos_token_id": 0, "bos_token_id": None}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=layers, n_head=2, n_positions=128, **common))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=layers, max_position_embeddings=128, initializer_range=0.5, **shape, **common)
        )
    model.save_pretrained(folder)
    return folder
