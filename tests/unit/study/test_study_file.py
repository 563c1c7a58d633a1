"""From a study file to runs: expansion, ids, refusals, costs."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_synth.cli.study import main
from megatron_synth.config.errors import ConfigError, UserError
from megatron_synth.config.load import to_yaml
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.study.plan.costs import check_sources, cost_of, open_sources, require_prepared, use_key
from megatron_synth.study.plan.runs import Run, expand, identity
from megatron_synth.study.plan.study_file import Study, load_study
from tests.support import ROOT, write_source

TINY = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}


def study_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small study of two sources below `folder`."""
    content: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "study"),
        "sources": {"web": {"path": str(folder / "web")}, "qa": {"path": str(folder / "qa")}},
        "arms": {"natural": {"web": 1}, "mixed": {"web": "2/3", "qa": "1/3"}, "synthetic": {"qa": 1}},
        "sizes": {"s": {"model": TINY}, "m": {"model": {**TINY, "num_layers": 4}}},
        "grid": [{"sizes": ["s"], "tokens": [512, 1024]}, {"tokens": [1024]}],
        "seeds": [1, 2],
        "validation": {"web": {"path": str(folder / "web")}},
        "rates": {"lr": 1e-2},
        "protocol": {
            "train": {"sequence_length": 32, "global_batch_size": 4},
            "precision": {"dtype": "fp32"},
        },
    }
    return {**content, **changes}


