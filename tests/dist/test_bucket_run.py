"""A run whose data and checkpoints are in object storage, on machines that have nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from megatron_synth.cli import main as cli
from tests.dist.conftest import Run
from tests.dist.pool import RankPool, RanksFailed
from tests.object_store import BUCKET, SECRET, Store, running
from tests.support import LAYOUTS, assert_same_losses, read_ledger, read_metrics

LAYOUT = "dp2"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, running(patch) as store:
        yield store


def test_trained_from_a_bucket_to_a_bucket_killed_and_resumed_on_an_empty_machine(
    trained: Callable[..., Run],
    ranks: RankPool,
    config: Path,
    corpus: Path,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = trained(LAYOUT)
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.put(str(corpus), f"{BUCKET}/corpus", recursive=True)
    world_size, layout = LAYOUTS[LAYOUT]
    names = {"sources": ("web", "qa"), "validation": ("val", "val2")}
    paths = [f"data.{kind}.{name}.path=s3://{BUCKET}/corpus/{name}" for kind, found in names.items() for name in found]

    def arguments(machine: Path) -> list[str]:
        own = [f"data.staging={machine / 'staging'}", f"checkpoint.upload_to=s3://{BUCKET}/runs/a", "checkpoint.interval=5"]
        return ["train", str(config), *layout, *paths, *own, "--run-dir", str(machine / "run")]

    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(RanksFailed):
        ranks.run(world_size, "tests.dist.bucket_jobs.train", arguments(one), store.environment(), "step_00000015")
    assert (one / "run" / "checkpoints" / "step_00000015" / "manifest.json").exists()
    uploaded = files.find(f"{BUCKET}/runs/a/checkpoints")
    assert not any(name.endswith("step_00000015/manifest.json") for name in uploaded)
    results = ranks.run(world_size, "tests.dist.bucket_jobs.train", arguments(two), store.environment())
    assert [result.value for result in results] == [0, 0], results[0].stderr
    fetched = next(line for line in results[0].stdout.splitlines() if "fetched" in line)
    resumed = int(fetched.partition("step_")[2][:8])
    assert resumed in (5, 10) and f"resumed at step {resumed}" in results[0].stdout  # one may be left out for the next
    assert_same_losses(read_metrics(two / "run"), reference.records, 0)
    assert read_ledger(two / "run") == reference.ledger
    ids = [json.loads((machine / "run" / "run.json").read_text())["id"] for machine in (one, two)]
    assert ids[0] == ids[1]
    assert files.cat_file(f"{BUCKET}/runs/a/checkpoints/latest") == b"step_00000020\n"
    # its weights, and the run itself, go on elsewhere by its URL
    three = tmp_path / "three"
    environment = {**store.environment(), "XDG_CACHE_HOME": str(three / "cache")}
    url = f"s3://{BUCKET}/runs/a"
    for name, setting in (("weights", f"checkpoint.init_from={url}"), ("branch", f"checkpoint.branch_from={url}@20")):
        words = ["train", str(config), *layout, *paths, f"data.staging={two / 'staging'}", setting, "train.steps=22"]
        results = ranks.run(world_size, "tests.dist.bucket_jobs.train", [*words, "--run-dir", str(three / name)], environment)
        assert [result.value for result in results] == [0, 0], results[0].stderr
        assert setting.partition("=")[2] in (three / name / "config.yaml").read_text()
    assert read_metrics(three / "branch")[0]["step"] == 21
    assert json.loads((three / "branch" / "branch.json").read_text())["url"] == f"{url}@20"
    (copy,) = (three / "cache" / "megatron-synth" / "runs").iterdir()
    assert [path.name for path in (copy / "checkpoints").glob("step_*")] == ["step_00000020"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "four"))
    assert cli.main(["mix", "audit", url]) == 0
    assert cli.main(["checkpoint", "merge", url, "--steps", "15,20", "--out", str(tmp_path / "merged")]) == 0
    for path in [*one.rglob("*"), *two.rglob("*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert all(SECRET not in result.stdout + result.stderr for result in results)
