"""Loops that really generate and train, to their page; killed while text is written, and gone on with by two at once."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_synth.cli.study import main
from megatron_synth.config.errors import UserError
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.data.shards.source import open_source
from megatron_synth.study.execute.folder import Folder, Job
from megatron_synth.study.plan.corpora import Corpus
from megatron_synth.study.plan.runs import Run, expand, jobs_of
from megatron_synth.study.plan.study_file import load_study
from megatron_synth.synthesis.answers.parts import lines
from tests.unit.study.test_study_file import TINY, study_of
from tests.unit.study.test_study_run import command
from tests.unit.synthesis.conftest import write_parents

pytest.importorskip("transformers", reason="the embedded engine needs megatron-synth[synthesis]")

ROUNDS = 2


@pytest.fixture(scope="module")
def natural(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text of simple sentences; 60 documents."""
    folder = tmp_path_factory.mktemp("natural")
    source = {"kind": "natural", "input": [str(write_parents(folder))], "holdout": "1/10"}
    config = {"output": str(folder / "data"), "tokenizer": {"train": {"vocab_size": 300}}, "sources": {"web": source}}
    prepare(PrepareConfig.model_validate(config))
    return folder


def write(natural: Path, output: Path, **changes: Any) -> Path:
    """A loop of two rounds by models of some thousand parameters, trained for 20 steps."""
    template = natural / "continue.yaml"
    template.write_text(
        "name: go-on\nversion: 1\norigin: ours\nsource_kind: other\nparent_tokens: 12\nmin_parent_tokens: 4\n"
        'reassemble: false\nprompt: "{{ text }}"\n'
    )
    settings = {
        "template": str(template),
        "parents": {"web": {"input": str(natural / "parents.jsonl"), "holdout": "1/10", "max_documents": 12}},
        "engine": {"batch_size": 16, "device": "cpu", "dtype": "float32"},
        "sampling": {"temperature": 1, "top_p": 1, "max_tokens": 24},
        "filters": {"off": ["cut_at_limit", "too_short", "repetition", "wrong_language", "refusal"]},
    }
    content = study_of(
        natural,
        output=str(output),
        sources={"web": {"path": str(natural / "data" / "web"), "max_epochs": 100}},
        arms={"natural": {"web": 1}},
        rounds={"loop": {"count": ROUNDS, "corpus": {"settings": settings, "max_epochs": 1000.0}}},
        sizes={"s": {"model": TINY}},
        grid=[{"tokens": [20 * 4 * 64]}],
        validation={"web": {"path": str(natural / "data" / "web-valid")}},
        seeds=[1],
    )
    content["protocol"] |= {"train": {"sequence_length": 128, "global_batch_size": 2}, "eval": {"batches": 2}}
    content |= changes
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def opened(file: Path) -> tuple[Folder, list[Run], list[Corpus], list[Job]]:
    study = load_study(file)
    runs = expand(study)
    jobs = jobs_of(runs)
    return Folder(study.folder), runs, [job for job in jobs if isinstance(job, Corpus)], jobs


