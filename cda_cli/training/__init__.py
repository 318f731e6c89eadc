"""Training: a configuration and data → a run folder of checkpoints and figures."""
