"""What belongs to a model beside its weights goes from an import through training into the export, without the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_synth.data.tokenizer import fingerprint_of
from tests.dist.pool import RankPool, RankResult
from tests.support import VOCAB_SIZE, write_config, write_corpus

GENERATION = {"bos_token_id": 1, "eos_token_id": [0, 7], "temperature": 0.6, "do_sample": True}
SPECIAL = {"eos_token": "<0>", "bos_token": "<1>"}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<0>",
    "bos_token": "<1>",
    "chat_template": "{{ messages }}",
}


def _write_tokenizer(path: Path, first: str = "<0>") -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {first: 0} | {f"<{number}>": number for number in range(1, VOCAB_SIZE)}
    Tokenizer(WordLevel(words, unk_token="<1>")).save(str(path))
    return fingerprint_of(path)


def _write_data(folder: Path, first: str = "<0>") -> Path:
    """A corpus whose manifests name a tokenizer beside it."""
    corpus = write_corpus(folder)
    fingerprint = _write_tokenizer(corpus / "tokenizer.json", first)
    for file in corpus.glob("*/manifest.json"):
        content = json.loads(file.read_text())
        content["tokenizer"]["fingerprint"] = fingerprint
        file.write_text(json.dumps(content))
    return corpus


def _write_llama(folder: Path, eos: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10_000.0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": eos, "pad_token_id": 5}
    files = {
        "config.json": settings,
        "generation_config.json": GENERATION,
        "special_tokens_map.json": SPECIAL,
        "tokenizer_config.json": {**TOKENIZER, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")
    _write_tokenizer(folder / "tokenizer.json")


class Place:
    """A corpus, a configuration, an imported Llama."""

    def __init__(self, folder: Path, ranks: RankPool, eos: Any = (0, 7)):
        self.folder, self.ranks = folder, ranks
        self.corpus = _write_data(folder / "corpus")
        self.config = write_config(folder / "base.yaml", self.corpus)
        _write_llama(folder / "llama", list(eos) if isinstance(eos, tuple) else eos)
        assert self.call("convert", "from-hf", folder / "llama", folder / "imported").value == 0

    def call(self, *arguments: Any) -> RankResult:
        (result,) = self.ranks.run(1, "megatron_synth.cli.main.main", list(map(str, arguments)))
        return result

    def train(self, run: str, *settings: str) -> RankResult:
        return self.call("train", self.config, "train.steps=4", *settings, "--run-dir", self.folder / run)


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_from_import_through_training_to_export(ranks: RankPool, tmp_path: Path) -> None:
    place = Place(tmp_path, ranks)
    result = place.train("run", f"checkpoint.init_from={tmp_path / 'imported'}")
    assert result.value == 0, result.stderr
    again = place.train("again", f"checkpoint.init_from={tmp_path / 'run'}")
    assert again.value == 0, again.stderr
    # elsewhere, without the data
    shutil.copytree(tmp_path / "again", tmp_path / "elsewhere" / "run")
    for name in ("val", "val2"):
        shutil.move(tmp_path / "corpus" / name, tmp_path / name)
    for name in ("corpus", "imported", "run", "again"):
        shutil.rmtree(tmp_path / name)
    copy = tmp_path / "elsewhere" / "run"
    exported = place.call("convert", "to-hf", copy, tmp_path / "hf")
    assert exported.value == 0 and "warning" not in exported.stdout, exported.stderr
    folder = tmp_path / "hf"
    config = _read(folder, "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [0, 7], 5)
    assert _read(folder, "generation_config.json") == GENERATION
    assert _read(folder, "special_tokens_map.json") == SPECIAL
    assert _read(folder, "tokenizer_config.json") == TOKENIZER  # without the author's code
    assert (folder / "chat_template.jinja").read_text() == "{{ bos_token }}{{ messages }}"
    assert fingerprint_of(folder / "tokenizer.json") == fingerprint_of(tmp_path / "llama" / "tokenizer.json")
    evaluated = place.call("eval", copy, *(f"data.validation.{name}.path={tmp_path / name}" for name in ("val", "val2")))
    assert evaluated.value == 0 and "written to" in evaluated.stdout, evaluated.stderr


def test_another_tokenizer_of_equal_size_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    place = Place(tmp_path, ranks)
    assert place.train("run").value == 0
    other = _write_data(tmp_path / "other", "<other>")
    sources = [f"data.sources.{name}.path={other / name}" for name in ("web", "qa")]
    domains = [f"data.validation.{name}.path={other / name}" for name in ("val", "val2")]
    for start in ("imported", "run"):
        refused = place.train("refused", *sources, *domains, f"checkpoint.init_from={tmp_path / start}")
        assert refused.value == 2 and not (tmp_path / "refused").exists(), refused.stderr
        for text in ("another tokenizer", "256 tokens", "end of document 0", "tokenizer.path", str(tmp_path / start)):
            assert text in refused.stderr, refused.stderr
    evaluated = place.call("eval", tmp_path / "run", *domains)
    assert evaluated.value == 2 and "another tokenizer" in evaluated.stderr, evaluated.stderr
    # a checkpoint of an older version knows its tokenizer by its path alone
    for file in (tmp_path / "run").glob("checkpoints/*/trainer.json"):
        content = json.loads(file.read_text()) | {"tokenizer": str(tmp_path / "corpus" / "tokenizer.json"), "format": 1}
        del content["tokenizer_fingerprint"]
        file.write_text(json.dumps(content))
        (file.parent / "manifest.json").unlink()
    (tmp_path / "run" / "tokenizer.json").unlink()
    refused = place.train("refused", *sources, *domains, f"checkpoint.init_from={tmp_path / 'run'}")
    assert refused.value == 2 and "another tokenizer" in refused.stderr, refused.stderr
    assert place.call("convert", "to-hf", tmp_path / "run", tmp_path / "hf").value == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_another_end_of_document_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    place = Place(tmp_path, ranks, eos=[5, 7])
    refused = place.train("refused", f"checkpoint.init_from={tmp_path / 'imported'}")
    assert refused.value == 2 and "end of document 5 or 7" in refused.stderr and "end of document 0" in refused.stderr


@pytest.mark.parametrize("harm", ["another", "a link", "no tokenizer"])
def test_a_tokenizer_that_is_not_the_run_s(harm: str, ranks: RankPool, tmp_path: Path) -> None:
    place = Place(tmp_path, ranks)
    file = tmp_path / "imported" / "tokenizer.json"
    if harm == "another":
        _write_tokenizer(file, "<other>")
    elif harm == "a link":
        file.rename(tmp_path / "kept")
        file.symlink_to(tmp_path / "kept")
    else:
        file.write_text("a password")
    result = place.call("convert", "to-hf", tmp_path / "imported", tmp_path / "hf")
    assert result.value == 2 and str(file) in result.stderr and not (tmp_path / "hf").exists(), result.stderr
    place.corpus.joinpath("tokenizer.json").write_text("a password")
    refused = place.train("refused")
    assert refused.value == 2 and "not a tokenizer.json" in refused.stderr and not (tmp_path / "refused").exists()
