"""`mix plan`, `mix show` and `mix audit`, on sources and run directories that are written here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_synth.cli import main as cli
from megatron_synth.cli.mix import audit_ledger
from megatron_synth.config.errors import UserError
from megatron_synth.config.load import digest, load_file, to_yaml
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.mixing.ledger import Ledger
from megatron_synth.data.shards.columns import text_id
from megatron_synth.data.shards.selection import SelectedSource
from megatron_synth.train.dryrun import dry_run
from megatron_synth.train.record import metrics
from megatron_synth.train.record.run_dir import RunDir
from tests.support import (
    GLOBAL_BATCH_SIZE,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    with_columns,
    with_masks,
    write_config,
    write_corpus,
    write_source,
)

PHASES: list[dict[str, Any]] = [
    {"tokens": 1200, "ratios": {"web": 1}},
    {"until": 3000, "ramp": {"from": {"web": 1}, "to": {"web": "1/4", "qa": "3/4"}, "blocks": 5}},
    {"ratios": {"web": "1/4", "qa": "3/4"}},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    backend = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCAB_SIZE)}, unk_token="t0"))
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def plain(tmp_path: Path, corpus: Path) -> Path:
    return write_config(tmp_path / "plain.yaml", corpus)


@pytest.fixture
def phased(tmp_path: Path, corpus: Path) -> Path:
    file = tmp_path / "phased.yaml"
    content = yaml.safe_load(write_config(file, corpus).read_text())
    content["data"]["phases"] = PHASES
    for source in content["data"]["sources"].values():
        del source["ratio"]
    content["data"]["sources"]["web"]["unique_tokens"] = 40 * SEQUENCE_LENGTH
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def rows(text: str, name: str) -> list[list[str]]:
    """The table rows that begin with a name."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.split()[:1] == [name]]


