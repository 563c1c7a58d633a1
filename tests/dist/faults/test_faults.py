"""What users do wrong: exit code 2, one message that names the file or key, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.dist.conftest import Run
from tests.dist.pool import RankPool, RankResult
from tests.support import LAYOUTS, PIPELINE, TENSOR, snapshot, write_config, write_corpus, write_source


@dataclass(frozen=True)
class Case:
    """A fault: what is done to the corpus before, the settings, and what the message must say ({corpus} filled in)."""

    says: tuple[str, ...]
    settings: tuple[str, ...] = ()
    harm: Callable[[Path], object] = field(default=lambda corpus: None)
    world_size: int = 1


def _truncate(corpus: Path) -> None:
    file = corpus / "web" / "shard-00001.bin"
    file.write_bytes(file.read_bytes()[:-2])


def _other_tokenizer(corpus: Path) -> None:
    shutil.rmtree(corpus / "qa")
    write_source(corpus / "qa", 1, 1_300, fingerprint="1" * 64)


CASES = {
    "typo in a key": Case(("train.micro_batchsize", "did you mean", "micro_batch_size"), ("train.micro_batchsize=2",)),
    "typo in a section": Case(("optin", "did you mean", "optim"), ("optin.lr=1e-3",)),
    "wrong type": Case(("train.steps", "many"), ("train.steps=many",)),
    "ratios do not sum to 1": Case(("data.sources", "web 1/2", "5/6"), ("data.sources.web.ratio=1/2",)),
    "no such source": Case(("{corpus}/nowhere", "qa"), ("data.sources.qa.path={corpus}/nowhere",)),
    "missing shard": Case(("{corpus}/web/shard-00001.bin",), harm=lambda c: (c / "web" / "shard-00001.bin").unlink()),
    "missing index": Case(("{corpus}/web/shard-00000.idx",), harm=lambda c: (c / "web" / "shard-00000.idx").unlink()),
    "truncated shard": Case(("{corpus}/web/shard-00001.bin", "2500 bytes", "2498 bytes"), harm=_truncate),
    "missing validation domain": Case(("{corpus}/val2", "val2"), harm=lambda c: shutil.rmtree(c / "val2")),
    "tokenizers differ": Case(("'web'", "'qa'", "tokenizer"), harm=_other_tokenizer),
    "vocabulary too small": Case(("model.vocab_size", "100", "256"), ("model.vocab_size=100",)),
    "source too small": Case(("data.sources", "qa", "max_epochs", "train.steps"), ("data.sources.qa.max_epochs=1",)),
    "validation too small": Case(
        ("data.validation.val", "one full window"),
        ("train.sequence_length=512", "data.sources.web.max_epochs=.inf", "data.sources.qa.max_epochs=.inf"),
    ),
    "indivisible ranks": Case((TENSOR.partition(".")[0], "TP2"), (f"{TENSOR}=2",)),
    "indivisible layers": Case(("model.num_layers", "5", "4 or 6"), ("model.num_layers=5", f"{PIPELINE}=2"), world_size=2),
    "indivisible heads": Case((TENSOR, "num_query_groups"), (f"{TENSOR}=2", "model.num_query_groups=1"), world_size=2),
    "indivisible batch": Case(
        ("train.global_batch_size", "micro_batch_size 8 x 2"), ("train.micro_batch_size=8",), world_size=2
    ),
    "init_from missing": Case(("checkpoint.init_from", "{corpus}/elsewhere"), ("checkpoint.init_from={corpus}/elsewhere",)),
    "init_from missing, 2 ranks": Case(
        ("checkpoint.init_from", "{corpus}/elsewhere"), ("checkpoint.init_from={corpus}/elsewhere",), world_size=2
    ),
}


def _assert_one_error(results: list[RankResult], says: tuple[str, ...]) -> None:
    assert [result.value for result in results] == [2] * len(results)
    first, *others = results
    assert first.stderr.startswith("error: ") and first.stderr.count("error:") == 1, first.stderr
    assert "Traceback" not in first.stderr
    assert [result.stderr for result in others] == [""] * len(others)
    for text in says:
        assert text in first.stderr, first.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_start_says_why_and_leaves_nothing(name: str, ranks: RankPool, tmp_path: Path) -> None:
    case = CASES[name]
    corpus = write_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "base.yaml", corpus)
    case.harm(corpus)
    run = tmp_path / "runs" / "run"
    settings = [setting.format(corpus=corpus) for setting in case.settings]
    arguments = ["train", str(config), *settings, "--run-dir", str(run)]
    results = ranks.run(case.world_size, "megatron_synth.cli.main.main", arguments)
    _assert_one_error(results, tuple(text.format(corpus=corpus) for text in case.says))
    assert not run.parent.exists()


def test_all_problems_of_a_configuration_come_at_once(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    settings = ["train.stpes=3", "optim.lr=-1", "parallel.tensor_model_parallel_size=0", "log.interval=often"]
    results = ranks.run(1, "megatron_synth.cli.main.main", ["train", str(config), *settings, "--run-dir", str(tmp_path / "run")])
    _assert_one_error(results, ("4 problems", "train.stpes", "optim.lr", TENSOR, "log.interval"))


def test_a_missing_configuration_is_named(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(1, "megatron_synth.cli.main.main", ["train", str(tmp_path / "none.yaml")])
    _assert_one_error(results, (str(tmp_path / "none.yaml"),))


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_room_for_a_checkpoint(world_size: int, ranks: RankPool, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    arguments = ["train", str(config), "--run-dir", str(run)]
    results = ranks.run(world_size, "tests.dist.jobs.train_on_a_full_disk", arguments, 100_000)
    _assert_one_error(results, (str(run), "100k bytes free"))
    assert not run.parent.exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_is_no_run_is_not_touched(world_size: int, ranks: RankPool, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    results = ranks.run(world_size, "megatron_synth.cli.main.main", ["train", str(config), "--run-dir", str(run)])
    _assert_one_error(results, (str(run), "not a run directory"))
    assert snapshot(run) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("below", ["run", "file/run"])
def test_a_file_in_the_way(below: str, ranks: RankPool, config: Path, tmp_path: Path) -> None:
    file = tmp_path / below.partition("/")[0]
    file.write_text("in the way")
    results = ranks.run(1, "megatron_synth.cli.main.main", ["train", str(config), "--run-dir", str(tmp_path / below)])
    _assert_one_error(results, (str(tmp_path / below),))
    assert file.read_text() == "in the way"


def test_init_from_another_model(ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    settings = [f"checkpoint.init_from={trained('single').path}", "model.num_layers=2"]
    results = ranks.run(1, "megatron_synth.cli.main.main", ["train", str(config), *settings, "--run-dir", str(run)])
    _assert_one_error(results, (str(trained("single").path), "model.num_layers was 4 and is now 2"))
    assert not run.parent.exists()


def test_a_damaged_run_json_is_named(ranks: RankPool, config: Path, trained: Callable[..., Run], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("dp2").path, run)
    (run / "run.json").write_text("{")
    before = snapshot(run)
    results = ranks.run(LAYOUTS["dp2"][0], "megatron_synth.cli.main.main", ["train", str(config), "--run-dir", str(run)])
    _assert_one_error(results, (f"{run}/run.json",))
    assert snapshot(run) == before


def test_a_flipped_bit_is_found_before_it_is_trained_on(ranks: RankPool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "base.yaml", corpus)
    shard = corpus / "web" / "shard-00001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.write_bytes(content)
    arguments = ["train", str(config), "data.verify=blocks", "--run-dir", str(tmp_path / "run")]
    (result,) = ranks.run(1, "megatron_synth.cli.main.main", arguments)
    assert result.value == 2
    assert "shard-00001.bin, block 0" in result.stderr and "Traceback" not in result.stderr


def test_tensor_parallel_ranks_on_two_nodes(ranks: RankPool, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(config), f"{TENSOR}=2", "train.steps=4", "--run-dir", str(run)]
    results = ranks.run(2, "tests.dist.jobs.train_on_nodes", arguments, ["east", "west"])
    assert [result.value for result in results] == [2, 2] and not run.exists()
    assert "rank 0 on east, rank 1 on west" in results[0].stderr and results[1].stderr == ""
    results = ranks.run(2, "tests.dist.jobs.train_on_nodes", [*arguments, "--allow-tp-across-nodes"], ["east", "west"])
    assert [result.value for result in results] == [0, 0], results[0].stderr
