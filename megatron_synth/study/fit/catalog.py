"""All laws in N, D, one ratio and unique tokens, by name."""

from __future__ import annotations

import difflib

from megatron_synth.config.errors import UserError
from megatron_synth.study.fit.laws import LAWS, Law
from megatron_synth.study.fit.repetition import NONLINEAR
from megatron_synth.study.fit.solvers.nonlinear import NonlinearLaw

AnyLaw = Law | NonlinearLaw
ALL_LAWS: dict[str, AnyLaw] = {**LAWS, **NONLINEAR}


def law_named(name: str) -> AnyLaw:
    """The law of that name.

    Raises:
        UserError: there is none.
    """
    if name not in ALL_LAWS:
        close = difflib.get_close_matches(name, ALL_LAWS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(ALL_LAWS)}"
        raise UserError(f"unknown law '{name}'; {hint}")
    return ALL_LAWS[name]
