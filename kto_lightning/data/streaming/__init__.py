"""Training on records that are read while the run goes on."""
