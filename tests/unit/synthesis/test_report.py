"""The page of `synthesize report`, of a corpus whose texts are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.synthesis import report
from megatron_synth.synthesis.run import run
from megatron_synth.synthesis.synthesis_file import SynthesisConfig
from tests.support import save_tiny_causal_model

TEXTS = ["The river rises in the hills, and a mill stands where it meets the road. " * 4]


@pytest.fixture
def config(synthesis: Callable[..., SynthesisConfig], tmp_path: Path) -> SynthesisConfig:
    """Token editing that edits nothing: the corpus is its parents, but for what the filters reject."""
    made = synthesis(
        kind="token-editing",
        generator={"model": str(save_tiny_causal_model(tmp_path / "model", TEXTS, 1))},
        sampling={"temperature": 1, "top_p": 1, "max_tokens": 8},
        decoding={"method": "token-editing", "p": 1.5},
        filters={"language": None, "min_words": 80},
    )
    sources = {
        name: one.model_copy(update={"holdout": Fraction(1, 3), "max_documents": 30}) for name, one in made.parents.items()
    }
    return made.model_copy(update={"parents": sources})


def figures(config: SynthesisConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.folder / report.FIGURES).read_text())
    return found


def test_a_corpus_that_is_its_parents(config: SynthesisConfig) -> None:
    outcome = run(config)
    assert outcome.record is not None and outcome.record.account.rejected["too_short"] > 0
    page = report.write_report(config).read_text()
    found = figures(config)
    assert found["kl"] > 0  # rejected texts are natural ones, too
    assert found["novelty"]["other"] == {"1": 0, "2": 0, "4": 0, "8": 0}
    assert found["synthetic"]["lengths"]["texts"] == outcome.record.documents
    assert (
        found["contamination"][0]["domain"] == "web-valid"
        and found["contamination"][0]["any"] == 0 < found["contamination"][0]["texts"]
    )
    assert "other, kept" in page and '<span class="warn">too_short</span>' in page and "token-editing by model" in page
    assert f"<td>kept</td><td>{outcome.record.account.kept}</td>" in page


def test_no_corpus_and_none_that_is_left(config: SynthesisConfig) -> None:
    with pytest.raises(UserError, match="no finished corpus"):
        report.write_report(config)
    strict = config.model_copy(update={"filters": config.filters.model_copy(update={"min_words": 10_000})})
    run(strict)
    with pytest.raises(UserError, match="the corpus has no words"):
        report.write_report(strict)
