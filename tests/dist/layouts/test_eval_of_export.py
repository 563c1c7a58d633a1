"""What `eval` says of a run is what transformers says of its export: losses and bits per byte, to 1e-6."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.shards.source import open_source
from tests.dist.pool import RankPool
from tests.support import LAYOUTS, read_metrics

S = 24
EOD = "<|endoftext|>"
DOMAINS = ("plain", "multibyte", "short", "packed", "chosen")
WHERE = "score >= 0.5 and kind != 'b'"


def _write_texts(folder: Path) -> None:
    """Plain words; scripts of two to four bytes a letter, cut by the tokenizer in the middle of letters; texts of a word."""
    generator = np.random.default_rng(2)
    words = ["".join(map(chr, generator.integers(97, 123, size))) for size in generator.integers(2, 9, 60)]
    scripts = "äöüßéñ" + "дждыёяфв" + "日本語学校時" + "🙂🙃🌍🚀"

    def text(letters: int, of: str | None) -> str:
        if of is None:
            return " ".join(generator.choice(words, max(1, letters // 5)))
        return "".join(generator.choice(list(of + " "), letters))

    kinds: dict[str, list[str]] = {
        "train": [text(int(n), None if n % 3 else scripts) for n in generator.integers(5, 200, 80)],
        "plain": [text(int(n), None) for n in generator.integers(5, 160, 30)],
        "multibyte": [text(int(n), scripts) for n in generator.integers(1, 60, 30)],
        "short": [text(1, scripts) if n else text(5, None) for n in generator.integers(0, 2, 150)],
        "packed": [text(int(n), None if n % 2 else scripts) for n in generator.integers(1, 60, 60)],
    }
    kinds["chosen"] = [text(int(n), None if n % 2 else scripts) for n in generator.integers(5, 90, 120)]
    for name, texts in kinds.items():
        records = ({"text": one, "score": number * 7 % 10 / 10, "kind": "ab"[number % 3 % 2]} for number, one in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def exported(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, data, a trained run and its export."""
    folder = tmp_path_factory.mktemp("export")
    _write_texts(folder)
    sources = {name: {"kind": "natural", "input": f"{folder}/{name}.jsonl", "split": "validation"} for name in DOMAINS}
    packed = {"packed": sources.pop("packed")}
    packed["packed"]["split"] = "train"  # sources for validation are never packed
    columns = {"score": "float32", "kind": "category"}
    train = {"kind": "natural", "input": f"{folder}/train.jsonl", "columns": columns}
    sources["chosen"]["columns"] = columns  # type: ignore[assignment]
    first = {"output": f"{folder}/data", "tokenizer": {"train": {"vocab_size": 320}}, "sources": {"train": train, **sources}}
    tokenizer = {"path": f"{folder}/data/tokenizer.json"}
    second = {"output": f"{folder}/packed", "tokenizer": tokenizer, "sources": packed, "packing": {"sequence_length": S}}
    for name, content in (("first", first), ("second", second)):
        (folder / f"{name}.yaml").write_text(json.dumps(content))
        prepare(load_file(PrepareConfig, folder / f"{name}.yaml"))
    domains = {name: {"path": f"{folder}/{'packed' if name == 'packed' else 'data'}/{name}"} for name in DOMAINS}
    domains["chosen"]["where"] = WHERE
    run = {
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2},
        "data": {
            "sources": {"train": {"path": f"{folder}/data/train", "ratio": 1, "max_epochs": 9, "where": "score >= 0.3"}},
            "validation": domains,
            "cache": f"{folder}/cache",
        },
        "train": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 4, "sequence_length": S},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "precision": {"dtype": "fp32"},
        "log": {"wandb": {"mode": "disabled"}},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    _cli(ranks, "train", f"{folder}/run.yaml", "--run-dir", f"{folder}/run")
    _cli(ranks, "convert", "to-hf", f"{folder}/run", f"{folder}/hf")
    return folder


def _cli(ranks: RankPool, *arguments: str) -> None:
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", list(arguments))
    assert result.value == 0, result.stdout + result.stderr


@dataclass
class Sums:
    """Of a domain."""

    loss: float = 0.0
    labels: int = 0
    text_bytes: int = 0


