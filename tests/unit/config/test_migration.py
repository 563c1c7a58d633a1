"""What users of Megatron-LM look for, and do not find under that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.data.tokenizer import load_tokenizer
from tests.support import ROOT

FLAGS = {
    "--rampup-batch-size": ("train.rampup_batch_size", "train.global_batch_size"),
    "--train-samples": ("train.train_samples", "train.steps = samples / train.global_batch_size"),
    "--lr-warmup-fraction": ("optim.lr_warmup_fraction", "optim.warmup_steps = fraction x train.steps"),
    "--lr-warmup-samples": ("optim.lr_warmup_samples", "optim.warmup_steps"),
    "--tensorboard-dir": ("log.tensorboard_dir", "metrics.jsonl"),
    "--exit-duration-in-mins": ("train.exit_duration_in_mins", "timeout -s USR1"),
    "--qk-layernorm": ("model.qk_layernorm", "model.qk_norm: head"),
    "--use-rope-scaling": ("model.use_rope_scaling", "rope_type: llama3"),
    "--window-size": ("model.window_size", "model.sliding_window"),
    "--vocab-file": ("data.vocab_file", "tokenizer.path"),
    "--merge-file": ("data.merge_file", "tokenizer.path"),
    "--tokenizer-model": ("data.tokenizer_model", "tokenizer.path"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_setting_without_a_counterpart_says_what_to_do(flag: str) -> None:
    key, says = FLAGS[flag]
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_file(Config, "train/quickstart.yaml", [f"{key}=1"])
    assert f"{key}: unknown key; " in str(caught.value)
    assert f"`{flag}" in (ROOT / "docs" / "from-megatron-lm.md").read_text()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_other_files_of_tokenizers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"expected a tokenizer.json; .*save_pretrained"):
        load_tokenizer(tmp_path / name, "<eod>")


def test_a_preparation_has_the_same_hints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_file: unknown key; a tokenizer is one tokenizer.json"):
        load_file(PrepareConfig, "data/quickstart.yaml", ["tokenizer.vocab_file=x"])
