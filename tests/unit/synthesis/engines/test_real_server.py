"""A whole synthesis by a real server over HTTP: llama.cpp's, with a model of 135 million parameters, on this CPU."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis.answers.parts import lines
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.setup import ANSWERS

ROOT = Path(__file__).parents[4]
PYTHON = ROOT / "build" / "real-server" / "bin" / "python"
MODEL = "smollm2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="llama.cpp's server is not installed; `make real-server` does it"),
]


@contextmanager
def served(key: str) -> Iterator[str]:
    """The address of a server that asks for the key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "benchmarks" / "synthesis" / "llama.py"
    command = [str(PYTHON), str(script), "--port", str(port), "--key-variable", "REAL_KEY"]
    environment = {**os.environ, "REAL_KEY": key}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            url = next((line.strip() for line in server.stdout if line.startswith("http")), None)
            assert url is not None, "the server did not start"
            yield url
        finally:
            server.terminate()
            server.wait(60)


def test_a_real_server_rephrases(synthesis, monkeypatch):
    key = secrets.token_hex(16)
    monkeypatch.setenv("REAL_KEY", key)
    settings = {
        "generator": {"model": MODEL, "api": "chat", "license": "apache-2.0", "parameters": 134_515_008},
        "engine": {"key_variable": "REAL_KEY", "concurrency": 4, "timeout_s": 600, "patience_s": 600},
        "sampling": {"max_tokens": 24},
    }
    with served(key) as url:
        config = synthesis(url, **settings)
        few = {"web": config.parents["web"].model_copy(update={"max_documents": 3})}
        config = config.model_copy(update={"parents": few})
        found = run(config)
        assert found.account is not None
        assert found.account.unanswered == found.account.refused == 0
        assert found.account.asked == found.made >= 3
        answers = list(lines(config.folder / ANSWERS))
        assert all(one["tokens_in"] and one["tokens_out"] and one["tokens_out"] <= 24 for one in answers)
        assert {one["finish"] for one in answers} <= {"stop", "length"}
        assert all(one["cached"] > 40 for one in answers[4:])  # the system's part, which stands first in all of them
        assert run(config).made == 0
        monkeypatch.setenv("REAL_KEY", "another")
        with pytest.raises(UserError, match="the key is refused"):
            run(synthesis(url, "other", **settings))
        monkeypatch.setenv("REAL_KEY", key)
        with pytest.raises(UserError, match="its context has 2048 tokens"):
            run(synthesis(url, "long", **{**settings, "sampling": {"max_tokens": 4000}}))
        with pytest.raises(UserError, match="has no model 'llama', it has smollm2"):
            run(synthesis(url, "model", **{**settings, "generator": {"model": "llama", "api": "chat"}}))
