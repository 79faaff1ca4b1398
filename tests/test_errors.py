"""Checks of settings by their key."""

import pytest

from kto_lightning.errors import ConfigError, check_number


def test_the_bounds_of_numbers() -> None:
    check_number("x", 0.0)
    check_number("x", 1.0, most=1.0)
    for value, limits in ((-1.0, {}), (0.0, {"above": 0.0}), (2.0, {"most": 1.0})):
        with pytest.raises(ConfigError, match=r"--model\.x must be"):
            check_number("x", value, **limits)
