"""Bounds on rounding that hold on any processor. None is read off a run.

Where there is a float64 truth, a float32 computation may err at most twice what plain float32 code
errs, and two ulps of the quantity's size, as plain code may be exact by chance:

    ‖found − truth‖ ≤ 2 ‖plain − truth‖ + 2 eps ‖truth‖

Where two runs are compared and there is none, the size of what was rounded decides: z0 and rewards
are differences of log-probs, which nearly cancel, so that a few eps of the log-probs remain.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
FACTOR = 2.0
"""How often a computation may err by what plain code errs in the same type."""
FACTOR_OF_MANY = 4.0
"""In place of it where thousands are compared, of computations that divide the same sums elsewhere:
by chance a few of them err more than twice as much."""
ULPS = 2.0
RELATIVE = 1e-5
"""Of log-probs, losses and gradient norms in two runs that differ in nothing but rounding: the
project's second invariant (`kto_lightning.parity.agreement`)."""
SIX_DIGITS = 5e-6
"""What printing six digits leaves of a number, relative."""
LOGP_ULPS = 4.0
"""Of a log-prob: two runs round it in two places each, the policy's and the reference's."""


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def assert_errs_like_plain(
    found: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    name: str = "",
    eps: float = EPS,
    factor: float = FACTOR,
) -> None:
    """The bound above, of all elements as one vector.

    Args:
        eps: of the type that both computed in.
        factor: in place of `FACTOR`.
    """
    assert found.shape == plain.shape == truth.shape, name
    assert truth.dtype == torch.float64
    truth = truth.detach()
    error, plain_error = (float((x.detach().double() - truth).norm()) for x in (found, plain))
    allowed = factor * plain_error + ULPS * eps * float(truth.norm())
    assert error <= allowed, f"{name}: off by {error:.2e}, plain by {plain_error:.2e}"


def assert_gradients_err_like_plain(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    eps: float = EPS,
    factor: float = FACTOR,
) -> None:
    """The bound above for each layer's gradient as one vector.

    Layer by layer, as rounding in one parameter's gradient has the size of what comes back to the
    layer: that of an attention's queries nearly cancels, and its own size says nothing of it.
    """
    assert found.keys() == plain.keys() == truth.keys()
    assert any(gradient.any() for gradient in truth.values())
    for name, gradient in truth.items():
        assert found[name].shape == gradient.shape, name
    layers = defaultdict(list)
    for name in truth:
        numbered = re.match(r".*?\.\d+\.", name)
        layers[numbered.group() if numbered else name].append(name)
    for layer, names in layers.items():
        vectors = (torch.cat([side[n].flatten() for n in names]) for side in (found, plain, truth))
        assert_errs_like_plain(*vectors, name=layer, eps=eps, factor=factor)


def assert_same_logps(found: Tensor, expected: Tensor) -> None:
    """Of one model and one batch in two float32 runs, neither of which is the truth."""
    torch.testing.assert_close(
        found, expected, rtol=0.0, atol=LOGP_ULPS * EPS * float(expected.abs().max())
    )


def logp_rounding(numbers: Iterable[tuple[str, float]]) -> float:
    """What rounding may leave of a difference of log-probs, in nats.

    Args:
        numbers: names and values of a run's metrics, among them the mean log-probs of a class.
    """
    logps = [abs(value) for name, value in numbers if "logps" in name and not math.isnan(value)]
    # Means of a class hide its longer sequences: twice the mean bounds those of these tests' data.
    return LOGP_ULPS * EPS * 2 * max(logps)


def assert_same_rewards(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], *, beta: float = 0.1
) -> None:
    """Lines of two `.rewards.jsonl`, to the rounding of their log-probs."""
    logps = [abs(line[f"{side}_logps"]) for line in expected for side in ("policy", "reference")]
    rewards = ([line["reward"] for line in lines] for lines in (found, expected))
    rounding = beta * LOGP_ULPS * EPS * max(logps)
    for number, (mine, other) in enumerate(zip(*rewards, strict=True), start=1):
        assert abs(mine - other) <= rounding, f"line {number}: {mine} for {other} ± {rounding:.2g}"


def assert_same_numbers(
    found: Mapping[str, float],
    expected: Mapping[str, float],
    *,
    beta: float = 0.1,
    relative: float = RELATIVE,
    rounding: float | None = None,
    where: str = "",
) -> None:
    """Metrics of two runs: relative, or for z0 and rewards to the rounding of their log-probs.

    Args:
        rounding: that of a log-prob, in nats, where `expected` has none.
    """
    assert found.keys() == expected.keys()
    if rounding is None:
        rounding = logp_rounding(expected.items())
    for name, value in expected.items():
        absolute = 0.0
        if "z0" in name:
            absolute = rounding
        elif "reward" in name:
            absolute = 2 * beta * rounding if "margin" in name else beta * rounding
        difference, allowed = abs(found[name] - value), max(relative * abs(value), absolute)
        message = f"{where}{name}: {found[name]} for {value} ± {allowed:.2g}"
        assert math.isnan(found[name]) == math.isnan(value), message
        assert math.isnan(value) or difference <= allowed, message
