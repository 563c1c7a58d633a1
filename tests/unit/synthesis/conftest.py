"""What tests of whole runs share: a folder of parents and a file that asks a stub about them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.synthesis.synthesis_file import SynthesisConfig

WORDS = "river mill road hill bridge stone water village church market farmer harvest winter summer wheel trade".split()


def sentences(generator: random.Random, count: int) -> str:
    return " ".join(" ".join(generator.choices(WORDS, k=generator.randint(5, 11))).capitalize() + "." for _ in range(count))


def write_parents(folder: Path, documents: int = 60) -> Path:
    """Documents of one to six paragraphs, and one that is short."""
    generator = random.Random(7)
    texts = ["\n\n".join(sentences(generator, 8) for _ in range(generator.randint(1, 6))) for _ in range(documents)]
    file = folder / "parents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "Short."]))
    return file


@pytest.fixture
def synthesis(tmp_path: Path) -> Callable[..., SynthesisConfig]:
    """Makes synthesis files: `synthesis(url, section={...})`."""
    parents = write_parents(tmp_path)

    def make(url: str | None = None, output: str = "out", **changes: Any) -> SynthesisConfig:
        engine = {"name": "openai", "servers": url, "backoff_s": 0.01, "attempts": 50, "patience_s": 20, "concurrency": 8}
        data: dict[str, Any] = {
            "output": str(tmp_path / output),
            "kind": "hq-rephrase",
            "parents": {"web": {"input": str(parents)}},
            "generator": {"model": "stub", "api": "completions"},
            "engine": engine if url is not None else {},
            "filters": {"off": ["copy_of_parent", "repetition", "little_of_parent", "wrong_language"]},
        }
        for name, change in changes.items():
            known = data.get(name)
            data[name] = {**known, **change} if isinstance(known, dict) and isinstance(change, dict) else change
        return SynthesisConfig.model_validate(data)

    return make
