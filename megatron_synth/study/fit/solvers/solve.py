"""One call for both solvers: the batched Newton method of log-linear laws, and SciPy for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_synth.study.fit.catalog import AnyLaw
from megatron_synth.study.fit.laws import Floats
from megatron_synth.study.fit.solvers.newton import Solutions, solve
from megatron_synth.study.fit.solvers.nonlinear import NonlinearLaw, solve_each


@dataclass(frozen=True)
class Solver:
    """Minimizes the objective of a law at its M points, from any starts.

    columns: [M] each. log_loss: [M].
    """

    law: AnyLaw
    columns: Mapping[str, Floats] = field(repr=False)
    log_loss: Floats = field(repr=False)

    def __call__(
        self,
        starts: Floats,
        delta: float,
        *,
        weights: Floats | None = None,
        log_loss: Floats | None = None,
        iterations: int = 100,
        tolerance: float = 1e-10,
        progress: Callable[[int], object] | None = None,
    ) -> Solutions:
        """The end of every start [S, P].

        Weights are [S, M], and so are log losses that take the place of those measured. Iterations and tolerance are those of
        the Newton method.
        """
        losses = self.log_loss if log_loss is None else log_loss
        if isinstance(self.law, NonlinearLaw):
            return solve_each(self.law, self.columns, losses, starts, delta, weights=weights, progress=progress)
        options = {"weights": weights, "iterations": iterations, "tolerance": tolerance, "progress": progress}
        return solve(self.law.design(self.columns), losses, starts, delta, **options)  # type: ignore[arg-type]
