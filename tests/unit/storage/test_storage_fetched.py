"""A run in a bucket that is named by URL: what is needed is copied once, checked, and used as a run directory."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fsspec
import pytest

from megatron_synth.cli import checkpoint as verb
from megatron_synth.cli import convert, fit, plan, study, submit
from megatron_synth.cli import kernels as chosen
from megatron_synth.cli.bench import gpu, health, kernels, memory
from megatron_synth.cli.bench import report as bench_report
from megatron_synth.cli.bench import train as bench_train
from megatron_synth.cli.prepare import duplicates, verify
from megatron_synth.config.errors import UserError
from megatron_synth.config.schema import CheckpointConfig
from megatron_synth.train.checkpoint import branch, fetched, files
from megatron_synth.train.checkpoint.bucket import Bucket
from tests.object_store import BUCKET
from tests.support import snapshot
from tests.unit.storage.test_storage_checkpoints import URL, checkpoint


@pytest.fixture
def run(store, tmp_path, monkeypatch):
    """A run with two checkpoints in the bucket, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "run"
    for step in (10, 20):
        Bucket(URL).upload(checkpoint(made, step, b"x" * step))
    return made


def test_a_url_is_a_run_directory_and_a_step_a_checkpoint_of_it(store, run) -> None:
    folder = fetched.local(URL)
    assert [one.name for one in files.candidates(folder)] == [files.name_of(20)]
    assert snapshot(folder / "checkpoints" / files.name_of(20)) == snapshot(run / "checkpoints" / files.name_of(20))
    assert (folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    older = fetched.local(f"{URL}@10")
    assert older == folder / "checkpoints" / files.name_of(10) and fetched.local(f"{URL}/checkpoints/{older.name}") == older
    assert snapshot(older) == snapshot(run / "checkpoints" / files.name_of(10))
    assert files.candidates(folder)[0].name == files.name_of(20)


def test_a_second_use_copies_nothing(store, run) -> None:
    fetched.local(URL)
    with store.failing(lambda method, path: None) as requests:
        fetched.local(URL)
    read = {path.partition("?")[0].rpartition("/")[2] for method, path in requests if method == "GET"}
    assert read <= {"latest", "manifest.json", BUCKET, ""}, requests


def test_another_manifest_is_copied_anew(store, run, tmp_path) -> None:
    before = fetched.local(f"{URL}@20")
    assert (before / "w.distcp").read_bytes() == b"x" * 20
    Bucket(URL).upload(checkpoint(tmp_path / "again", 20, b"another"))
    assert (fetched.local(f"{URL}@20") / "w.distcp").read_bytes() == b"another"


def test_a_damaged_one_is_passed_over_or_refused_where_it_was_asked_for(store, run, capsys) -> None:
    at = f"{BUCKET}/runs/a/checkpoints/{files.name_of(20)}/w.distcp"
    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(at, b"y" * 20)
    assert files.candidates(fetched.local(URL))[0].name == files.name_of(10)
    assert "going back to step_00000010" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step_00000020: damaged: w.distcp has the checksum .*; name another step"):
        fetched.local(f"{URL}@20")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{URL}@15", r"checkpoint.init_from: .*/runs/a: there is no checkpoint of step 15; there are 10, 20"),
        (f"s3://{BUCKET}/runs/b", r"checkpoint.init_from: .*/runs/b: no checkpoint there; expected the folder that"),
        ("s3://no-such-bucket/a", r"checkpoint.init_from: s3://no-such-bucket/a"),
    ],
)
def test_what_is_not_there_is_named(store, run, url, message) -> None:
    with pytest.raises(UserError, match=message):
        fetched.local(url, "checkpoint.init_from")


def test_two_processes_at_once_copy_it_once(store, run) -> None:
    code = f"from megatron_synth.train.checkpoint import fetched; print(fetched.local({URL!r}))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and sum("fetched s3://" in text for text in told) == 1
    assert told[0].splitlines()[-1] == told[1].splitlines()[-1]


def test_fetch_makes_a_run_directory_and_refuses_that_of_another(store, run, tmp_path) -> None:
    new = tmp_path / "new"
    assert verb.main(["fetch", f"{URL}@10", str(new)]) == 0
    assert [one.name for one in files.all_of(new / "checkpoints")] == [files.name_of(10)]
    assert json.loads((new / "run.json").read_text()) == {"id": "12345678"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"id": "abcdefgh"}))
    with pytest.raises(UserError, match="holds run '12345678'"):
        verb.main(["fetch", URL, str(tmp_path / "other")])


