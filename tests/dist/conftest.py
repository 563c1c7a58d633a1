"""Fixtures of the multi-process tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.dist.pool import RankPool, RankResult
from tests.support import LAYOUTS, read_ledger, read_metrics, write_config, write_corpus


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    results: list[RankResult]
    records: list[dict[str, Any]]
    ledger: dict[str, Any]


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "base.yaml", corpus)


Train = Callable[..., list[RankResult]]


@pytest.fixture(scope="session")
def train(ranks: RankPool, config: Path) -> Train:
    """train(run directory, layout, *settings, code=0): `megatron-synth train` on the ranks of the layout."""

    def call(run: Path, layout: str, *settings: str, code: int = 0) -> list[RankResult]:
        world_size, layout_settings = LAYOUTS[layout]
        arguments = ["train", str(config), *layout_settings, *settings, "--run-dir", str(run)]
        results = ranks.run(world_size, "megatron_synth.cli.main.main", arguments)
        printed = "".join(result.stdout + result.stderr for result in results)
        assert [result.value for result in results] == [code] * world_size, printed
        return results

    return call


@pytest.fixture(scope="session")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """trained(layout, *settings): a whole run from scratch, made when it is first asked for. Not to be changed."""
    made: dict[tuple[str, ...], Run] = {}

    def call(layout: str, *settings: str) -> Run:
        key = (layout, *settings)
        if key not in made:
            path = tmp_path_factory.mktemp("trained") / layout
            results = train(path, layout, *settings)
            made[key] = Run(path, results, read_metrics(path), read_ledger(path))
        return made[key]

    return call


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """read_only(folder): nothing can be written in it until the test has ended."""
    undo: list[Callable[[], object]] = []

    def call(folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o500)
            undo.append(lambda: folder.chmod(0o700))
            return
        # root may write whatever the mode says
        commands = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder])
        if any(subprocess.run(command, capture_output=True).returncode for command in commands):
            pytest.skip("root without the right to mount")
        undo.append(lambda: subprocess.run(["umount", folder], check=True))

    yield call
    for step in undo:
        step()