def test_plan_tells_shares_epochs_and_ends_by_phase(phased: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mix", "plan", str(phased)]) == 0
    out = capsys.readouterr().out
    order = open_data(load_file(Config, phased)).plan
    assert "160 samples of 32 tokens = 5,120 tokens" in out
    # 1200 and 3000 tokens are 37.5 and 93.75 samples
    assert "phase 0: samples 0 to 38, 38 of 32 tokens = 1,216 tokens\n" in out
    assert "phase 1: samples 38 to 94, 56 of 32 tokens = 1,792 tokens, a ramp in 5 blocks\n" in out
    assert "phase 2: samples 94 to 160, 66 of 32 tokens" in out
    web = rows(out, "web")
    assert web[0][1:] == ["1", "100.0000%", "100.0000%", "+0.00", "38", "1,216", "0.950", "0.950", "-"]
    taken = [order.counts(end)[0] for end in (38, 94, 160)]
    assert [row[5] for row in web[1:3]] == [str(taken[1] - 38), str(taken[2] - taken[1])]
    assert web[1][1] == "1 -> 1/4" and web[2][8] == f"{taken[2] / 40:.3f}"
    # in all: tokens, those in use, epochs
    assert web[3][2:5] == [f"{taken[2] * 32:,}", "1,280", f"{taken[2] / 40:.3f}"]


def test_plan_shows_when_a_source_runs_out_and_then_refuses(phased: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mix", "plan", str(phased), "data.sources.web.max_epochs=1"]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    order = open_data(load_file(Config, phased)).plan
    out = next(row[9] for row in rows(captured.out, "web") if row[-1] != "-")
    assert order.counts(int(out))[0] == 40 and order.counts(int(out) + 1)[0] == 41
    assert "web: has 40 unique windows (1280 tokens)" in captured.err


def test_a_dry_run_has_the_phases_too(phased: Path) -> None:
    text = dry_run(load_file(Config, phased), 1)
    assert "a ramp in 5 blocks" in text and rows(text, "qa")[0][-1].endswith("steps")
    with pytest.raises(UserError, match=r"data\.phases: end after 94 samples"):
        dry_run(
            load_file(Config, phased, ["data.phases=[{until: 3000, ratios: {web: 1}}]", "data.sources.web.max_epochs=9"]), 1
        )


def test_plan_without_phases_or_data(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mix", "plan", str(plain), f"data.sources.qa.path={tmp_path / 'none'}", "train.steps=15"]) == 0
    out = capsys.readouterr().out
    assert rows(out, "web")[-1][1:4] == ["2/3", "2,560", "2,496"]
    assert rows(out, "qa")[-1][1:4] == ["1/3", "1,280", "not prepared"]


@pytest.mark.parametrize("sample", [0, 37, 60, 93, 94, 159])
def test_show_names_the_file_the_documents_and_the_text(
    sample: int, phased: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["mix", "show", str(phased), str(sample), "--text"]) == 0
    out = capsys.readouterr().out
    data = open_data(load_file(Config, phased))
    [[source_id], [window]] = (part.tolist() for part in data.plan.locate([sample]))
    expected = np.empty(SEQUENCE_LENGTH + 1, dtype=np.int64)
    data.sources[source_id].read_window(window, expected)
    # the files and offsets hold the sample
    found = [
        np.fromfile(file, dtype=np.uint16)[int(first) : int(last) + 1]
        for file, first, last in re.findall(r"file +(\S+): tokens (\d+) to (\d+) of", out)
    ]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    # so does the text, document by document, and the table of documents covers it
    parts = out.split("\n--- document ")[1:]
    assert " ".join(part.split("\n")[1] for part in parts) == " ".join(f"t{token}" for token in expected)
    documents = re.findall(r"^ +(\d+) +\d+ of shard-\d+ +(\d+) ", out, flags=re.MULTILINE)
    assert sum(int(tokens) for _, tokens in documents) == SEQUENCE_LENGTH + 1
    assert [number for number, _ in documents] == [part.split("\n")[0] for part in parts]
    starts = data.sources[source_id].document_starts(window, SEQUENCE_LENGTH)
    assert len(documents) - len(set(starts.tolist()) - {0}) in (1, 2)  # one may begin at the very last token
    phase = 0 if sample < 38 else 1 if sample < 94 else 2
    name = data.plan.names[source_id]
    place = int(data.plan.counts(sample)[source_id])
    epoch, rest = divmod(place, data.plan.epoch_windows[source_id])
    assert f"phase    {phase} of 3" in out and f"source   {name}, its sample {place}: epoch {epoch}, place {rest} of" in out
    assert f"step {sample // GLOBAL_BATCH_SIZE + 1} of" in out


def test_show_marks_what_is_not_learned(plain: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_masks(write_source(tmp_path / "web", 0, 2_500), 0)
    settings = [f"data.sources.web.path={folder}", f"data.tokenizer={corpus / 'tokenizer.json'}"]
    data, marked = open_data(load_file(Config, plain, settings)), 0
    for sample in range(12):
        assert cli.main(["mix", "show", str(plain), str(sample), "--text", *settings]) == 0
        out = capsys.readouterr().out
        [[source_id], [window], _] = (part.tolist() for part in data.plan.places([sample]))
        source = data.sources[source_id]
        tokens, learned = np.empty(SEQUENCE_LENGTH + 1, np.int64), np.ones(SEQUENCE_LENGTH + 1, np.bool_)
        source.read(window * SEQUENCE_LENGTH, tokens)
        if source.masked:
            source.read_learned(window * SEQUENCE_LENGTH, learned)
        assert (f"{learned[1:].sum()} of the {SEQUENCE_LENGTH} labels are learned" in out) == source.masked
        found, inside = [], False
        text = "\n".join(part.split("\n")[1] for part in out.split("\n--- document ")[1:])
        for one in re.findall(r"t\d+|[⟦⟧]", text):
            if one.startswith("t"):
                found.append((one, not inside))
            inside = one == "⟦" if not one.startswith("t") else inside
        assert found == [(f"t{token}", counts) for token, counts in zip(tokens.tolist(), learned.tolist(), strict=True)]
        marked += not learned.all()
    assert marked > 3


def test_audit_refuses_more_learned_labels_than_were_read(plain: Path) -> None:
    plan = open_data(load_file(Config, plain)).plan
    recorded: Any = Ledger.planned(plan, SEQUENCE_LENGTH, 80).to_json()
    most = recorded["sources"]["web"]["tokens"]
    recorded["learned"] = {"tokens": most, "sources": {"web": most, "qa": 5}}
    assert audit_ledger(plan, SEQUENCE_LENGTH, recorded, Path("ledger.json")) == []
    recorded["learned"]["sources"]["web"] += 1
    (found,) = audit_ledger(plan, SEQUENCE_LENGTH, recorded, Path("ledger.json"))
    assert found == ("ledger.json", "web", "learned", f"at most {most}", str(most + 1))


def test_show_refuses_what_is_not_there(phased: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mix", "show", str(plain), "0", "--text", "data.tokenizer=nowhere.json"]) == 2
    assert "nowhere.json: no such tokenizer.json" in capsys.readouterr().err
    ending = "data.phases=[{until: 5120, ratios: {web: 1}}]"
    assert cli.main(["mix", "show", str(phased), "160", ending, "data.sources.web.max_epochs=9"]) == 2
    assert "sample 160: the run has samples 0 to 159" in capsys.readouterr().err
    assert cli.main(["mix", "show", str(plain), "160"]) == 2
    assert "sample 160: the run has samples 0 to 159" in capsys.readouterr().err


# ---- a run whose batch size changed


def changed_run(plain: Path, path: Path, *settings: str) -> Path:
    """20 steps of 8 samples, a checkpoint after them; its configuration now has steps of 4."""
    run = write_run(plain, path, [8] * 20)
    trainer = run.checkpoints / "step_00000020" / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {"step": 20}))
    for name in ("metadata.json", "common.pt", ".metadata"):
        (trainer.parent / name).touch()
    text = to_yaml(load_file(Config, plain, ["train.global_batch_size=4", *settings]))
    (path / "config.yaml").write_text(text)
    return path


def test_plan_and_show_count_what_is_consumed_and_what_remains(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed_run(plain, tmp_path / "run", "train.steps=30")
    assert cli.main(["mix", "plan", str(run)]) == 0
    out = capsys.readouterr().out
    assert "200 samples of 32 tokens = 6,400 tokens, 160 samples in 20 steps of them consumed" in out
    # 78 and 40 windows, five times: 585 samples are 106 steps of 4 after the first 160
    longest = min(open_data(load_file(Config, plain)).plan.longest_run(source) for source in (0, 1))
    assert f"{20 + (longest - 160) // 4} steps" in out
    for sample, step in ((0, 1), (7, 1), (8, 2), (159, 20), (160, 21), (163, 21), (164, 22), (199, 30)):
        assert cli.main(["mix", "show", str(run), str(sample)]) == 0
        assert f"sample   {sample}: step {step} of 30" in capsys.readouterr().out
    assert cli.main(["mix", "show", str(run), "200"]) == 2
    assert "the run has samples 0 to 199" in capsys.readouterr().err


def test_plan_of_a_run_is_held_against_caps_and_phases_with_what_is_consumed(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cap = "data.sources.web.max_epochs=2"  # 156 windows of web: 234 samples
    run = changed_run(plain, tmp_path / "run", "train.steps=38", cap)
    assert cli.main(["mix", "plan", str(run)]) == 0
    assert cli.main(["mix", "plan", str(run), "train.steps=39"]) == 2  # 39 x 4 alone would fit
    assert "236 samples, 160 of them consumed" in capsys.readouterr().err
    assert cli.main(["mix", "plan", str(run), "train.steps=25", "train.global_batch_size=16"]) == 2
    assert cli.main(["mix", "plan", str(run), "train.steps=24", "train.global_batch_size=16", cap]) == 0  # 24 x 16 would not
    phases = "data.phases=[{tokens: 5248, ratios: {web: 2/3, qa: 1/3}}]"  # 164 samples
    ratios = ["data.sources.web.ratio=null", "data.sources.qa.ratio=null"]
    capsys.readouterr()
    assert cli.main(["mix", "plan", str(run), phases, *ratios, "train.steps=21"]) == 0
    assert cli.main(["mix", "plan", str(run), phases, *ratios, "train.steps=22"]) == 2
    assert "end after 164 samples (5248 tokens), the run has 168 (5376 tokens), 160 of them consumed" in capsys.readouterr().err


def test_the_audit_finds_a_source_beyond_its_cap(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = changed_run(plain, tmp_path / "run", "train.steps=20", "data.sources.web.max_epochs=1")
    assert cli.main(["mix", "audit", str(run)]) == 1
    out = capsys.readouterr().out
    assert "1 difference\n" in out and re.search(r"ledger.json +web +samples +at most 78, max_epochs 1 +107", out)


# ---- audit


def write_run(file: Path, path: Path, batches: list[int]) -> RunDir:
    """The records of a run with these batch sizes, as the trainer writes them, from the rows of its batches."""
    config = load_file(Config, file)
    data = open_data(config)
    run = RunDir.create_or_open(path, config, layout="TP1", world_size=1)
    ledger = Ledger.of(data.plan, SEQUENCE_LENGTH)
    writer, samples = metrics.MetricsFile(run.metrics), 0
    for step, size in enumerate(batches, start=1):
        ledger.merge(np.bincount(data.plan.locate(np.arange(samples, samples + size))[0], minlength=len(data.plan.names)))
        samples += size
        counted = ledger.to_json()
        record = {metrics.STEP: step, metrics.TOKENS: counted["tokens"]}
        for name, source in counted["sources"].items():
            record |= {metrics.SHARE + name: source["share"], metrics.EPOCH + name: source["epochs"]}
        writer.append([record])
        if step % 10 == 0:
            run.write_ledger(counted)
            state = {"step": step, "samples": samples, "plan_digest": data.digest, "ledger": ledger.state_dict()}
            folder = run.checkpoints / f"step_{step:08d}"
            folder.mkdir()
            (folder / "trainer.json").write_text(json.dumps(state))
    return run


@pytest.mark.parametrize("kind", ["plain", "phased"])
def test_audit_of_a_run_that_did_as_planned(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the batch size changed in the middle, and the last two steps are not saved
    run = write_run(request.getfixturevalue(kind), tmp_path / "run", [8] * 10 + [4] * 12)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert cli.main(["mix", "audit", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert f"equal: the run consumed what was planned, to the token, in {120 * SEQUENCE_LENGTH:,} tokens" in out
    for name in ("config.yaml", "ledger.json", "metrics.jsonl", "step_00000010/trainer.json", "step_00000020/trainer.json"):
        assert re.search(rf"^read \S*{name}: ", out, flags=re.MULTILINE)
    assert out.count("manifest.json: ") == 2 and "22 steps" in out
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def change_ledger(run: RunDir) -> None:
    ledger = json.loads(run.ledger.read_text())
    ledger["sources"]["web"]["tokens"] -= 1
    run.ledger.write_text(json.dumps(ledger))


def change_metrics(run: RunDir, step: int, **changes: Any) -> None:
    records = metrics.read_metrics(run.metrics)
    records[step - 1] |= changes
    run.metrics.write_text("".join(metrics.encode(record) + "\n" for record in records))


def change_checkpoint(run: RunDir, **changes: Any) -> None:
    file = run.checkpoints / "step_00000010" / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_step(run: RunDir) -> None:
    records = metrics.read_metrics(run.metrics)
    run.metrics.write_text("".join(metrics.encode(record) + "\n" for record in records if record["step"] != 12))


def change_seed(run: RunDir) -> None:
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1234", "seed: 1235"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change_ledger, [r"ledger\.json +web +tokens +(\d+) +\d+$"]),
        (
            lambda run: change_metrics(run, 3, **{"data/share/web": 0.5}),
            [r"metrics\.jsonl +step 3 +data/share/web +\S+ +0\.5$"],
        ),
        (lambda run: change_metrics(run, 3, **{"data/tokens": 767}), [r"metrics\.jsonl +step 3 +data/tokens .* 767$"]),
        (
            lambda run: change_metrics(run, 20, **{"data/tokens": 4736, "data/share/web": 1.0}),
            [r"run +data/tokens .*ledger\.json +none"],
        ),
        (lambda run: change_metrics(run, 2, **{"data/share/books": 0.0}), [r"step 2 +data/share/books +no such source +0\.0"]),
        (drop_step, [r"metrics\.jsonl +step 13 +step +12 +13$", "^1 differences?$"]),
        (
            lambda run: change_checkpoint(run, ledger={"web": 79, "qa": 1}),
            [r"step_00000010/trainer\.json +ledger +qa +\d+ +1$"],
        ),
        (lambda run: change_checkpoint(run, samples=79), [r"step_00000010/trainer\.json +ledger "]),
        (lambda run: change_checkpoint(run, prefix_digest="0" * 16), [r"prefix_digest +[0-9a-f]{16} +0{16}$"]),
        (change_seed, [r"step_00000010/trainer\.json +run +plan_digest", r"step_00000020/trainer\.json +run +plan_digest"]),
    ],
)
def test_audit_finds_a_difference_of_one_token(
    damage: Callable[[RunDir], None], expected: list[str], phased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(phased, tmp_path / "run", [8] * 20)
    damage(run)
    assert cli.main(["mix", "audit", str(run.path)]) == 1
    out = capsys.readouterr().out
    assert "equal" not in out
    for pattern in expected:
        assert re.search(pattern, out, flags=re.MULTILINE), out


def test_audit_of_what_is_no_run(tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mix", "audit", str(tmp_path)]) == 2
    run = write_run(plain, tmp_path / "run", [8] * 3)
    assert cli.main(["mix", "audit", str(run.path)]) == 2
    assert "the run has not saved yet" in capsys.readouterr().err


def test_a_source_that_joined_is_not_missing_in_what_came_before(
    phased: Path, plain: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A phase with another source, added after 80 samples of a mixture without phases."""
    run = write_run(plain, tmp_path / "run", [8] * 10)
    content = yaml.safe_load(plain.read_text())
    content["data"]["sources"]["val"] = {"path": str(corpus / "val"), "max_epochs": 5}
    content["data"]["phases"] = [{"until": 80 * SEQUENCE_LENGTH}, {"ratios": {"web": "1/2", "val": "1/2"}}]
    old, new = open_data(load_file(Config, plain)), tmp_path / "new.yaml"
    new.write_text(yaml.safe_dump(content, sort_keys=False))
    data = open_data(load_file(Config, new))
    assert data.digest != old.digest and data.prefix_digest(80) == old.prefix_digest(80) != data.prefix_digest(81)
    change_checkpoint(run, prefix_digest=old.prefix_digest(80))
    run.write_ledger(Ledger.planned(data.plan, SEQUENCE_LENGTH, 80).to_json())  # as the next save writes it
    (run.path / "config.yaml").write_text(new.read_text())
    assert cli.main(["mix", "audit", str(run.path)]) == 0, capsys.readouterr().out


def test_show_refuses_what_comes_after_the_run(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = load_file(Config, plain).total_samples
    assert cli.main(["mix", "show", str(plain), f"{total - 2}-{total - 1}"]) == 0
    capsys.readouterr()
    for asked in (f"{total}", f"0-{total}"):
        assert cli.main(["mix", "show", str(plain), asked]) == 2
        assert f"sample {total}: the run has samples 0 to {total - 1}" in capsys.readouterr().err


def test_documents_that_are_chosen_are_a_source_like_others(
    plain: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_columns(tmp_path / "scored", 4, 30_000)
    changes = [
        "data.sources.web={path: " + str(tmp_path / "scored") + ", ratio: 2/3, where: score >= 0.5}",
        "data.sources.qa={path: " + str(tmp_path / "scored") + ", ratio: 1/3, max_epochs: 2, where: score < 0.1}",
        f"data.cache={tmp_path / 'cache'}",
    ]
    assert cli.main(["mix", "plan", str(plain), *changes]) == 0
    out = capsys.readouterr().out
    data = open_data(load_file(Config, plain, changes))
    web = data.sources[0]
    assert isinstance(web, SelectedSource)
    assert f"web: {web.num_documents:,} of {web.base.num_documents:,} documents of" in out and "where score >= 0.5" in out
    assert rows(out, "web")[-1][1:4] == ["2/3", f"{data.plan.counts(160)[0] * 32:,}", f"{web.num_windows(32) * 32:,}"]
    for sample in (0, 77, 159):
        assert cli.main(["mix", "show", str(plain), str(sample), *changes]) == 0
        out = capsys.readouterr().out
        [[source_id], [window]] = (part.tolist() for part in data.plan.locate([sample]))
        expected = np.empty(SEQUENCE_LENGTH + 1, dtype=np.int64)
        data.sources[source_id].read_window(window, expected)
        found = [
            np.fromfile(file, dtype=np.uint16)[int(first) : int(last) + 1]
            for file, first, last in re.findall(r"file +(\S+): tokens (\d+) to (\d+) of", out)
        ]
        np.testing.assert_array_equal(np.concatenate(found), expected)
    # another choice is another run, another spelling is not
    spelled = [changes[0].replace("score >= 0.5", "(score >= 0.50)"), *changes[1:]]
    other = [changes[0].replace("0.5", "0.6"), *changes[1:]]
    assert open_data(load_file(Config, plain, spelled)).digest == data.digest
    assert open_data(load_file(Config, plain, other)).digest != data.digest
    # without it the digest of a configuration is what it was; the cache never counts
    assert digest(load_file(Config, plain)) == digest(load_file(Config, plain, changes[2:]))
    assert cli.main(["mix", "plan", str(plain), "data.sources.web.where=score >"]) == 2
    assert "data.sources.web.where: 'score >': no expression" in capsys.readouterr().err


def test_documents_whose_parent_is_evaluated_are_left_out(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # parents are named 0 to 16, and the documents of the domain 4 to 6
    with_columns(tmp_path / "rephrased", 1, 30_000)
    with_columns(tmp_path / "valid", 4, 3_000)
    changes = [
        "data.sources.web={path: " + str(tmp_path / "rephrased") + ", ratio: 2/3}",
        "data.validation=null",
        "data.validation.valid.path=" + str(tmp_path / "valid"),
        "data.exclude_parents_of=validation",
        f"data.cache={tmp_path / 'cache'}",
    ]
    data = open_data(load_file(Config, plain, changes))
    web, qa = data.sources
    assert isinstance(web, SelectedSource) and not isinstance(qa, SelectedSource)
    gone = [text_id(str(number)) for number in (4, 5, 6)]
    _, parents = web.base.column("parent")
    assert web.num_documents == sum(int((~np.isin(values, gone)).sum()) for values in parents) < web.base.num_documents
    # with `where`, both hold
    changes[0] = changes[0].replace("2/3", "2/3, where: score >= 0.5")
    web = open_data(load_file(Config, plain, changes)).sources[0]
    assert isinstance(web, SelectedSource)
    _, scores = web.base.column("score")
    kept = [(~np.isin(ids, gone)) & (values >= 0.5) for ids, values in zip(parents, scores, strict=True)]
    assert web.num_documents == sum(int(mask.sum()) for mask in kept)
    # the same is left out of what is planned, and without the domain nothing can be said
    assert cli.main(["mix", "plan", str(plain), *changes]) == 0
    planned = capsys.readouterr().out
    assert "and no parent is evaluated" in planned
    # what was made from other text, and does not say from which
    note = "note: data.sources.qa: {} is of kind other and has no column of type parent: data.exclude_parents_of leaves nothing"
    assert note.format(qa.path) in planned and note.format(qa.path).replace("note: ", "") in "\n".join(data.notes)
    assert "is of kind" not in "".join(open_data(load_file(Config, plain)).notes)
    assert cli.main(["mix", "plan", str(plain), "data.validation=null", "eval.interval=null", changes[3]]) == 2
    assert "data.exclude_parents_of: validation: there is no domain" in capsys.readouterr().err
    for changed in (changes[1:], [*changes, "data.validation.val.path=" + str(plain.parent / "none")]):
        with pytest.raises(UserError, match=r"data\.exclude_parents_of: no source has a column of type parent|not found"):
            open_data(load_file(Config, plain, changed))
