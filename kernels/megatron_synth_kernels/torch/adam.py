"""AdamW in one fused call, with the step count in the parameter group."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) by torch's fused kernel, on CPU and GPU.

    torch.optim.AdamW keeps `step` as a tensor per parameter. megatron-core's distributed optimizer can save such a state but
    not load it; it reads `step` from the parameter group, where apex and TransformerEngine keep it, and so does this class.
    The constructor takes the arguments that megatron-core passes to those.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = self._moment(p), self._moment(p)
            self._update(params, group)

    def _moment(self, param: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """One step of parameters that all have a gradient and a state."""
        count = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [count] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
