"""The first 20 losses of the quickstart, and how they are made: `make golden` writes them again.

The quickstart's text comes with the package, so the losses hold on every version of Python. The digest of the prepared
data stands beside them: a tokenizer library that trains another tokenizer shows there.
"""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from megatron_synth.config.load import load_file
from megatron_synth.config.prepare import PrepareConfig
from megatron_synth.config.schema import Config
from megatron_synth.data.loading.run_data import open_data
from megatron_synth.data.preparing.prepare import prepare
from megatron_synth.train.record import metrics
from tests.dist.pool import RankPool
from tests.support import ROOT, read_metrics

FILE = ROOT / "tests" / "golden" / "quickstart.json"
CONFIG = ROOT / "configs" / "train" / "quickstart.yaml"
STEPS = 20


def prepared(folder: Path) -> list[str]:
    """Prepare the quickstart's data below `folder`; the settings that make a training run use it."""
    output = folder / "data"
    prepare(load_file(PrepareConfig, ROOT / "configs" / "data" / "quickstart.yaml", [f"output={output}"]))
    names = {
        "sources": {"natural": "natural", "qa": "qa"},
        "validation": {"natural": "natural-valid", "qa": "qa-valid", "unseen": "unseen"},
    }
    return [f"data.{part}.{name}.path={output / path}" for part, paths in names.items() for name, path in paths.items()]


def data_digest(settings: list[str]) -> str:
    """Digest of the tokens that a run with these settings trains on."""
    return open_data(load_file(Config, CONFIG, settings)).digest


def first_steps(ranks: RankPool, world_size: int, settings: list[str], run: Path) -> list[dict[str, Any]]:
    """Records of the first 20 steps: the run is stopped in step 20, so that its schedule is that of the whole."""
    arguments = ["train", str(CONFIG), *settings, "log.wandb.mode=disabled", "--run-dir", str(run)]
    stop = [(0, f"step {STEPS}", int(signal.SIGUSR1))]
    results = ranks.run(world_size, "tests.dist.jobs.train_with_signals", arguments, stop)
    assert [result.value for result in results] == [75] * world_size, results[0].stderr
    records = read_metrics(run)
    assert len(records) == STEPS
    return records


def regenerate() -> None:
    """Write the golden file from a single-process run."""
    ranks = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        settings = prepared(Path(folder))
        records = first_steps(ranks, 1, settings, Path(folder) / "run")
        golden = {
            "data": data_digest(settings),
            "loss": [record[metrics.LOSS] for record in records],
        }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    ranks.close()
    print(f"wrote {FILE}: {golden['loss'][0]:.4f} ... {golden['loss'][-1]:.4f}; say in CHANGELOG.md why it moved")


if __name__ == "__main__":
    regenerate()
