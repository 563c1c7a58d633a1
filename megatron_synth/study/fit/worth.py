"""What repeated text is worth, by the published law of repetition: for plans and reports."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_synth.core.log import table
from megatron_synth.study.fit.repetition import PUBLISHED, effective_tokens

R_D = PUBLISHED["R_D"]
OTHER_R_D = 95.0
"""What a refit to the same runs finds, with a lower objective: the value is weakly identified."""
NOTICED = 1.05
"""Epochs from which a source is named."""
SOURCE = "Muennighoff et al. 2023, arXiv 2305.16264: natural text, one source"


def worth_of(epochs: float, r_d: float = R_D) -> float:
    """How many epochs of new text so many epochs are worth.

    Args:
        epochs: 1 or less is worth itself.
        r_d: R*_D of the law.
    """
    return float(effective_tokens(epochs, 1.0, r_d))


def worth_table(seen: Iterable[tuple[str, str, float]]) -> str:
    """A table of the sources that are repeated; empty where none is.

    Args:
        seen: arm, source and epochs; of the same arm and source the most counts.
    """
    most: dict[tuple[str, str], float] = {}
    for arm, source, epochs in seen:
        if epochs >= NOTICED:
            most[arm, source] = max(epochs, most.get((arm, source), 0.0))
    if not most:
        return ""
    rows: list[tuple[str, ...]] = [("arm", "source", "epochs at most", "worth epochs of new text", "of its tokens")]
    for (arm, source), epochs in most.items():
        low, high = worth_of(epochs), worth_of(epochs, OTHER_R_D)
        rows.append(
            (arm, source, f"{epochs:.2f}", f"{low:.2f} (to {high:.2f})", f"{low / epochs:.0%} (to {high / epochs:.0%})")
        )
    return "\n".join(
        [
            f"repetition, by {SOURCE}, with R*_D = {R_D:.1f}; in brackets with {OTHER_R_D:g}, which fits as well",
            table(rows),
            "  the laws in N, D and the share count every token as new; `fit --law repetition` does not",
        ]
    )
