"""Comparison of TRL's `KTOTrainer` and `fit` on the same model and data, step by step.

`python -m kto_lightning parity` prints it; `tests/parity` checks it against the tolerances of
`agreement`. Needs the package trl.
"""
