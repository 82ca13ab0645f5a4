"""Kernels of a decode step of batch size 1."""
