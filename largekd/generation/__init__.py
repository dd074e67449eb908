"""Generation: text that a model writes during a run."""
