"""What it took to generate the text of a study: FLOPs for each token of a source, counted once however often it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_synth.config.errors import UserError
from megatron_synth.data.shards.manifest import Manifest
from megatron_synth.study.plan.study_file import Study
from megatron_synth.train.dryrun import open_if_prepared

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0


@dataclass(frozen=True)
class Generation:
    """The cost of the text of one arm.

    per_token: FLOPs of generating a token, by source; only sources that were generated.
    shares: of the arm's tokens, by source.
    unique: different tokens of each source, as far as known; beyond them it repeats, which costs nothing.
    """

    per_token: Mapping[str, float]
    shares: Mapping[str, float]
    unique: Mapping[str, float]

    def flops(self, tokens: Any) -> Any:
        """FLOPs [M] of generating what runs of so many tokens [M] read."""
        total = np.zeros_like(np.asarray(tokens, dtype=np.float64))
        for name, cost in self.per_token.items():
            read = self.shares.get(name, 0.0) * np.asarray(tokens, dtype=np.float64)
            total = total + cost * np.minimum(read, self.unique.get(name, np.inf))
        return total

    @property
    def per_new_token(self) -> float:
        """FLOPs of generating what a token of the arm is made of, as long as nothing repeats."""
        return float(sum(self.shares.get(name, 0.0) * cost for name, cost in self.per_token.items()))

    def in_tokens(self, tokens: Any, n_params: float) -> Any:
        """Tokens [M] that the same compute trains on where no text is generated: D + generation / (6 N)."""
        return np.asarray(tokens, dtype=np.float64) + self.flops(tokens) / (FLOPS_PER_PARAMETER_AND_TOKEN * n_params)


def generation_of(study: Study) -> dict[str, Generation]:
    """The cost by arm, from `generation_flops` of a source, or else from the record of its synthesis in its manifest.

    Raises:
        UserError: a source that the baseline has not, and that nothing is known of; a record without FLOPs.
    """
    natural = {name for name, share in study.arms[study.baseline_arm].items() if share.ratio}
    per_token: dict[str, float] = {}
    unique: dict[str, float] = {}
    for name, source in study.sources.items():
        opened = open_if_prepared(source.path, name)
        manifest = None if opened is None else opened.manifest
        sizes = [size for size in (source.unique_tokens, source.tokens if opened is None else opened.num_tokens) if size]
        if sizes:
            unique[name] = float(min(sizes))
        if source.generation_flops is not None:
            per_token[name] = float(source.generation_flops)
            continue
        told = None if manifest is None else from_manifest(name, manifest)
        if told is not None:
            per_token[name] = told
        elif name not in natural:
            raise UserError(
                f"report.count_generation: nothing is known of what source {name} took to generate ({source.path} has no "
                f"record of its synthesis): set sources.{name}.generation_flops, FLOPs for each of its tokens; 0 if it was not "
                "generated"
            )
    return {
        arm: Generation(per_token, {name: float(Fraction(share.ratio)) for name, share in shares.items()}, unique)
        for arm, shares in study.arms.items()
    }


def from_manifest(name: str, manifest: Manifest) -> float | None:
    """FLOPs of generating a token of a prepared source, rejected text included; None where it was not synthesized here.

    Raises:
        UserError: the record has no FLOPs, or lacks those of some answers.
    """
    record = manifest.made.inputs.get("record")
    if not isinstance(record, dict) or not isinstance(record.get("cost"), dict):
        return None
    flops, untold = record["cost"].get("flops"), record["cost"].get("untold", 0)
    if flops is None or untold:
        why = "does not know the generator's parameters" if flops is None else f"lacks the tokens of {untold} answers"
        raise UserError(f"report.count_generation: the record of source {name} {why}: set sources.{name}.generation_flops")
    held = Fraction(manifest.made.holdout) if manifest.made.holdout else Fraction(0)
    return float(flops) * float(1 - held) / manifest.counts.tokens
