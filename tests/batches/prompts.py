"""Random prompt keys, and the units of a pairing."""

from collections import Counter

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from kto_lightning.batches.pairing import Pairing

seeds = st.none() | st.integers(min_value=0, max_value=2**31)


@st.composite
def prompt_keys(draw) -> np.ndarray:
    keys = draw(st.lists(st.integers(min_value=0, max_value=5), min_size=2, max_size=40))
    assume(len(set(keys)) > 1)
    return np.array(keys, dtype=np.int64)


@st.composite
def balanced_keys(draw) -> np.ndarray:
    """No prompt holds more than half."""
    keys = draw(prompt_keys())
    assume(max(Counter(keys.tolist()).values()) * 2 <= len(keys))
    return keys


def units(pairing: Pairing) -> list[list[int]]:
    num_shuffled = len(pairing) - pairing.num_fixed
    return pairing.members[:num_shuffled].reshape(-1, pairing.unit_size).tolist()
