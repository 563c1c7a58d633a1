"""Attention by the kernels of torch: of rows and documents, by one kernel alone, in blocks, of sequences that ranks share."""