def submit(file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words, environment = command("submit", str(file), "--local", *more)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


def test_a_run_of_the_study_chooses_parents(natural: Path, tmp_path: Path) -> None:
    file = write(natural, tmp_path / "study")
    content = yaml.safe_load(file.read_text())
    (loop,) = content.pop("rounds").values()
    plain = {**loop["corpus"], "generator": {"arm": "natural"}}
    chosen = {**plain, "settings": {**plain["settings"], "hardest": {"count": 5}}, "hardest": {"arm": "natural", "seed": 2}}
    content |= {
        "generated": {"plain": plain, "chosen": chosen},
        "arms": {**content["arms"], "plain": {"plain": 1}, "chosen": {"chosen": 1}},
        "seeds": [1, 2],
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    _, runs, corpora, _ = opened(file)
    by_name = {(run.arm, run.seed): run for run in runs}
    (one,) = by_name["chosen", 1].corpora.values()
    assert [run.seed for run in one.needs] == [1, 2] and [run.seed for run in one.writers] == [1]
    assert one.synthesis([Path("writer"), Path("judge")]).hardest == one.settings.hardest.model_copy(update={"run": "judge"})
    (same,) = by_name["chosen", 2].corpora.values()
    assert [run.seed for run in same.needs] == [2], "a run that writes and chooses is needed once"
    assert len({corpus.id for corpus in corpora}) == 4

    content["generated"]["chosen"]["hardest"]["seed"] = 3
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"generated.chosen.hardest.seed.*3 is not among the seeds"):
        load_study(file)


@pytest.fixture(scope="module")
def whole(natural: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study that nobody disturbed."""
    file = write(natural, tmp_path_factory.mktemp("whole") / "study")
    done = submit(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs to train, 2 corpora to make" in done.stdout
    assert "5 of 5 runs and corpora finished, 0 failed" in done.stdout
    return file


@pytest.mark.slow
def test_two_rounds_to_their_page(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, runs, corpora, _ = opened(whole)
    by_arm = {run.arm: run for run in runs}
    for corpus, writer, reader in zip(corpora, ("natural", "loop-1"), ("loop-1", "loop-2"), strict=True):
        result, manifest = folder.corpus(corpus), open_source(str(corpus.prepared), "text").manifest
        assert result is not None and manifest is not None
        account = result["account"]
        assert account["asked"] == account["kept"] + sum(account["rejected"].values()) > 20
        assert result["tokens"] == manifest.counts.tokens and result["cost"]["flops"] and result["seconds"] > 0
        # who wrote it stands in the manifest, and its run is the one of the round before
        assert manifest.generator == f"run {by_arm[writer].name}"
        record = manifest.made.inputs["record"]
        assert record["seed"] == 1 and record["account"] == {**account, "unanswered": 0}
        trained = folder.result(by_arm[reader])
        assert trained is not None and trained["sources"][reader]["tokens"] == trained["tokens"]
    weights = {arm: (folder.run(run) / "checkpoints").is_dir() for arm, run in by_arm.items()}
    assert weights == {"natural": True, "loop-1": True, "loop-2": False}, "what writes keeps its weights"

    assert main(["plan", str(whole)]) == 0
    assert "go-on 1" in capsys.readouterr().out
    assert main(["status", str(whole)]) == 0
    assert "1 done" in capsys.readouterr().out
    assert main(["report", str(whole)]) == 0
    page = (folder.report / "index.html").read_text()
    assert "one seed: no verdict" in page and "What the text loses" in page and 'id="figure-rounds"' in page
    said = (folder.report / "findings.txt").read_text()
    assert "loop (replace) at s and" in said and "2 corpora were made" in said
    assert submit(whole).stdout.startswith("0 runs to train, 5 finished already")


@pytest.mark.slow
def test_kill_9_while_text_is_written_then_two_processes_at_once(natural: Path, whole: Path, tmp_path: Path) -> None:
    file = write(natural, tmp_path / "study")
    folder, runs, corpora, jobs = opened(file)
    words, environment = command("submit", str(file), "--local")
    with open(tmp_path / "log", "w") as log:
        parent = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 600  # to end, not to judge
        answers = corpora[0].folder / "text" / "answers" / "part-00000.jsonl"
        while not (answers.is_file() and answers.stat().st_size):
            assert parent.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    while any(folder.is_locked(job) for job in jobs):  # the kernel asks children to stop
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert folder.corpus(corpora[1]) is None
    both = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    told = [one.communicate(timeout=600)[0] for one in both]
    # one of them may end while the other is still at the last job, and says so
    for one, text in zip(both, told, strict=True):
        assert "0 failed" in text and (one.returncode == 0 or "trained by another process" in text), text
    assert 0 in [one.returncode for one in both], told
    undisturbed, first_runs, first_corpora, _ = opened(whole)
    for run, first in zip(runs, first_runs, strict=True):
        result, expected = folder.result(run), undisturbed.result(first)
        assert result is not None and expected is not None and result["loss"] == expected["loss"], "to the bit"
    for corpus, first in zip(corpora, first_corpora, strict=True):
        assert corpus.id == first.id
        keys = [line["key"] for line in lines(corpus.folder / "text" / "answers")]
        assert len(keys) == len(set(keys)) == json.loads((corpus.folder / "corpus.json").read_text())["account"]["asked"]
        name = "text/corpus/part-00000.jsonl"
        assert (corpus.folder / name).read_bytes() == (first.folder / name).read_bytes()


@pytest.mark.slow
def test_a_corpus_that_fails_holds_up_what_reads_it_and_nothing_else(natural: Path, tmp_path: Path) -> None:
    file = write(natural, tmp_path / "study")
    content = yaml.safe_load(file.read_text())
    content["rounds"]["loop"]["corpus"]["settings"]["filters"] = {"min_words": 1000}
    file.write_text(yaml.safe_dump(content))
    done = submit(file)
    assert done.returncode == 1, done.stdout
    assert "none was kept (" in done.stdout and "nothing that was answered is asked again" in done.stdout
    assert "1 of 5 runs and corpora finished, 1 failed" in done.stdout
    assert "3 wait for what is not finished: go-on-s1-" in done.stdout
    folder, _, corpora, _ = opened(file)
    assert [folder.state(corpus) for corpus in corpora] == ["failed", "to do"]
