"""Models that look their positions up in a table, and so know only so many of them."""

from torch import nn
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError

_OPT_OFFSET = 2
"""Rows that OPT's tables begin with and no position has."""


def num_positions(model: PreTrainedModel) -> int | None:
    """The length of a model's table of learned positions (GPT-2, OPT, GPT-Neo); None: it has none,
    and computes whatever position it is asked for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    is_table = any(table.num_embeddings in (limit, limit + _OPT_OFFSET) for table in tables)
    return limit if is_table else None


def check_positions(model: PreTrainedModel, name: str, longest: int | None) -> None:
    """Refuse sequences that a model has no positions for, before the first of them comes.

    Args:
        model: the policy.
        name: what it was loaded by.
        longest: tokens that a sequence may have; None: any number.

    Raises:
        ConfigError: with the length to set.
    """
    known = num_positions(model)
    if known is None or (longest is not None and longest <= known):
        return
    found = "sequences of any length" if longest is None else f"sequences of up to {longest} tokens"
    raise ConfigError(
        f"{name} has {known} positions, and {found} would be given to it. Set --data.max_length "
        f"{known}."
    )
