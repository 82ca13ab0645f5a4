"""The experiment: what runs, in which order, and what each cell leaves behind."""
