"""Who may read what is written: the umask decides, and secrets are for their owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_synth.cluster import sbatch, slurm
from megatron_synth.cluster.sbatch import JobSpec
from megatron_synth.config.cluster import ClusterConfig
from megatron_synth.core.files import write_atomic


@pytest.fixture(params=[0o077, 0o027, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_is_respected(umask: int, tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "text")
    write_atomic(tmp_path / "b", "secret", private=True)
    assert mode(tmp_path / "a") == 0o666 & ~umask and mode(tmp_path / "b") == 0o600
    write_atomic(tmp_path / "b", "secret", private=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]


@pytest.mark.parametrize("env", [{}, {"API_KEY": "hidden"}])
def test_a_script_with_environment_variables_is_private(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "test", lambda script: "")
    monkeypatch.setattr(slurm, "client", lambda command: "7\n")
    cluster = ClusterConfig(env=env)
    before = os.umask(0o022)
    try:
        sbatch.submit(JobSpec("name", tmp_path / "job", tmp_path, cluster=cluster))
    finally:
        os.umask(before)
    assert mode(tmp_path / "job" / "train.sbatch") == (0o600 if env else 0o644)
    assert mode(tmp_path / "job" / "job.sh") == 0o644
