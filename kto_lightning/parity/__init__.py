"""TRL's `KTOTrainer` and `fit` side by side on the same model and data, and how far apart they are.

`python -m kto_lightning parity` shows it, and the tests of `tests/parity` hold it to the tolerances
of `agreement`. Needs the package trl.
"""
