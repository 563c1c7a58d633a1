"""Configuration: reading, merging, overriding, checking, and writing back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli.config import main as config_main
from megatron_synth.config import yaml12
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import apply_overrides, digest, load_file, load_yaml, resolve, to_yaml, validate
from megatron_synth.config.rules import check
from megatron_synth.config.schema import Config

GOOD: dict[str, Any] = {
    "model": {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4},
    "data": {"sources": {"web": {"path": "a", "ratio": "2/3"}, "qa": {"path": "b", "ratio": "1/3"}}},
    "train": {"steps": 100, "global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 128},
}


def build(*overrides: str) -> Config:
    return validate(Config, apply_overrides(GOOD, overrides), "test")


def problems_of(action: Callable[[], Any]) -> dict[str, str]:
    """Path -> message of everything that `action` complains about."""
    with pytest.raises(ConfigError) as caught:
        action()
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1/3", "1/3"),
        ("'3e-4'", "3e-4"),
        ("e5", "e5"),
        ("-", [None]),
        ("-.inf", float("-inf")),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = yaml12.parse(text, "test")
    assert parsed == value and type(parsed) is type(value)


_shown = st.text(
    st.characters(exclude_categories=["Cc", "Cf", "Cs", "Co", "Zl", "Zp"], include_characters="\n\t").filter(
        lambda character: character in "\n\t" or not yaml12._is_hidden(character)
    )
)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**90), 10**90),
    st.floats(allow_nan=False),
    _shown,
    st.sampled_from(["3e-4", "on", "no", "NULL", "~", "0o7", "1_000", "12:30", "1e5", "", " a", ".inf", "0xF", "<<"]),
)


@settings(max_examples=100, deadline=None)
@given(st.recursive(_scalars, lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(_shown, leaf, max_size=3)))
def test_what_is_dumped_is_read_back(value: object) -> None:
    parsed = yaml12.parse(yaml12.dump(value), "test")
    assert parsed == value and repr(parsed) == repr(value)  # repr tells 1 from 1.0 and from True


BOMB = "x0: &x0 [a]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100000 values, with what its aliases repeat"),
        ("a: &a [*a]", "an alias within what it stands for"),
        ("a: " + "[" * 20_000, "nested deeper than 64 levels"),
        ("{b: " * 5_000, "nested deeper than 64 levels"),
        ("a: " + "9" * 5_000, "line 1: a number of 5000 digits"),
        ("a: 0x" + "f" * 100_000, "line 1: a number of 100002 digits"),
        ("a: b\0", "not YAML"),
        ('a: {b: "\\0"}', "a.b: '\\x00' has the character U+0000"),
        ('a: ["\\ud800"]', "a.0: '\\ud800' has the character U+D800"),
        ("nat\u202eural: 1", "'nat\\u202eural' has the character U+202E"),
        ("a: x\u200by", "a: 'x\\u200by' has the character U+200B"),
        ("a" * (yaml12.MAX_BYTES + 1), "a configuration has 1048576 at most"),
    ],
)
def test_a_text_that_attacks_its_reader_is_one_message(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml12.parse(text, "f.yaml")
    assert message in str(caught.value) and str(caught.value).isascii() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "setting",
    [
        *(f"train.steps={value}" for value in (2**31, "1e400", 10**90)),
        *("train.global_batch_size=1000000000", "train.sequence_length=4611686018427387904", f"train.seed={2**64 - 1}"),
        *(
            f"data.seed={2**63}",
            "model.num_layers=1000000000",
            "model.hidden_size=1000000000000",
            f"model.vocab_size={2**63 - 1}",
        ),
        *("model.num_attention_heads=1000000000", "optim.lr=1e308", "data.sources.web.max_epochs=1e308"),
        *("data.sources.web.ratio=1e-999999999", f"data.sources.web.ratio='0.{'3' * 4000}'", "checkpoint.interval=2147483648"),
        "data.phases=[{ramp: {from: {web: 1}, to: {qa: 1}, blocks: 1000000000}}]",
    ],
)
def test_numbers_have_upper_limits(setting: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(yaml12.dump(GOOD))
    with pytest.raises(ConfigError) as caught:
        load_file(Config, tmp_path / "f.yaml", [setting])
    assert len(caught.value.problems) == 1 or setting.startswith("data.phases"), caught.value


def test_a_run_has_no_more_tokens_than_can_be_counted(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(yaml12.dump(GOOD))
    with pytest.raises(ConfigError, match="can be counted"):
        load_file(
            Config,
            tmp_path / "f.yaml",
            ["train.steps=2147483647", "train.global_batch_size=4194304", "train.sequence_length=1024"],
        )


def test_duplicate_and_wrong_keys_are_told_with_their_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        yaml12.parse("a:\n  lr: 1\n  x: 2\n  lr: 3\n1: b\na: 4\n", "f.yaml")
    text = str(caught.value)
    assert "f.yaml: 3 problems" in text
    assert "line 4: duplicate key 'lr', first on line 2" in text
    assert "line 6: duplicate key 'a', first on line 1" in text
    assert "line 5: the key 1 is not text" in text


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: 1\nb: [1,\nc: 2\n")
    with pytest.raises(UserError, match=r"x\.yaml.*\n.*line [34]: not YAML"):
        load_yaml(file)


def test_bases_merge_in_order_and_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("model: {x: 1, y: 1, z: 1}\nlist: [1, 2]\n")
    (tmp_path / "sub" / "b.yaml").write_text("base: a.yaml\nmodel: {y: 2, z: 2}\n")
    (tmp_path / "c.yaml").write_text("model: {w: 3}\ndata: {s: {q: 1, r: 2}}\n")
    (tmp_path / "d.yaml").write_text("base: [sub/b.yaml, c.yaml]\nmodel: {z: 4}\nlist: [9]\ndata: {s: null, t: null}\n")
    assert load_yaml(tmp_path / "d.yaml") == {
        "model": {"x": 1, "y": 2, "z": 4, "w": 3},
        "list": [9],
        "data": {"t": None},  # null removes a section, and unsets a value
    }


def test_one_base_by_two_ways_is_no_cycle_but_a_cycle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "root.yaml").write_text("k: 1\n")
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text("base: root.yaml\n")
    (tmp_path / "both.yaml").write_text("base: [left.yaml, right.yaml]\n")
    assert load_yaml(tmp_path / "both.yaml") == {"k": 1}
    (tmp_path / "root.yaml").write_text("base: both.yaml\n")
    with pytest.raises(UserError, match=r"own base: .*both\.yaml -> .*left\.yaml -> .*root\.yaml -> .*both\.yaml"):
        load_yaml(tmp_path / "both.yaml")


def test_files_are_found_here_first_and_then_among_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = resolve("configs/train/quickstart.yaml")
    assert shipped == resolve("train/quickstart.yaml") and shipped.is_absolute()
    mine = tmp_path / "configs" / "train" / "quickstart.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("base: model/tiny-1m.yaml\n")  # not beside this file: the shipped one
    assert resolve("configs/train/quickstart.yaml").resolve() == mine
    assert load_yaml("configs/train/quickstart.yaml")["model"]["name"] == "tiny-1m"
    with pytest.raises(UserError, match=r"did you mean 'train/quickstart\.yaml'"):
        resolve("configs/train/quikstart.yaml")
    mine.write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"base: no configuration file nowhere\.yaml"):
        load_yaml(mine)


def test_overrides_are_yaml_and_leave_the_original_alone() -> None:
    before = copy.deepcopy(GOOD)
    overrides = ["optim.lr=3e-4", "data.sources.qa=null", "log.wandb.tags=[a, on]", "model.name='3'", "data.seed=null"]
    result = apply_overrides(GOOD, overrides)
    assert before == GOOD
    assert result["optim"] == {"lr": 3e-4}
    assert list(result["data"]["sources"]) == ["web"]
    assert result["log"]["wandb"]["tags"] == ["a", "on"]
    assert result["model"]["name"] == "3"
    assert result["data"]["seed"] is None


def test_unreadable_overrides_are_told_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(GOOD, ["steps", "a..b=1", "x=", "train.steps.y=1", "a=[1", "optim.lr=1"])
    assert len(caught.value.problems) == 5
    assert "train.steps.y: cannot be set: train.steps is 100, not a section" in str(caught.value)


def test_every_problem_is_reported_with_path_and_hint() -> None:
    data = apply_overrides(
        GOOD,
        [
            "lr=1e-3",
            "train.learning_rate=1",
            "train.batch_size=2",
            "optim.betta1=0.9",
            "optim.schedule=cosin",
            "optim.beta2=1.0",
            "train.seed=-1",
            "train.micro_batch_size=true",
            "model.num_layers=2.5",
            "model.name=7",
            "precision=bf16",
            "parallel.tp=2",
            "data.sources.qa.ratio=4/3",
            "data.sources.qa.max_epoch=2",
            "optim.eps=.nan",
            "zzz=1",
        ],
    )
    del data["model"]["hidden_size"]
    found = problems_of(lambda: validate(Config, data, "test"))
    expected = {
        "lr": "did you mean 'optim.lr'?",
        "train.learning_rate": "did you mean 'optim.lr'?",
        "train.batch_size": "did you mean 'train.global_batch_size'?",
        "optim.betta1": "did you mean 'optim.beta1'?",
        "optim.schedule": "'linear', 'inverse_sqrt' or 'constant', got 'cosin'; did you mean 'cosine'?",
        "optim.beta2": "must be less than 1",
        "train.seed": "must be at least 0, got -1",
        "train.micro_batch_size": "expected a number, got true",
        "model.num_layers": "expected a whole number, got 2.5",
        "model.name": "expected text, got 7",
        "model.hidden_size": "required, but not set",
        "precision": "expected a section",
        "parallel.tp": "did you mean 'parallel.tensor_model_parallel_size'?",
        "data.sources.qa.ratio": "a ratio lies between 0 and 1, got 4/3",
        "data.sources.qa.max_epoch": "did you mean 'data.sources.qa.max_epochs'?",
        "optim.eps": "must be a finite number, got nan",
        "zzz": "unknown key",
    }
    assert set(found) == set(expected)
    for path, text in expected.items():
        assert text in found[path], f"{path}: {found[path]}"


def test_load_file_reports_mistakes_and_broken_rules_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(build()))
    overrides = ["optim.lrr=1", "optim.min_lr=1", "data.sources.qa.ratio=1/2", "parallel.tensor_model_parallel_size=3"]
    found = problems_of(lambda: load_file(Config, file, overrides))
    assert {"optim.lrr", "data.sources", "parallel.tensor_model_parallel_size"} <= set(found)
    assert "optim.min_lr" not in found  # lr is misspelt: the default that stands in for it is nobody's choice


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        ("data.sources.qa.ratio=0.3334", "data.sources", ["2/3", "1667/5000", "15001/15000"]),
        ("data.sources.qa.ratio=0.333333333333333", "data.sources", ["exactly 1"]),
        ("model.num_attention_heads=3", "model.hidden_size", ["256", "3 heads", "255 or 258"]),
        ("model.hidden_size=252 model.num_attention_heads=4", "model.hidden_size", ["63", "even"]),
        ("model.num_query_groups=3", "model.num_query_groups", ["3", "4 heads", "1, 2, 4"]),
        ("parallel.tensor_model_parallel_size=8", "parallel.tensor_model_parallel_size", ["8", "4 heads"]),
        (
            "parallel.tensor_model_parallel_size=4 model.num_query_groups=2",
            "parallel.tensor_model_parallel_size",
            ["num_query_groups = 2"],
        ),
        (
            "parallel.tensor_model_parallel_size=4 model.ffn_hidden_size=770",
            "parallel.tensor_model_parallel_size",
            ["ffn_hidden_size = 770"],
        ),
        (
            "parallel.tensor_model_parallel_size=4 model.make_vocab_size_divisible_by=6",
            "model.make_vocab_size_divisible_by",
            ["6 is not a multiple of the 4", "4 or 8"],
        ),
        ("parallel.pipeline_model_parallel_size=3", "model.num_layers", ["8 layers", "3 pipeline", "6 or 9"]),
        (
            "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=3",
            "model.num_layers",
            ["2 pipeline stages x 3 chunks", "6 or 12"],
        ),
        (
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size",
            ["pipeline_model_parallel_size > 1"],
        ),
        ("parallel.tensor_model_parallel_size=4 train.sequence_length=130", "train.sequence_length", ["128 or 132"]),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel", ["tensor_model_parallel_size > 1"]),
        (
            "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather",
            ["overlap_grad_reduce: true"],
        ),
        (
            "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true parallel.use_distributed_optimizer=false",
            "parallel.overlap_param_gather",
            ["use_distributed_optimizer: true"],
        ),
        ("train.global_batch_size=15", "train.global_batch_size", ["15", "14 or 16"]),
        ("optim.warmup_steps=101", "optim.warmup_steps", ["101 warm-up", "train.steps = 100"]),
        (
            "optim.schedule=wsd optim.warmup_steps=51 optim.decay_steps=50",
            "optim.warmup_steps",
            ["51 warm-up + 50 decay"],
        ),
        ("optim.decay_steps=5", "optim.decay_steps", ["'cosine'", "null"]),
        ("optim.min_lr=1e-2", "optim.min_lr", ["0.01", "0.0003"]),
        ("checkpoint.keep_every=10", "checkpoint.keep_every", ["checkpoint.interval"]),
        ("checkpoint.keep_every=25 checkpoint.interval=10", "checkpoint.keep_every", ["20 or 30"]),
        ("eval.interval=10", "eval.interval", ["data.validation is empty"]),
        ("train.z_loss=1e-4 train.fused_loss=false", "train.z_loss", ["train.fused_loss: true"]),
        ("data.validation.a={path: x} data.validation.b c={path: x}", "data.validation.b c", ["letters"]),
    ],
)
def test_each_rule_finds_its_fault_and_nothing_else(overrides: str, path: str, words: list[str]) -> None:
    parts = overrides.replace("b c", "b|c").split(" ")
    merged: list[str] = []
    for part in parts:  # `{path: x}` has a space of its own
        merged = [*merged[:-1], f"{merged[-1]} {part}"] if merged and merged[-1].endswith(":") else [*merged, part]
    problems = check(build(*(part.replace("|", " ") for part in merged)))
    assert [problem.path for problem in problems] == [path], problems
    for word in words:
        assert word in problems[0].message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=false", "train.sequence_length=131"],
        ["optim.schedule=wsd", "optim.warmup_steps=50", "optim.decay_steps=50"],
        ["data.sources.web.ratio=0.663", "data.sources.qa.ratio=0.337"],
        ["data.sources.web.ratio=0.1", "data.sources.qa.ratio=0.2", "data.sources.x={path: c, ratio: 0.7}"],
        ["checkpoint.interval=10", "checkpoint.keep_every=50"],
        ["data.sources.qa.max_epochs=.inf"],
    ],
)
def test_what_is_sound_passes(overrides: list[str]) -> None:
    assert check(build(*overrides)) == []


def test_ratios_are_the_decimals_that_were_written() -> None:
    config = build("data.sources.qa.ratio=0.337", "data.sources.web.ratio=1 / 7")
    assert config.data.sources["qa"].ratio == Fraction(337, 1000)
    assert config.data.sources["web"].ratio == Fraction(1, 7)


def test_written_configurations_are_read_back_equal(tmp_path: Path) -> None:
    config = build("optim.lr=3.3e-07", "log.wandb.tags=['1e5', on, '']", "log.wandb.name='null'", "train.seed=7")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = load_file(Config, file)
    assert again == config
    assert (to_yaml(again), digest(again)) == (to_yaml(config), digest(config))
    assert list(again.data.sources) == list(config.data.sources)


def test_the_digest_tells_configurations_apart() -> None:
    swapped = copy.deepcopy(GOOD)
    swapped["data"]["sources"] = dict(reversed(GOOD["data"]["sources"].items()))
    configs = [build(), build("train.seed=7"), build("optim.lr=3.0001e-4"), validate(Config, swapped, "test")]
    assert len({digest(config) for config in configs}) == len(configs)
    same = build("optim.lr=0.0003", "data.sources.web.ratio=4/6")  # a default spelt out, an unreduced ratio
    assert digest(same) == digest(build())
    assert digest(build("checkpoint.interval_s=60")) == digest(build())  # the same run, saved more often
    assert len(digest(same)) == 12 and int(digest(same), 16) >= 0


def test_config_verb_shows_and_checks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert config_main(["show", "train/quickstart.yaml", "train.steps=70"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_file(Config, shown) == load_file(Config, "train/quickstart.yaml", ["train.steps=70"])
    assert config_main(["check", str(shown)]) == 0
    assert f"ok, digest {digest(load_file(Config, shown))}" in capsys.readouterr().out
    with pytest.raises(UserError, match="under `base:`"):
        config_main(["check", "model/1b.yaml"])
