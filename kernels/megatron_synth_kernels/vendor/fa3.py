"""FlashAttention 3 (Shah et al., 2024, arXiv 2407.08608) in the place of torch's FlashAttention 2, for this process.

Its wheel brings the module `flash_attn_interface`; torch since 2.11 takes its kernels for both of its attention functions.
"""

from __future__ import annotations

from torch.nn.attention import activate_flash_attention_impl

from megatron_synth_kernels.torch.attention.backends import flash

activate_flash_attention_impl("FA3")
attention = flash
