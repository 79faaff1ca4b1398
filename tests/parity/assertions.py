"""`kto_lightning.parity.agreement` as assertions."""

from torch import Tensor

from kto_lightning.parity.agreement import compare, movement
from kto_lightning.parity.trace import Trace


def assert_traces_agree(ours: Trace, theirs: Trace, *, beta: float) -> None:
    """Every column of every step, each at the step where both sides are furthest apart."""
    comparisons = compare(ours, theirs, beta=beta)
    assert {"train/loss", "train/grad_norm", "train/tokens"} <= {c.name for c in comparisons}
    for comparison in comparisons:
        assert comparison.agrees, str(comparison)


def assert_weights_agree(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], initial: dict[str, Tensor]
) -> None:
    """Weights after SGD: to 1e-4 of the largest movement, which must be at least 1e-3."""
    moved = movement(ours, theirs, initial)
    assert moved.is_enough, f"the weights moved by {moved.largest:.2g} at most, too little"
    assert moved.agrees, f"{moved.difference:.2g} apart after a movement of {moved.largest:.2g}"
