"""Log-probs -> update: scoring, metrics, optimizers, evaluation, checkpoints."""
