"""The synthesis file as a whole: settings of `config/synthesis.py` and those of the filters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_synth.config.load import load_file
from megatron_synth.config.synthesis import SynthesisSettings
from megatron_synth.data.shards.manifest import canonical_digest
from megatron_synth.synthesis.filters.base import FiltersConfig


class SynthesisConfig(SynthesisSettings):
    """What to make, and what of it to keep."""

    filters: FiltersConfig = FiltersConfig()
    """Thresholds of the filters. They cost no generation: change them and run again."""

    @property
    def folder(self) -> Path:
        """The output."""
        return Path(self.output)

    def described(self) -> dict[str, Any]:
        """Settings that decide the text: not where it goes and not what serves the model."""
        found = self.model_dump(mode="json", exclude={"output", "engine", "max_unanswered", "study_tokenizer"})
        if self.walks is not None and self.walks.concepts == "generator":
            del found["walks"]["concepts"]  # as before there was a choice: the digest stays
        return found

    def settings_digest(self) -> str:
        """SHA-256 of these."""
        return canonical_digest(self.described())


def load_synthesis(file: str, overrides: Iterable[str] = ()) -> SynthesisConfig:
    """The synthesis file, with overrides.

    Raises:
        UserError: with all that is wrong in it.
    """
    return load_file(SynthesisConfig, file, overrides)
