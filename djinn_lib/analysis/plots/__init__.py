"""Draw every figure, from rows alone."""
