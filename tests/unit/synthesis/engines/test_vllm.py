"""A server that is started here: with a key, on the loopback, started again when it dies, and ended with the run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.engines import vllm
from megatron_synth.synthesis.run import run

ROOT = Path(__file__).parents[4]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A `vllm` on the path; the file that counts its starts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.unit.synthesis.engines.fake_vllm "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "starts"))
    monkeypatch.setattr(vllm, "POLL_S", 0.02)
    return tmp_path / "starts"


def config(synthesis, **engine: object):
    return synthesis(None, engine={"name": "vllm", "backoff_s": 0.02, "attempts": 100, "breaker": 3, "startup_s": 60, **engine})


def running() -> list[str]:
    """What anyone on the machine sees of the servers, whole command lines: `ps` cuts them at the width of a terminal."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if "fake_vllm serve" in line]


def test_a_server_that_dies_is_started_again_and_ends_with_the_run(synthesis, fake, monkeypatch):
    monkeypatch.setenv("FAKE_DEATHS", "1")
    settings = config(synthesis)
    found = run(settings)
    assert found.record is not None
    assert found.record.account.unanswered == 0
    assert found.record.generator["engine"] == "vllm"
    assert fake.read_text() == "2"
    assert not running()
    assert run(settings).made == 0
    assert fake.read_text() == "2"


def test_a_server_that_dies_too_often_is_gone(synthesis, fake, monkeypatch):
    monkeypatch.setenv("FAKE_DEATHS", "9")
    found = run(config(synthesis, restarts=1, concurrency=2))
    assert found.gone is not None
    assert "vllm: died 2 times" in found.gone
    assert found.made > 0


def test_a_server_that_does_not_start_is_told(synthesis, fake, monkeypatch):
    monkeypatch.setenv("FAKE_BROKEN", "1")
    with pytest.raises(UserError, match=r"vllm: ended with 1 while starting; .*vllm.log says why.*out of memory, as they say"):
        run(config(synthesis))


def test_without_vllm_it_says_so(synthesis, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="vllm is not installed here"):
        run(config(synthesis))


def test_a_server_has_a_key_that_others_do_not_see(synthesis, fake, monkeypatch):
    keys: list[str] = []

    def made(size: int) -> str:
        keys.append("f00d" * (size // 2))
        return keys[-1]

    monkeypatch.setattr(vllm.secrets, "token_hex", made)
    settings = config(synthesis)
    seen: list[str] = []
    assert run(settings, lambda: bool(seen.extend(running()))).record is not None
    assert seen and not any(keys[-1] in line for line in seen)  # fake_vllm itself refuses another address than the loopback
    files = [file for file in settings.folder.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not any(keys[-1].encode() in file.read_bytes() for file in files)
    assert (settings.folder / "vllm.log").stat().st_mode & 0o077 == 0


def test_copies_have_gpus_of_their_own(synthesis, fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    engine = config(synthesis, copies=2, tensor_parallel_size=2).engine
    assert [vllm._devices(engine, number) for number in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "6,7"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(UserError, match="2 servers of 2 GPUs need 4, CUDA_VISIBLE_DEVICES has 3"):
        vllm._devices(engine, 0)
    found = run(config(synthesis, copies=2))
    assert found.record is not None
    assert fake.read_text() in ("1", "2")  # they start side by side
    assert not running()