def write_study(folder: Path, **changes: Any) -> Path:
    """The file of a small study."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study_of(folder, **changes), sort_keys=False))
    return file


def expanded(folder: Path, *overrides: str, **changes: Any) -> tuple[Study, list[Run]]:
    study = load_study(write_study(folder, **changes), overrides)
    return study, expand(study)


def test_every_combination_once(tmp_path: Path) -> None:
    _, runs = expanded(tmp_path)
    found = {(run.arm, run.size, run.budget, run.seed) for run in runs}
    cells = {("s", 512), ("s", 1024), ("m", 1024)}  # the cell that two entries of the grid name is there once
    assert found == {(arm, *cell, seed) for arm in ("natural", "mixed", "synthetic") for cell in cells for seed in (1, 2)}
    assert len(runs) == len(found) == len({run.id for run in runs})
    assert [run.seed for run in runs] == [1] * 9 + [2] * 9
    sizes = [run.flops(1) for run in runs[:9]]
    assert sizes == sorted(sizes, reverse=True)
    assert {run.tokens for run in runs} == {512, 1024}


def test_a_run_is_what_its_file_says(tmp_path: Path) -> None:
    rates = {"lr": 4e-3, "at": 1e6, "exponent": -0.5, "min_lr_fraction": 0.1, "warmup_fraction": 0.25}
    sizes = {"s": {"model": TINY}, "m": {"model": TINY, "lr": 5e-4, "settings": {"train": {"micro_batch_size": 2}}}}
    _, runs = expanded(tmp_path, rates=rates, sizes=sizes)
    small = next(run for run in runs if run.size == "s" and run.budget == 1024 and run.arm == "mixed")
    config = small.config
    assert [(name, source.ratio) for name, source in config.data.sources.items()] == [
        ("web", Fraction(2, 3)),
        ("qa", Fraction(1, 3)),
    ]
    assert config.train.steps == 1024 // 128 and config.optim.warmup_steps == 2
    assert config.optim.lr == float(f"{4e-3 * (small.parameters / 1e6) ** -0.5:.3g}")
    assert config.optim.min_lr == config.optim.lr * 0.1
    other = next(run for run in runs if run.size == "m").config
    assert (other.optim.lr, other.train.micro_batch_size) == (5e-4, 2)


def test_ids_follow_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    _, runs = expanded(tmp_path)
    ids = {(run.arm, run.size, run.budget, run.seed): run.id for run in runs}

    def changed(*overrides: str) -> bool:
        _, others = expanded(tmp_path, *overrides)
        return {(run.arm, run.size, run.budget, run.seed): run.id for run in others} != ids

    for same in (
        "protocol.log.interval=3",
        "protocol.train.micro_batch_size=2",
        "protocol.checkpoint.interval=2",
        "sources.qa.max_epochs=3",
        "sources.qa.tokens=100",
        "description=other",
        "output=elsewhere",
        "costs.flops_per_second=1",
        "keep_checkpoints=true",
    ):
        assert not changed(same), same
    for other in (
        "protocol.train.global_batch_size=8",
        "protocol.train.sequence_length=16",
        "rates.lr=2e-2",
        "sources.qa.path=elsewhere",
        "sources.qa.unique_tokens=640",
        "seeds=[1,3]",
        "sizes.s.model.num_layers=3",
        "validation.web.path=elsewhere",
        "protocol.eval.batches=2",
    ):
        assert changed(other), other
    assert changed("arms.mixed={web: 1/3, qa: 2/3}")


def test_ids_stay_what_they_were() -> None:
    # of results that exist: a change here makes every finished study look unfinished, and needs another _IDENTITY_VERSION
    study = Study.model_validate(study_of(Path("nowhere")))
    assert [run.id for run in expand(study)][:2] == ["ebdb7f7f205d", "1670a049a96b"]


def test_ids_survive_another_name_and_another_process(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    study, runs = expanded(tmp_path)
    arms = {"natural": {"web": 1}, "renamed": {"qa": "1/3", "web": "2/3"}, "synthetic": {"qa": 1}}
    _, renamed = expanded(tmp_path, arms=arms)
    assert {run.id for run in renamed} == {run.id for run in runs}
    write_study(tmp_path)
    code = "import sys\nfrom megatron_synth.study.plan.study_file import load_study\n"
    code += "from megatron_synth.study.plan.runs import expand\n"
    code += "print(*[run.id for run in expand(load_study(sys.argv[1]))])"
    told = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.split() == [run.id for run in runs]
    # what a submit writes down gives the same runs
    (tmp_path / "resolved.yaml").write_text(to_yaml(study))
    assert [run.id for run in expand(load_study(tmp_path / "resolved.yaml"))] == [run.id for run in runs]


def test_runs_that_differ_in_the_mixture_share_data_order_and_seed(tmp_path: Path) -> None:
    write_source(tmp_path / "web", 0, 40_000)
    write_source(tmp_path / "qa", 1, 40_000)
    _, runs = expanded(tmp_path)
    mixed, synthetic = (
        next(run for run in runs if (run.arm, run.budget, run.seed) == (arm, 1024, 1)) for arm in ("mixed", "synthetic")
    )
    assert mixed.config.train.seed == synthetic.config.train.seed and mixed.config.model == synthetic.config.model
    windows = []
    for run in (mixed, synthetic):
        plan = open_data(run.config).plan
        sources, places = plan.locate(range(32))
        windows.append(places[sources == plan.names.index("qa")].tolist())
    assert windows[0] == windows[1][: len(windows[0])] and len(windows[0]) >= 10


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(st.fractions(min_value=0, max_value=1, max_denominator=12), min_size=1, max_size=4, unique=True),
    budgets=st.lists(st.integers(min_value=128, max_value=4096), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=3, unique=True),
)
def test_any_grid_expands_to_its_product(shares: list[Fraction], budgets: list[int], seeds: list[int]) -> None:
    arms = {f"a{number}": {"web": str(1 - share), "qa": str(share)} for number, share in enumerate(shares)}
    content = study_of(Path("nowhere"), arms=arms, seeds=seeds, grid=[{"sizes": ["s"], "tokens": budgets}])
    study = Study.model_validate(content)
    runs = expand(study)
    assert len({run.id for run in runs}) == len({identity(run.config) for run in runs})
    assert len(runs) == len(shares) * len(budgets) * len(seeds)
    for run in runs:
        step = run.config.train.tokens_per_step
        assert abs(run.tokens - run.budget) * 2 <= step, "a budget is rounded to the nearest step"
        assert sum(source.ratio or 0 for source in run.config.data.sources.values()) == 1


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ratios": ({"arms": {"a": {"web": 0.66, "qa": "1/3"}}}, ["arms.a", "sum to exactly 1", "33/50", "149/150"]),
    "unknown source": ({"arms": {"a": {"wev": 1}}}, ["arms.a.wev", "did you mean 'web'"]),
    "unknown size": ({"sizes": ["1b", "100n"]}, ["sizes.100n", "unknown size", "did you mean '100m'"]),
    "unknown size in the grid": ({"grid": [{"sizes": ["x"], "tokens": [999]}]}, ["grid.0.sizes", "unknown size 'x'"]),
    "budget below a batch": ({"grid": [{"tokens": [64]}]}, ["grid.0.tokens", "below one batch", "128"]),
    "no budget": ({"grid": [{"sizes": ["s"]}]}, ["grid.0", "tokens_per_parameter"]),
    "one mixture twice": (
        {"arms": {"a": {"web": "1/2", "qa": "1/2"}, "b": {"qa": 0.5, "web": 0.5}}},
        ["arms.b", "same mixture as 'a'"],
    ),
    "names alike": ({"arms": {"a": {"web": 1}, "A": {"qa": 1}}}, ["arms.A", "capitals"]),
    "name for no file": ({"arms": {"a/b": {"web": 1}}}, ["arms.a/b", "file names"]),
    "misspelt key": ({"protocl": {}}, ["protocl", "did you mean 'protocol'"]),
    "misspelt protocol": (
        {"protocol": {"train": {"sequence_lenght": 8}}},
        ["protocol.train.sequence_lenght", "sequence_length"],
    ),
    "the study's own key": (
        {"protocol": {"train": {"sequence_length": 32, "global_batch_size": 4, "steps": 9}}},
        ["protocol.train.steps", "grid"],
    ),
    "ours": ({"ours": {"protocol.optim.lr": "why"}}, ["ours.protocol.optim.lr", "names no setting"]),
    "baseline": ({"baseline": "mixd"}, ["baseline", "did you mean 'mixed'"]),
    "cost": ({"costs": {"device": "Abacus 9000", "mfu": 0.4}}, ["costs.device", "flops_per_second"]),
    "layout": (
        {"sizes": {"s": {"model": TINY, "ranks": 3}}, "grid": [{"tokens": [999]}]},
        ["global_batch_size", "sizes.s.ranks"],
    ),
    "heads": ({"sizes": {"s": {"model": {**TINY, "num_attention_heads": 5}}}, "grid": [{"tokens": [999]}]}, ["sizes.s.model"]),
    "seed twice": ({"seeds": [1, 1]}, ["seeds", "twice"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_studies_are_refused(case: str, tmp_path: Path) -> None:
    changes, words = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        expanded(tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        expanded(tmp_path, arms={"a": {"web": 0.9}, "b": {"wev": 1}}, baseline="c")
    assert len(caught.value.problems) == 3


def test_two_arms_of_one_name_are_refused(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    text = file.read_text().replace("  mixed:", "  natural:")
    file.write_text(text)
    with pytest.raises(UserError, match="natural"):
        load_study(file)


def test_small_sources_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    write_source(tmp_path / "web", 0, 40_000)
    write_source(tmp_path / "qa", 1, 500)  # 15 windows; the arms want 32, and a third of that
    file = write_study(tmp_path)
    study, runs = expanded(tmp_path)
    with pytest.raises(UserError, match="too small for their share and cap") as caught:
        check_sources(study, runs, open_sources(study, runs))
    assert "synthetic, 1,024 tokens" in str(caught.value) and "mixed" not in str(caught.value)
    with pytest.raises(UserError, match="too small"):
        main(["submit", str(file), "--local"])
    assert not (tmp_path / "study").exists()
    # a cap of three epochs allows it, and the epochs are reported
    study, runs = expanded(tmp_path, "sources.qa.max_epochs=3")
    uses = check_sources(study, runs, open_sources(study, runs))
    largest = next(run for run in runs if run.arm == "synthetic")
    assert uses[use_key(largest)]["qa"].epochs == pytest.approx(32 / 15)


def test_limits_of_unique_tokens_count_epochs(tmp_path: Path) -> None:
    write_source(tmp_path / "web", 0, 40_000)
    write_source(tmp_path / "qa", 1, 40_000)
    study, runs = expanded(tmp_path, "sources.web.unique_tokens=320", "sources.web.max_epochs=.inf")
    uses = check_sources(study, runs, open_sources(study, runs))
    assert uses[use_key(runs[0])]["web"].epochs == pytest.approx(32 / 10)


def test_expected_tokens_stand_for_a_source_that_is_not_prepared(tmp_path: Path) -> None:
    study, runs = expanded(tmp_path, "sources.web.tokens=2000", "sources.qa.tokens=500", "protocol.model.vocab_size=300")
    sources = open_sources(study, runs)
    assert sources.missing == (str(tmp_path / "web"), str(tmp_path / "qa"))
    with pytest.raises(UserError, match="synthetic"):
        check_sources(study, runs, sources)
    with pytest.raises(UserError, match="not prepared"):
        require_prepared(study, sources)


def test_costs(tmp_path: Path) -> None:
    study, runs = expanded(tmp_path, "costs={device: H100 SXM, mfu: 0.5, price_per_hour: 2}")
    cost = cost_of(study, runs[0], 256)
    assert cost.flops == runs[0].flops(256)
    assert cost.hours == pytest.approx(cost.flops / (989e12 / 2) / 3600)
    assert cost.money == pytest.approx(2 * cost.hours)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "study").glob("*.yaml")))
def test_shipped_studies_expand(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study(ROOT / "configs" / "study" / name)
    runs = expand(study)
    assert len({run.id for run in runs}) == len(runs) > 10
    if study.prepare is None:  # what is planned before its text exists
        assert main(["plan", str(ROOT / "configs" / "study" / name)]) == 0
        assert "device-hours" in capsys.readouterr().out


def test_the_grid_of_the_paper() -> None:
    study = load_study(ROOT / "configs" / "study" / "paper.yaml")
    runs = expand(study)
    assert len(study.arms) == 10 and {study.family(arm) for arm in study.arms} == {"", "hq", "qa", "txbk"}
    assert {float(study.share(arm)) for arm in study.arms} == {0, 0.33, 0.67, 1}
    by_data = {run.budget for run in runs if run.size == "1b"}
    assert min(by_data) == 1e9 and max(by_data) == 200e9
    by_size = [run.parameters for run in runs if run.budget == 50e9 and run.arm == "natural"]
    assert min(by_size) == pytest.approx(1e8, rel=0.02) and max(by_size) == pytest.approx(3e9, rel=0.02)
    assert len(runs) == 10 * (len(by_data) + len(by_size) - 1)


def test_planning_needs_no_torch() -> None:
    code = "import sys; from megatron_synth.cli.study import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    file = ROOT / "configs" / "study" / "paper.yaml"
    subprocess.run([sys.executable, "-c", code, "plan", str(file)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
