"""The kernels of a decode step of batch 1."""