def _by_hand(folder: Path, model: Any, name: str, *, masks: bool, windows: int | None) -> Sums:
    """Every window of a domain by itself, or with masks every document's part of it; nothing of the loader is used."""
    source = open_source(folder / ("packed" if name == "packed" else "data") / name, name)
    tokens = np.empty(source.num_tokens, np.int64)
    source.read(0, tokens)
    starts, place = set(), 0
    for number in range(len(source.manifest.shards)):
        shard = source.shard(number)
        starts |= {place + int(start) for start in shard.document_starts(0, shard.num_tokens)}
        place += shard.num_tokens
    assert source.manifest is not None
    text_bytes = source.manifest.counts.text_bytes
    if name == "chosen":  # a plain loop over the documents that are meant
        records = [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]
        documents = np.split(tokens, sorted(starts)[1:])
        kept = [at for at, record in enumerate(records) if record["score"] >= 0.5 and record["kind"] != "b"]
        assert len(records) == len(documents) and 20 < len(kept) < len(documents) / 2
        tokens = np.concatenate([documents[at] for at in kept])
        starts = {0, *np.cumsum([len(documents[at]) for at in kept])[:-1].tolist()}
        text_bytes = sum(len(records[at]["text"].encode()) for at in kept)
    vocab = json.loads((folder / "data" / "tokenizer.json").read_text())
    # a byte-level token has a letter for each of its bytes
    sizes = {number: len(token) for token, number in vocab["model"]["vocab"].items()}
    (eod,) = (entry["id"] for entry in vocab["added_tokens"] if entry["content"] == EOD)
    sizes[eod] = 0
    assert len(sizes) % 128, "with rows that pad the vocabulary"
    assert sum(sizes[token] for token in tokens.tolist()) == text_bytes
    found = Sums()
    for window in range(min((len(tokens) - 1) // S, windows or len(tokens))):
        begin, end = window * S, (window + 1) * S
        cuts = [begin, *(place for place in range(begin + 1, end) if masks and place in starts), end]
        for first, last in zip(cuts, cuts[1:], strict=False):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(tokens[None, first:last])).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[first + 1 : last + 1]), reduction="none")
            for place, loss in zip(range(first + 1, last + 1), losses.tolist(), strict=True):
                if not (masks and place in starts):
                    found.loss, found.labels = found.loss + loss, found.labels + 1
                    found.text_bytes += sizes[int(tokens[place])]
    return found


# ---- answers


def _write_answers(folder: Path) -> dict[str, list[tuple[str, list[str], int]]]:
    """Domains of questions as context, answers and the right one: pairs, choices, nothing before the answer, too much of it."""
    generator = np.random.default_rng(5)

    def text(letters: int) -> str:
        return "".join(generator.choice(list("abcdefg äß日🙂"), letters)).strip() or "a"

    domains: dict[str, list[tuple[str, list[str], int]]] = {
        "pairs": [(text(int(n)) + " " * (int(n) % 3), [" " + text(3)], 0) for n in generator.integers(1, 8, 11)],
        "choices": [(text(4), [" " + text(int(n)) for n in range(1, 5)], int(right)) for right in generator.integers(0, 4, 9)],
        "empty": [("", [text(4), text(2)], 1) for _ in range(5)],
        "long": [(text(60), [text(3)], 0), (text(80), [text(9)], 0)],
        "longer": [(text(5), [text(80)], 0)],
    }
    for name, questions in domains.items():
        rows = [
            {"context": context, "answer": answers[0]} if len(answers) == 1
            else {"context": context, "choices": answers, "answer": right}
            for context, answers, right in questions
        ]  # fmt: skip
        (folder / f"{name}-answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return domains


@pytest.fixture(scope="module")
def scored(ranks: RankPool, exported: Path) -> tuple[dict[str, Any], dict[str, list[tuple[str, list[str], int]]]]:
    """What `eval` says of the answers in each layout, and the questions."""
    domains = _write_answers(exported)
    only = [f"data.validation.{name}=null" for name in DOMAINS if name != "plain"]
    only += [f"data.answers.{name}.path={exported}/{name}-answers.jsonl" for name in domains]
    found = {}
    for layout in ("single", "tp2", "pp2", "cp2", "dp2"):
        world_size, settings = LAYOUTS[layout]
        arguments = ["eval", str(exported / "run"), *only, *settings]
        results = ranks.run(world_size, "megatron_synth.cli.main.main", arguments)
        assert [result.value for result in results] == [0] * world_size, results[0].stdout + results[0].stderr
        found[layout] = json.loads((exported / "run" / "eval.json").read_text())
    return found, domains


def test_answers_are_scored_as_by_transformers(
    scored: tuple[dict[str, Any], dict[str, list[tuple[str, list[str], int]]]], exported: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    found, domains = scored
    model = LlamaForCausalLM.from_pretrained(exported / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(exported / "data" / "tokenizer.json"))
    end = tokenizer.token_to_id(EOD)

    def log_likelihood(context: str, answer: str) -> float:
        before = len(tokenizer.encode(context.rstrip()).ids) or 1
        tokens = tokenizer.encode(context + answer).ids
        tokens = tokens if context else [end, *tokens]
        asked = len(tokens) - before
        tokens = tokens[-(S + 1) :]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
        labels = torch.tensor(tokens[1:])
        return float(logits.gather(1, labels[:, None])[-asked:].sum())

    for name, questions in domains.items():
        values = [[log_likelihood(context, answer) for answer in answers] for context, answers, _ in questions]
        bits = -sum(some[right] for some, (*_, right) in zip(values, questions, strict=True)) / math.log(2)
        text_bytes = sum(len(answers[right].encode()) for _, answers, right in questions)
        assert found["single"][f"eval/answers_bpb/{name}"] == pytest.approx(bits / text_bytes, rel=1e-6)
        if name in ("choices", "empty"):
            hits = [int(np.argmax(some)) == right for some, (*_, right) in zip(values, questions, strict=True)]
            places = [sum(v >= some[right] for v in some) for some, (*_, right) in zip(values, questions, strict=True)]
            assert found["single"][f"eval/accuracy/{name}"] == np.mean(hits)
            assert found["single"][f"eval/rank/{name}"] == np.mean(places)
    for layout, said in found.items():
        assert said == {key: pytest.approx(value, rel=1e-5) for key, value in found["single"].items()}, layout


@pytest.mark.slow
def test_answers_are_scored_as_by_the_harness(
    scored: tuple[dict[str, Any], dict[str, list[tuple[str, list[str], int]]]], exported: Path
) -> None:
    for name in ("lm_eval", "accelerate"):
        pytest.importorskip(name, reason="needs lm-evaluation-harness with its models of Hugging Face")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    found, domains = scored
    model = LlamaForCausalLM.from_pretrained(exported / "hf", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(exported / "data" / "tokenizer.json"), eos_token=EOD)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=S, batch_size=4, device="cpu")
    for name, questions in domains.items():
        if name == "longer":  # than the model sees at once: the harness takes no such answer
            continue
        asked = [
            Instance("loglikelihood", {}, (context, answers[right]), 0, metadata=(name, 0, 1))
            for context, answers, right in questions
        ]
        nats = -sum(value for value, _ in harness.loglikelihood(asked, disable_tqdm=True))
        text_bytes = sum(len(answers[right].encode()) for _, answers, right in questions)
        said = found["single"][f"eval/answers_bpb/{name}"]
        assert said == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-4), name


