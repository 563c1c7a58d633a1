"""The laws over shares of K sources, behind one interface."""

from __future__ import annotations

import difflib
from typing import Any, Protocol

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.shares.gaussian import GaussianProcess
from megatron_synth.study.fit.shares.parametric import PARAMETRIC
from megatron_synth.study.fit.shares.points import Mixtures
from megatron_synth.study.fit.shares.trees import BoostedTrees


class FittedShareLaw(Protocol):
    """A fitted law."""

    def log_predict(self, points: Mixtures) -> Floats:
        """The logarithm [M] of the predicted loss."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What it found, for law.json."""
        ...


class ShareLaw(Protocol):
    """A law over shares, and over N and D where the table has them."""

    @property
    def name(self) -> str:
        """As the command line names it."""
        ...

    @property
    def formula(self) -> str:
        """For people, without the terms in N and D."""
        ...

    @property
    def source(self) -> str:
        """The paper it is from, and what is ours."""
        ...

    @property
    def parametric(self) -> bool:
        """Whether it is a formula with parameters."""
        ...

    @property
    def needs(self) -> str | None:
        """What is not installed; None where it can be fitted."""
        ...

    def parameters(self, points: Mixtures) -> list[str]:
        """Names of its parameters for such a table; none for what is not parametric."""
        ...

    def fit(self, points: Mixtures, log_loss: Floats, *, warm: Any = None, seed: int = 0) -> FittedShareLaw:
        """Fit to log losses [M].

        Args:
            points: the runs.
            log_loss: [M].
            warm: what this law's `fit` returned for a table that holds these runs, to start from.
            seed: of starts.
        """
        ...


SHARE_LAWS: dict[str, ShareLaw] = {law.name: law for law in (*PARAMETRIC, GaussianProcess(), BoostedTrees())}
AUTO = "auto"


def share_law_named(name: str) -> ShareLaw:
    """The law of that name.

    Raises:
        UserError: there is none, or it needs what is not installed.
    """
    if name not in SHARE_LAWS:
        close = difflib.get_close_matches(name, SHARE_LAWS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of: {AUTO}, {', '.join(SHARE_LAWS)}"
        raise UserError(f"unknown law over shares '{name}'; {hint}")
    law = SHARE_LAWS[name]
    if law.needs is not None:
        raise UserError(f"law '{name}' needs {law.needs}")
    return law
