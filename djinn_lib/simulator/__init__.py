"""The ring under an analytic clock, and the fewest bytes that any schedule could load."""