# ---- windows


@pytest.mark.parametrize("batches", [None, 1])
@pytest.mark.parametrize("masks", [False, True])
def test_losses_and_bits_per_byte(masks: bool, batches: int | None, ranks: RankPool, exported: Path) -> None:
    from transformers import LlamaForCausalLM

    flags = [f"data.document_masks={str(masks).lower()}", f"data.eod_mask_loss={str(masks).lower()}"]
    # with masks the padding of packed windows is a document of its own and not in the loss
    names = [name for name in DOMAINS if (masks and batches) or name != "packed"]
    domains = [f"data.validation.{name}=null" for name in DOMAINS if name not in names]
    part = [] if batches is None else [f"eval.batches={batches}"]
    _cli(ranks, "eval", str(exported / "run"), *flags, *domains, *part)
    said = json.loads((exported / "run" / "eval.json").read_text())
    model = LlamaForCausalLM.from_pretrained(exported / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    total = Sums()
    for name in names:
        right = _by_hand(exported, model, name, masks=masks, windows=None if batches is None else 8 * batches)
        assert right.labels > 50 and said[f"eval/tokens/{name}"] == right.labels
        assert said[f"eval/loss/{name}"] == pytest.approx(right.loss / right.labels, rel=1e-6)
        assert said[f"eval/bpb/{name}"] == pytest.approx(right.loss / math.log(2) / right.text_bytes, rel=1e-6)
        total = Sums(total.loss + right.loss, total.labels + right.labels, total.text_bytes + right.text_bytes)
    assert said["eval/loss"] == pytest.approx(total.loss / total.labels, rel=1e-6)
    assert said["eval/bpb"] == pytest.approx(total.loss / math.log(2) / total.text_bytes, rel=1e-6)


@pytest.mark.parametrize("layout", ["dp2", "tp2pp2"])
def test_bits_per_byte_in_every_layout(layout: str, ranks: RankPool, exported: Path, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS[layout]
    arguments = ["train", str(exported / "run.yaml"), *settings, "--run-dir", str(tmp_path / "run")]
    assert [result.value for result in ranks.run(world_size, "megatron_synth.cli.main.main", arguments)] == [0] * world_size
    found, single = (read_metrics(run)[-1] for run in (tmp_path / "run", exported / "run"))
    for name in ("", *(f"/{name}" for name in DOMAINS)):
        assert found[f"eval/bpb{name}"] == pytest.approx(single[f"eval/bpb{name}"], rel=1e-5)
