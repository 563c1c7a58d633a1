"""Labels that are not learned, chosen documents and losses by their values: the same in every layout, and a plain loop."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_synth.cli import main
from megatron_synth.config.load import load_file
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.shards.source import open_source
from megatron_synth.train.record import metrics
from tests.dist.conftest import Run, Train
from tests.dist.layouts.test_huggingface import load_llama
from tests.dist.pool import RankPool
from tests.support import (
    GLOBAL_BATCH_SIZE,
    SEQUENCE_LENGTH,
    assert_same_losses,
    read_ledger,
    read_metrics,
    rewound,
    with_columns,
    with_masks,
)

MASKS = ("data.document_masks=true", "data.eod_mask_loss=true", "train.micro_batch_size=4")
ONE_STEP = ("train.steps=1", "optim.warmup_steps=0")
Document = tuple[np.ndarray, np.ndarray, str]
"""Tokens, which of them are learned, and its kind."""
Stream = tuple[np.ndarray, np.ndarray, list[str]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run whose first source and first domain are chosen documents with prompts."""
    folder = tmp_path_factory.mktemp("learned")
    for seed, (name, tokens) in enumerate({"web": 6_000, "val": 1_500}.items(), start=40):
        with_masks(with_columns(folder / name, seed, tokens), seed)
    where = "score >= 0.3 or kind == 'qa'"
    chosen = [f"data.{kind}.path={folder / kind[-3:]}" for kind in ("sources.web", "validation.val")]
    chosen += [f"data.{kind}.where={where}" for kind in ("sources.web", "validation.val")]
    return (*chosen, f"data.cache={folder / 'cache'}", "log.loss_by=[kind]", "train.steps=6", "eval.interval=3")


@pytest.mark.parametrize(("layout", "masks"), [("tp2", ()), ("tp2cp2", ()), ("pp2vp2", MASKS), ("dp2", MASKS)])
def test_every_layout_is_the_same_run(
    layout: str, masks: tuple[str, ...], settings: tuple[str, ...], trained: Callable[..., Run]
) -> None:
    reference, run = trained("single", *settings, *masks), trained(layout, *settings, *masks)
    assert_same_losses(run.records, reference.records, 1e-5)
    assert run.ledger == reference.ledger
    kinds = [name for record in reference.records for name in metrics.parts(record, metrics.LOSS_BY)]
    assert set(kinds) == {"kind/qa", "kind/text", "kind/code", "kind/(none)"} and len(kinds) >= 2 * len(reference.records)
    assert metrics.parts(reference.records[-1], metrics.EVAL_LOSS_BY).keys() == set(kinds)


def test_resuming_is_bit_equal_and_goes_on_counting(
    settings: tuple[str, ...], trained: Callable[..., Run], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*settings, "checkpoint.interval=3")
    reference = trained("dp2", *more)
    run = rewound(reference.path, tmp_path / "run", 3)
    train(run, "dp2", *more)
    assert_same_losses(read_metrics(run), reference.records, 0)
    assert read_ledger(run) == reference.ledger
    learned = reference.ledger["learned"]["sources"]
    assert 0 < learned["web"] < reference.ledger["sources"]["web"]["tokens"]
    assert learned["qa"] == reference.ledger["sources"]["qa"]["tokens"]
    assert "earlier" not in reference.ledger["learned"]
    audited(run, capsys, 0, r"^counted learned tokens of 48 samples again.*those of 2 records$", "^equal: ")


def audited(run: Path, capsys: pytest.CaptureFixture[str], code: int, *expected: str) -> None:
    """`mix audit` ends with this code and prints lines that match."""
    capsys.readouterr()
    assert main.main(["mix", "audit", str(run)]) == code
    out = capsys.readouterr().out
    for pattern in expected:
        assert re.search(pattern, out, flags=re.MULTILINE), out