OUTPUTS = [
    (convert.parser, ["to-hf", "run", "OUT"]),
    (convert.parser, ["from-hf", "folder", "OUT"]),
    (verb.parser, ["merge", "run", "--out", "OUT"]),
    (verb.parser, ["fetch", "s3://b/a", "OUT"]),
    (verb.parser, ["prune", "OUT", "--keep", "1"]),
    (plan.parser, ["--json", "OUT"]),
    (chosen.parser, ["--json", "OUT"]),
    (submit.parser, ["c.yaml", "--nodes", "1", "--run-dir", "OUT"]),
    (fit.parser, ["runs.csv", "--out", "OUT"]),
    (study.parser, ["report", "s.yaml", "--out", "OUT"]),
    (study.parser, ["propose", "s.yaml", "--out", "OUT"]),
    (duplicates.parser, ["a", "--json", "OUT"]),
    (duplicates.parser, ["a", "--work", "OUT"]),
    (verify.parser, ["a", "--json", "OUT"]),
    *((one.parser, ["--json", "OUT"]) for one in (gpu, health, kernels, memory, bench_train)),
    (bench_train.parser, ["--trace", "OUT"]),
    (bench_report.parser, ["a.json", "--csv", "OUT"]),
    (bench_report.parser, ["a.json", "--png", "OUT"]),
]


@pytest.mark.parametrize(("parser", "words"), OUTPUTS)
def test_what_is_written_needs_a_disk(parser, words, capsys) -> None:
    made: argparse.ArgumentParser = parser()
    with pytest.raises(SystemExit):
        made.parse_args([word.replace("OUT", "s3://bucket/out") for word in words])
    assert "expected a path on a disk, not one in object storage, found 's3://bucket/out'" in capsys.readouterr().err


def test_the_step_of_a_url_is_told_from_its_name() -> None:
    assert fetched.split("s3://b/a@900") == ("s3://b/a", 900)
    assert fetched.split("s3://b/a/") == ("s3://b/a", None)
    assert branch.split("s3://b/a@900")[1] == 900


def _trunk_and_config(run, **changes):
    """The bucket's run with a checkpoint of step 30 that one can branch from, and a branch's configuration, as far as read."""
    folder = checkpoint(run, 30)
    state = {"run_id": "12345678", "step": 30, "samples": 60, "skipped": 0, "ledger": {"web": 60}, "prefix_digest": "d"}
    written = {
        "w.distcp": files.write_hashed(folder / "w.distcp", b"weights"),
        "trainer.json": files.write_hashed(folder / "trainer.json", json.dumps({**state, "config": {}, "format": 2}).encode()),
    }
    files.write_manifest(folder, written)
    Bucket(URL).upload(folder)
    return SimpleNamespace(checkpoint=CheckpointConfig(branch_from=f"{URL}@30", **changes))


def test_a_branch_of_a_url_reads_the_state_alone_and_names_the_url(store, run, tmp_path) -> None:
    config = _trunk_and_config(run)
    trunk = branch.trunk_of(config, tmp_path / "branch")
    assert trunk is not None and (trunk.step, trunk.samples, trunk.name) == (30, 60, f"{URL}@30")
    assert not trunk.checkpoint.exists()  # no weights for a plan
    assert fetched.local(trunk.url) == trunk.checkpoint
    with pytest.raises(UserError, match=r"checkpoint.branch_from: .* there is no checkpoint of step 31; there are 10, 20, 30"):
        branch.trunk_of(SimpleNamespace(checkpoint=CheckpointConfig(branch_from=f"{URL}@31")), tmp_path / "branch")


@pytest.mark.parametrize("local", [False, True])
def test_a_branch_on_an_empty_machine_needs_no_trunk(store, run, tmp_path, local) -> None:
    own = f"s3://{BUCKET}/runs/branch"
    config = _trunk_and_config(run, upload_to=own)
    if local:
        config.checkpoint = CheckpointConfig(branch_from=f"{run}@30", upload_to=own)
    trunk = branch.trunk_of(config, tmp_path / "one")
    made = checkpoint(tmp_path / "one", 40)
    trunk.save(tmp_path / "one")
    Bucket(own).upload(made)
    if local:
        shutil.rmtree(run)
    else:
        remote = fsspec.filesystem("s3", use_listings_cache=False)
        remote.rm(remote.find(f"{BUCKET}/runs/a"))
    found = branch.trunk_of(config, tmp_path / "two")
    assert found == trunk._replace(file=tmp_path / "two" / branch.FILE)
    assert not (tmp_path / "two").exists()
    config.checkpoint = config.checkpoint.model_copy(update={"branch_from": config.checkpoint.branch_from[:-2] + "20"})
    with pytest.raises(UserError, match="is a branch of"):
        branch.trunk_of(config, tmp_path / "two")
