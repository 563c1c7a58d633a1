"""Pre-training of language models on exact mixtures of natural and synthetic text.

Importing this package imports neither torch nor megatron-core.
"""

__version__ = "0.2.0"
