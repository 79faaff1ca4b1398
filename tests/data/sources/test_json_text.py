"""Reading values one by one gives what `json.loads` gives, errors and their places included."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.data.sources import json_text
from kto_lightning.data.sources.json_text import BrokenJsonError, JsonText
from kto_lightning.data.strict_json import RecordError
from tests.data.rows import QUICK

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé"), inner, max_size=3),
    max_leaves=8,
)
BLOCKS = st.sampled_from([1, 2, 3, 7, 64])


def read_array(raw: bytes, block: int) -> list:
    """The elements of an array, read in blocks of so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "BLOCK", block)
        text = JsonText(io.BytesIO(raw).read, "a.json")
        assert text.peek() == "["
        text.skip()
        values, goes_on = [], text.peek() != "]"
        while goes_on:
            values.append(text.value())
            goes_on = text.in_array()
            text.peek()
        return values


@QUICK
@given(st.lists(VALUES, max_size=4), st.sampled_from([None, 1]), st.booleans(), BLOCKS)
def test_values_are_those_of_json(values: list, indent: int, ascii_: bool, block: int) -> None:
    raw = json.dumps(values, indent=indent, ensure_ascii=ascii_).encode()
    assert read_array(raw, block) == values


@QUICK
@given(st.lists(VALUES, min_size=1, max_size=3), st.data(), BLOCKS)
def test_errors_are_those_of_json(values: list, data: st.DataObject, block: int) -> None:
    text = json.dumps(values, indent=1)
    at = data.draw(st.integers(1, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", "@", '"', ",", "\n]"]))
    try:
        expected = json.loads(damaged)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return
        with pytest.raises(BrokenJsonError) as raised:
            read_array(damaged.encode(), block)
        match = re.search(r"column (\d+)\)", str(raised.value))
        assert match is not None
        assert (raised.value.line, int(match[1])) == (error.lineno, error.colno)  # noqa: PT017
    else:
        assert read_array(damaged.encode(), block) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b'{"a": 1, "a": 2}', 'an object has the key "a" twice.'),
        (b'{"a": [NaN]}', "NaN is not JSON."),
        (b"9" * 5000, "a number has too many digits"),
        (b'{"a": "caf\xe9"}', "not valid UTF-8, perhaps Windows-1252. Convert the file: iconv -f"),
    ],
)
@pytest.mark.parametrize("block", [1, 1000])
def test_a_value_that_is_refused_does_not_hide_the_next(
    value: bytes, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    text = JsonText(io.BytesIO(value + b' {"b": 3}').read, "a.json")
    text.peek()
    with pytest.raises(RecordError) as error:
        text.value()
    assert str(error.value).startswith(message)
    text.peek()
    assert text.value() == {"b": 3}


def test_only_one_value_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 1000)
    num_read = 0

    def read(size: int) -> bytes:
        """An array that does not end."""
        nonlocal num_read
        num_read += size
        return (b"[" if num_read == size else b"") + b'"0123456789", ' * (size // 14)

    text = JsonText(read, "a.json")
    text.peek()
    text.skip()
    while num_read < 20 * json_text.BLOCK:
        text.peek()
        assert text.value() == "0123456789"
        assert text.in_array()
        assert len(text._text) <= 2 * json_text.BLOCK
