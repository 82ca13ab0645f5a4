"""Compressed masters: 16-bit weights kept without loss in two thirds of their bytes, page by page.

`form` describes the bytes of a compressed page. `encode` and `decode` run on the CPU, `kernel` on a
GPU. Copiers get a `page`. `compress` handles a whole model, and `masters` stores compressed models
in host memory or on a disk tier.
"""
