"""What the set-up makes: facts of the machine, and the weights of models."""
