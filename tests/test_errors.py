"""Checks of settings by their key."""

import pytest

from kto_lightning.errors import (
    ConfigError,
    DataError,
    KTOError,
    check_number,
    error_message,
    printable,
)


def test_the_bounds_of_numbers() -> None:
    check_number("x", 0.0)
    check_number("x", 1.0, most=1.0)
    for value, limits in ((-1.0, {}), (0.0, {"above": 0.0}), (2.0, {"most": 1.0})):
        with pytest.raises(ConfigError, match=r"--model\.x must be"):
            check_number("x", value, **limits)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 你好 👩\u200d💻 a\u00a0b", "plain ü 你好 👩\u200d💻 a\u00a0b"),
        ("[/INST] [bold]", "[/INST] [bold]"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\nerror: b\r", r"a\nerror: b\r"),
        ("\x9b2J\x85", r"\x9b2J\x85"),
        ("\u202egnp\u2066\u200f\u2028\ufeff", r"\u202egnp\u2066\u200f\u2028\ufeff"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
    ],
)
def test_text_from_outside_is_text(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(printable(text)) == shown


def test_only_the_errors_of_several_records_have_several_lines() -> None:
    assert error_message(DataError("a\x1b\n  b")) == "a\\x1b\n  b"
    assert error_message(KTOError("a\nb")) == r"a\nb"
