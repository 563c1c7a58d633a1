"""Weight gradients added straight into fp32 main_grad, under the names that megatron-core looks for.

megatron-core's linear layers call `fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(input, grad_output, main_grad)`, a
module of NVIDIA's apex. These functions do the same by torch: one product that accumulates, no gradient tensor in between.
"""

from __future__ import annotations

import torch


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T inputs.

    Args:
        inputs: [N, K], the layer's input.
        grad_output: [N, M], the gradient of its output.
        main_grad: [M, K], fp32, updated in place.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    elif inputs.is_cuda:
        torch.ops.aten.addmm.dtype_out(main_grad, grad_output.t(), inputs, main_grad.dtype, out=main_grad)
    else:  # CPU has no product of bf16 operands into fp32; the fp32 sum keeps the accumulation exact
        main_grad.add_(torch.mm(grad_output.t(), inputs))


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T inputs, for a main_grad in the inputs' own 16-bit type; shapes as for fp32."""
    main_grad.addmm_(grad_output.t(), inputs)
