"""An arm of a study: a mixture, as exact shares of its sources."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_synth.config.section import Amount, Ratio, Section


class Share(Section):
    """What an arm takes of a source. In short: the ratio alone."""

    ratio: Ratio
    """Share of the training tokens."""
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    """Cap of this arm. Default: the source's."""
    unique_tokens: Amount | None = None
    """Limit of this arm. Default: the source's."""


def _as_share(value: Any) -> Any:
    return value if isinstance(value, (dict, Share)) or value is None else {"ratio": value}


Arm = dict[str, Annotated[Share, BeforeValidator(_as_share)]]
