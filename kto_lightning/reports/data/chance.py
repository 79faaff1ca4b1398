"""How often a batch would lack a class by chance alone."""

from math import exp, inf, lgamma


def single_label_chance(num_desirable: int, num_undesirable: int, batch_size: int) -> float | None:
    """The chance that a batch drawn from these records has one label only; None if too few."""
    total = num_desirable + num_undesirable
    if total < batch_size:
        return None
    ways = [_log_comb(count, batch_size) for count in (num_desirable, num_undesirable)]
    return sum(exp(way - _log_comb(total, batch_size)) for way in ways)


def _log_comb(total: int, size: int) -> float:
    """log of how many batches there are; exact numbers would have millions of digits."""
    if size > total:
        return -inf
    return lgamma(total + 1) - lgamma(size + 1) - lgamma(total - size + 1)