def changed(file: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a file of JSON."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_audit_finds_a_false_number_of_learned_tokens(
    settings: tuple[str, ...], trained: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = trained("dp2", *settings, "checkpoint.interval=3")
    learned = reference.ledger["learned"]

    def planted(name: str, change: Callable[[Any], None], file: str = "ledger.json") -> Path:
        run = tmp_path / name
        shutil.copytree(reference.path, run)
        changed(run / file, change)
        return run

    def add(content: Any, source: str, count: int) -> None:
        content["learned"]["sources"][source] += count
        content["learned"]["tokens"] += count

    due = learned["sources"]
    for number, (source, count) in enumerate((("web", 1), ("web", -1), ("qa", 1), ("web", 10_000))):
        run = planted(f"source{number}", lambda content, source=source, count=count: add(content, source, count))
        line = rf"^ *ledger\.json +{source} +learned +{due[source]} +{due[source] + count}$"
        audited(run, capsys, 1, "^1 difference$", line)
    run = planted("sum", lambda content: content["learned"].update(tokens=learned["tokens"] - 1))
    audited(run, capsys, 1, "^1 difference$", rf"learned +tokens +{learned['tokens']} +{learned['tokens'] - 1}$")
    file = "checkpoints/step_00000003/trainer.json"
    run = planted("checkpoint", lambda content: content["labels"].update(web=content["labels"]["web"] + 1), file)
    audited(run, capsys, 1, "^1 difference$", r"step_00000003/trainer\.json +web +learned +\d+ +\d+$")

    run = planted("short", lambda content: None)
    file = run / "metrics.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-1]))
    audited(run, capsys, 1, r"^learned tokens of ledger\.json: not compared: .*metrics\.jsonl ends before", "^1 difference$")

    run = planted("old", lambda content: content.pop("learned"))
    for checkpoint in (run / "checkpoints").glob("step_*/trainer.json"):
        changed(checkpoint, lambda content: content.pop("labels"))
    audited(run, capsys, 0, "^learned tokens: not recorded by this run", "^equal: ")


def test_labels_counted_under_other_settings_are_kept_apart(
    settings: tuple[str, ...], trained: Callable[..., Run], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*settings, "checkpoint.interval=3")
    reference = trained("dp2", *more)
    run = rewound(reference.path, tmp_path / "run", 3)
    train(run, "dp2", *more, "data.eod_mask_loss=true")
    learned, before = read_ledger(run)["learned"], reference.ledger["learned"]["sources"]
    assert learned["earlier"]["samples"] == 3 * GLOBAL_BATCH_SIZE
    assert all(learned["earlier"]["sources"][name] < learned["sources"][name] < before[name] for name in ("web", "qa"))
    audited(run, capsys, 0, "those of 2 records$", "^equal: ")
    changed(run / "ledger.json", lambda content: content["learned"]["sources"].update(qa=before["qa"]))
    audited(run, capsys, 1, "^1 difference$", rf"ledger\.json +qa +learned +{learned['sources']['qa']} +{before['qa']}$")


def test_a_branch_counts_the_learned_tokens_of_its_trunk(
    settings: tuple[str, ...], trained: Callable[..., Run], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*settings, "checkpoint.interval=3")
    reference = trained("dp2", *more)
    run = tmp_path / "branch"
    train(run, "dp2", *more, f"checkpoint.branch_from={reference.path}@3")
    assert read_ledger(run)["learned"] == reference.ledger["learned"]
    audited(run, capsys, 0, "^counted learned tokens of 48 samples again", "^equal: ")


def documents(path: str) -> Iterator[Document]:
    """The chosen documents of a source, one after the other, read the plain way."""
    source = open_source(path, "s")
    kinds, scores = source.column("kind"), source.column("score")
    for number in range(len(source.manifest.shards)):
        shard = source.shard(number)
        bits = np.fromfile(shard.bin_path.with_suffix(".learned"), np.uint8)
        edges = [*shard.document_starts(0, shard.num_tokens).tolist(), shard.num_tokens]
        for place, (begin, end) in enumerate(pairwise(edges)):
            kind, score = kinds[1][number][place], scores[1][number][place]
            name = "(none)" if kind < 0 else kinds[0].categories[kind]
            if name == "qa" or score >= np.float32(0.3):
                learned = np.array([bits[token // 8] >> (token % 8) & 1 for token in range(begin, end)], bool)
                yield np.array(shard.tokens[begin:end], np.int64), learned, name


def plain(path: str) -> Iterator[Document]:
    """All of a source without columns, as one document."""
    source = open_source(path, "s")
    tokens = np.concatenate([source.shard(number).tokens for number in range(len(source.manifest.shards))])
    yield tokens.astype(np.int64), np.ones(len(tokens), bool), "no column"


def stream(found: Iterator[Document]) -> Stream:
    """Documents joined: tokens, which are learned, and the kind of each."""
    every = list(found)
    tokens, learned = (np.concatenate([one[part] for one in every]) for part in (0, 1))
    return tokens, learned, [kind for one, _, kind in every for _ in range(len(one))]


def window(found: Stream, number: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Tokens [L + 1] of a window, and of its labels which are learned and the kinds."""
    begin, end = number * SEQUENCE_LENGTH, (number + 1) * SEQUENCE_LENGTH + 1
    return torch.from_numpy(found[0][begin:end]), found[1][begin + 1 : end], found[2][begin + 1 : end]


def test_losses_are_those_of_a_plain_loop_over_the_chosen_documents(
    settings: tuple[str, ...], ranks: RankPool, trained: Callable[..., Run], config: Path, tmp_path: Path
) -> None:
    """transformers' Llama: loss of a first step by source and kind, and of an evaluation before it; to 1e-6."""
    ranks.run(1, "tests.dist.layouts.hf_jobs.export_initial", str(config), [], str(tmp_path / "hf"))
    model = load_llama(tmp_path / "hf")
    paths = {one.split(".path=")[0].rpartition(".")[2]: one.split(".path=")[1] for one in settings if ".path=" in one}
    records = trained("single", *settings, *ONE_STEP, "eval.at_start=true").records
    start, first = records

    def losses_of(tokens: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
            return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double().numpy()

    def means_of(sums: dict[str, list[float]]) -> dict[str, float]:
        return {name: math.fsum(losses) / len(losses) for name, losses in sums.items()}

    def add(by_kind: dict[str, list[float]], found: Stream, number: int) -> list[float]:
        """The losses of a window's labels that count; by_kind: takes them, too."""
        tokens, learned, kinds = window(found, number)
        counted = [(loss, kind) for loss, counts, kind in zip(losses_of(tokens), learned, kinds, strict=True) if counts]
        for loss, kind in counted:
            by_kind[kind].append(loss)
        return [loss for loss, _ in counted]

    by_kind: dict[str, list[float]] = defaultdict(list)
    found = stream(documents(paths["val"]))
    every = [loss for number in range((len(found[0]) - 1) // SEQUENCE_LENGTH) for loss in add(by_kind, found, number)]
    assert start[metrics.EVAL_DOMAIN_TOKENS + "val"] == len(every)
    assert math.isclose(start[metrics.EVAL_DOMAIN_LOSS + "val"], math.fsum(every) / len(every), abs_tol=1e-6)
    expected = {f"kind/{kind}": mean for kind, mean in means_of(by_kind).items()}
    assert metrics.parts(start, metrics.EVAL_LOSS_BY) == pytest.approx(expected, abs=1e-6)

    run = load_file(Config, config, [*settings, *ONE_STEP])
    data = open_data(run)
    streams = [stream(documents(paths["web"])), stream(plain(run.data.sources["qa"].path))]
    by_kind, by_source = defaultdict(list), defaultdict(list)
    for source_id, number, _ in zip(*(part.tolist() for part in data.plan.places(range(GLOBAL_BATCH_SIZE))), strict=True):
        by_source[data.plan.names[source_id]] += add(by_kind, streams[source_id], number)
    assert metrics.parts(first, metrics.SOURCE_LOSS) == pytest.approx(means_of(by_source), abs=1e-6)
    del by_kind["no column"]
    expected = {f"kind/{kind}": mean for kind, mean in means_of(by_kind).items()}
    assert metrics.parts(first, metrics.LOSS_BY) == pytest.approx(expected, abs=1e-6)
    every = [loss for losses in by_source.values() for loss in losses]
    assert math.isclose(first[metrics.LOSS], math.fsum(every) / len(every), abs_tol=1e-6)
    assert len(every) < GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
