"""Compressed masters: 16-bit weights kept without loss in two thirds of their bytes, page by page.

`form` describes the bytes of a compressed page. `encode` and `decode` are for the CPU, `kernel` is
for a GPU. `page` is what a copier gets, `compress` is for a whole model, and `masters` puts it all
before host memory or a disk tier.
"""
