"""Load checkpoints, pack their weights, and bind them to addresses."""
