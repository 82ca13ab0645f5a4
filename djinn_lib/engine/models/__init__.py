"""From a checkpoint to a packed model whose weights are bound to addresses."""
