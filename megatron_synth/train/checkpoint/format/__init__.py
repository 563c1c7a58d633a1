"""The files of torch.distributed.checkpoint as data: index, pickles and tensors, read without running anything of them."""
