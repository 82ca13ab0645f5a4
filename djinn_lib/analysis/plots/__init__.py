"""Every figure, drawn from rows alone."""
