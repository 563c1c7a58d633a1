"""Losses per validation domain, and what is made of them: macro, micro, worst, chosen domains, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.fit import Fit, fit
from megatron_synth.study.fit.laws import Columns, Floats

AGGREGATES = ("macro", "micro", "worst")


def aggregate(
    losses: Mapping[str, ArrayLike],
    how: str,
    *,
    domains: Sequence[str] | None = None,
    tokens: Mapping[str, float] | None = None,
) -> Floats:
    """One loss [M] per run from the losses [M] of its domains, in nats per token.

    Args:
        losses: by domain, each [M].
        how: `macro`, the mean over domains; `micro`, the mean over tokens; `worst`, the highest.
        domains: only these; default all.
        tokens: how many each domain was measured on; needed for `micro`.

    Raises:
        UserError: an unknown aggregate or domain, or token counts are absent.
    """
    chosen = _chosen(losses, domains)
    stacked = np.stack([np.asarray(losses[name], dtype=np.float64) for name in chosen])  # [domains, M]
    if how == "macro":
        return np.asarray(stacked.mean(axis=0))
    if how == "worst":
        return np.asarray(stacked.max(axis=0))
    if how == "micro":
        return np.asarray(np.average(stacked, axis=0, weights=_counts(tokens, chosen, "tokens")))
    raise UserError(f"unknown aggregate '{how}'; one of: {', '.join(AGGREGATES)}")


def bits_per_byte(
    losses: Mapping[str, ArrayLike],
    tokens: Mapping[str, float],
    size: Mapping[str, float],
    domains: Sequence[str] | None = None,
) -> Floats:
    """Bits per byte [M] of all text of the domains: sum of nats over domains / (ln 2 x bytes); no tokenizer is in that number.

    Args:
        losses: by domain, each [M], in nats per token.
        tokens: per domain, what the losses were measured on.
        size: per domain, bytes of that text.
        domains: only these; default all.
    """
    chosen = _chosen(losses, domains)
    counts, sizes = _counts(tokens, chosen, "tokens"), _counts(size, chosen, "bytes")
    nats = sum(count * np.asarray(losses[name], dtype=np.float64) for count, name in zip(counts, chosen, strict=True))
    return np.asarray(nats / (math.log(2) * sizes.sum()))


def fit_each(law: str, columns: Columns, losses: Mapping[str, ArrayLike], **options: Any) -> dict[str, Fit | UserError]:
    """One fit per domain or aggregate; what cannot be fitted stands as its error.

    Args:
        law: as for `fit`.
        columns: as for `fit`, the same for all.
        losses: by name, each [M].
        options: further arguments of `fit`.
    """
    results: dict[str, Fit | UserError] = {}
    for name, loss in losses.items():
        try:
            results[name] = fit(law, columns, loss, **options)
        except UserError as error:
            results[name] = error
    return results


def _chosen(losses: Mapping[str, ArrayLike], domains: Sequence[str] | None) -> list[str]:
    chosen = list(losses) if domains is None else list(domains)
    unknown = [name for name in chosen if name not in losses]
    if unknown or not chosen:
        raise UserError(f"domains: no losses of {', '.join(unknown) or 'any domain'}; there are: {', '.join(losses) or 'none'}")
    return chosen


def _counts(given: Mapping[str, float] | None, domains: Sequence[str], what: str) -> Floats:
    absent = [name for name in domains if given is None or not given.get(name, 0) > 0]
    if absent or given is None:
        raise UserError(f"domains: the number of {what} of {', '.join(absent)} is needed, above 0")
    return np.array([given[name] for name in domains], dtype=np.float64)
