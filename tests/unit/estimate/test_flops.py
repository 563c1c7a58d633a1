"""Counts of parameters, FLOPs and bytes against independent ones, and the way numbers are shown."""

from __future__ import annotations

import pytest

from megatron_synth.config.load import load_yaml, validate
from megatron_synth.config.schema import ModelConfig
from megatron_synth.core.log import duration, gib, human, say, scientific, table
from megatron_synth.estimate.flops import count_parameters, flops_per_token
from megatron_synth.estimate.hardware import mfu, peak_flops, show_mfu
from tests.support import LLAMA3_8B


def test_parameters_of_a_published_model() -> None:
    # 8,030,261,248 is what meta-llama/Meta-Llama-3-8B has
    parameters = count_parameters(LLAMA3_8B)
    assert parameters.total == 8_030_261_248
    assert parameters.total == parameters.embedding + parameters.non_embedding + parameters.head
    tied = count_parameters(LLAMA3_8B.model_copy(update={"share_embeddings_and_output_weights": True}))
    assert parameters.total - tied.total == 128256 * 4096
    assert tied.non_embedding == parameters.non_embedding


def test_parameters_are_those_of_transformers_llama() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = ModelConfig(
        num_layers=3,
        hidden_size=96,
        ffn_hidden_size=160,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=257,
        make_vocab_size_divisible_by=64,
    )
    with torch.device("meta"):
        reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
        )
    sizes = {name: weight.numel() for name, weight in reference.named_parameters()}
    parameters = count_parameters(model)
    assert parameters.total == sum(sizes.values())
    assert parameters.attention == sum(size for name, size in sizes.items() if "self_attn" in name)
    assert parameters.mlp == sum(size for name, size in sizes.items() if ".mlp." in name)
    assert parameters.norms == sum(size for name, size in sizes.items() if "norm" in name)


def test_flops_per_token_is_the_stated_convention() -> None:
    parameters = count_parameters(LLAMA3_8B)
    expected = 6 * (parameters.total - parameters.embedding) + 12 * 32 * 4096 * 8192
    assert flops_per_token(LLAMA3_8B, 8192) == expected
    tied = LLAMA3_8B.model_copy(update={"share_embeddings_and_output_weights": True})
    assert flops_per_token(tied, 8192) == expected  # the product is computed all the same
    # 14,451 tokens/s were published as 837 TFLOP/s for this model at this length
    assert 14_451 * expected == pytest.approx(837e12, rel=5e-3)


@pytest.mark.parametrize("name", ["100m", "160m", "250m", "400m", "630m", "1b", "1.7b", "3b"])
def test_named_sizes_are_what_they_say(name: str) -> None:
    model = validate(ModelConfig, load_yaml(f"model/{name}.yaml")["model"], name)
    nominal = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert model.name == name
    assert count_parameters(model, 50_000).non_embedding == pytest.approx(nominal, rel=0.03)
    assert model.head_dim in (64, 128) and model.ffn_hidden_size % 128 == 0
    assert model.num_attention_heads % 4 == 0 and model.num_layers % 4 == 0


@pytest.mark.parametrize("name", ["tiny-1m", "tiny-4m", "tiny-7m"])
def test_tiny_sizes_are_what_they_say(name: str) -> None:
    model = validate(ModelConfig, load_yaml(f"model/{name}.yaml")["model"], name)
    nominal = float(name.removeprefix("tiny-")[:-1]) * 1e6
    assert count_parameters(model, 4096).non_embedding == pytest.approx(nominal, rel=0.06)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_or_not_claimed(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
    assert show_mfu(mfu(0.5 * 989e12, name)) == ("n/a" if peak is None else f"{50 * 989e12 / peak:.1f}%")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (0.5, "0.50"), (850, "850"), (999.6, "1.00k"), (41_234, "41.2k"), (1_233_225_728, "1.23B")],
)
def test_human_numbers(value: float, text: str) -> None:
    assert human(value) == text


def test_other_numbers() -> None:
    assert scientific(125_829_120) == "1.26e+08"
    assert (duration(1117), duration(3599.7), duration(360_000), duration(float("inf"))) == (
        "0:18:37",
        "1:00:00",
        "100:00:00",
        "n/a",
    )
    assert (gib(62.1 * 2**30), gib(0.43 * 2**30)) == ("62.1", "0.43")
    assert table([("name", "n"), ("a", "10")]) == "  name   n\n  a     10"


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, text in (("1", ""), ("0", "hello\n")):
        monkeypatch.setenv("RANK", rank)
        say("hello")
        assert capsys.readouterr().out == text
