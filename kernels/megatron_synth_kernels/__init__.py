"""Operations of a Llama-style model on torch alone. A leaf: imports torch, and nothing of megatron_synth."""
