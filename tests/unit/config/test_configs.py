"""Every file below configs/ is sound, and a dry run of it tells what it would do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.config.errors import UserError
from megatron_synth.config.explain import explain
from megatron_synth.config.load import load_file, load_yaml, shipped, to_yaml, validate
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config, ModelConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.shards.indexed import ShardWriter
from megatron_synth.estimate.flops import count_parameters
from megatron_synth.synthesis.kinds.template import template_of
from megatron_synth.synthesis.synthesis_file import load_synthesis
from megatron_synth.train.dryrun import dry_run

CONFIGS = shipped("configs")


def files(folder: str) -> list[str]:
    found = sorted(str(file.relative_to(CONFIGS)) for file in (CONFIGS / folder).rglob("*.yaml"))
    assert found, f"nothing in {CONFIGS / folder}"
    return found


def test_every_folder_has_a_schema() -> None:
    # studies: test_study_file.py; synthesis: tests/unit/synthesis
    schemas = {"model", "data", "train", "bench", "cluster", "study", "synthesis"}
    assert {file.relative_to(CONFIGS).parts[0] for file in CONFIGS.rglob("*.yaml")} == schemas


@pytest.mark.parametrize("path", files("model"))
def test_model_files_hold_one_sound_model_section(path: str) -> None:
    content = load_yaml(path)
    assert set(content) == {"model"}
    model = validate(ModelConfig, content["model"], path)
    assert model.name == Path(path).stem
    if model.hf_family is None:  # published ones: tests/unit/interop/test_families.py
        assert model.rotary_base == 500_000
        # the file's first line says the size: 1.69 B, 99 M
        number, unit = (CONFIGS / path).read_text().removeprefix("# ").split()[:2]
        stated = float(number) * {"M": 1e6, "B": 1e9}[unit]
        assert count_parameters(model, 50_000).non_embedding == pytest.approx(stated, rel=0.006)
    quickstart = load_yaml("train/quickstart.yaml")
    validate(Config, {**quickstart, "model": content["model"]}, path)


@pytest.mark.parametrize("path", files("train") + files("bench"))
def test_training_files_are_sound(path: str) -> None:
    load_file(Config, path)


@pytest.mark.parametrize("path", files("data"))
def test_preparation_files_are_sound(path: str) -> None:
    load_file(PrepareConfig, path)


@pytest.mark.parametrize("path", files("data") + files("train") + files("bench") + files("cluster"))
def test_an_explained_configuration_is_the_same(path: str, tmp_path: Path) -> None:
    kind = {"data": PrepareConfig, "cluster": ClusterConfig}.get(Path(path).parts[0], Config)
    config = load_file(kind, path)
    text = explain(config)
    (tmp_path / "explained.yaml").write_text(text)
    assert load_file(kind, tmp_path / "explained.yaml") == config
    comments = "\n".join(line.strip() for line in text.splitlines() if line.strip().startswith("#"))
    for name, field in kind.model_fields.items():
        words = (field.description or type(getattr(config, name)).__doc__ or "").split()
        assert f"# {' '.join(words[:5])}" in comments or getattr(config, name) is None, name


def test_own_text_is_prepared_and_planned_by_the_files_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(80):
        words = " ".join(f"word{(number * 7 + place) % 50}" for place in range(400))
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number}. {words}\n")
    small = ["tokenizer.train.vocab_size=512", "sources.synthetic.max_bytes=300000", "sources.synthetic.holdout=1/2"]
    prepare(load_file(PrepareConfig, "data/own-text.yaml", small))
    text = dry_run(load_file(Config, "train/own-text.yaml", ["train.steps=2", "optim.warmup_steps=1"]), 1)
    assert "vocabulary         512" in text and "not prepared" not in text
    with pytest.raises(UserError, match=r"mine: has .* windows"):
        dry_run(load_file(Config, "train/own-text.yaml"), 1)


@pytest.mark.parametrize("path", [path for path in files("synthesis") if "output" in load_yaml(path)])
def test_synthesis_files_are_sound(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_synthesis(path)
    assert template_of(config.kind, config.template).source_kind in ("rephrased", "qa", "textbook", "other")


@pytest.mark.parametrize("path", files("cluster"))
def test_cluster_files_are_sound(path: str) -> None:
    load_file(ClusterConfig, path)


def test_quickstart_runs_in_the_layout_that_make_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no data here
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    config = load_file(Config, "train/quickstart.yaml", layout)
    text = dry_run(config, 4)
    assert "TP2 x PP2 x DP1 (SP), 4 ranks, 4 micro-batches" in text
    assert "491,520 (120 steps x 16 sequences x 256)" in text
    assert text.count("not prepared") == 5
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] in (["2/3"], ["1/3"])]
    assert [(row[0], row[2]) for row in rows] == [("natural", "327,680"), ("qa", "163,840")]


def test_dry_run_tells_sizes_cost_and_memory_once_the_vocabulary_is_known() -> None:
    config = load_file(Config, "train/quickstart.yaml", ["model.vocab_size=4096"])
    text = dry_run(config, 2)
    parameters = count_parameters(config.model)
    assert f"{parameters.total:,}" in text and f"{parameters.non_embedding:,}" in text
    assert "FLOPs in all" in text and "memory per rank" in text


def test_dry_run_refuses_damaged_sources(tmp_path: Path) -> None:
    (tmp_path / "natural").mkdir()
    config = load_file(Config, "train/quickstart.yaml", [f"data.sources.natural.path={tmp_path / 'natural'}"])
    with pytest.raises(UserError, match="manifest"):
        dry_run(config, 1)


def write_source(prefix: Path, tokens: int) -> Path:
    writer = ShardWriter(prefix, np.dtype(np.uint16))
    writer.add((np.arange(tokens) % 100).astype(np.uint16), np.array([tokens]))
    writer.finish()
    return prefix


def test_dry_run_tells_how_long_prepared_sources_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the other sources are not prepared
    natural = write_source(tmp_path / "natural", 100 * 256 + 1)
    overrides = [f"data.sources.natural.path={natural}", "model.vocab_size=100", "train.steps=30", "train.seed=5"]
    config = load_file(Config, "train/quickstart.yaml", overrides)
    [row] = [line.split() for line in dry_run(config, 1).splitlines() if line.split()[:2] == ["natural", "2/3"]]
    assert row == ["natural", "2/3", "81,920", "25,600", "3.200", "4", "37", "steps"]
    lasts = config.train.model_copy(update={"steps": 37})
    dry_run(config.model_copy(update={"train": lasts}), 1)
    too_long = config.train.model_copy(update={"steps": 38})
    with pytest.raises(UserError, match="natural: has 100 windows"):
        dry_run(config.model_copy(update={"train": too_long}), 1)


def test_dry_run_warns_of_equal_sources_as_a_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the other domains are not prepared
    natural = write_source(tmp_path / "natural", 100 * 256 + 1)
    same = [f"data.sources.qa.path={natural}", f"data.validation={{natural: {{path: {natural}}}}}"]
    overrides = [f"data.sources.natural.path={natural}", *same, "model.vocab_size=100", "train.steps=20"]
    text = dry_run(load_file(Config, "train/quickstart.yaml", overrides), 1)
    assert text.count("note: ") == 3 and "hold the same text: what is evaluated is trained on" in text
    limits = ["data.sources.natural.max_epochs=3", "data.sources.qa.max_epochs=3"]
    with pytest.raises(UserError, match="hold the same text: together 320 samples of 100 windows"):
        dry_run(load_file(Config, "train/quickstart.yaml", [*overrides, *limits]), 1)


def test_dry_run_needs_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(load_file(Config, "train/quickstart.yaml", ["model.vocab_size=4096"])))
    code = (
        "import sys; from megatron_synth.cli.main import main\n"
        f"code = main(['train', {str(file)!r}, '--dry-run', '--world-size', '2'])\n"
        "print([name for name in ('torch', 'megatron', 'datasets', 'wandb') if name in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] 0"


def test_the_readme_lists_the_sizes_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("tables", CONFIGS.parent / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    readme = (CONFIGS.parent / "README.md").read_text()
    assert tables.replace(readme, "sizes", tables.sizes()) == readme, "run `python docs/tables.py sizes`"
