"""Execute notebooks: in kernels that start at once, with logs, or by hand."""
