"""`JsonText`: JSON values read one after another, with one of them in memory at a time."""

import codecs
import json
import re
from collections.abc import Callable
from typing import NoReturn

from kto_lightning.data.sources.encodings import check_decoded
from kto_lightning.data.strict_json import STRICT_DECODER, RecordError, decode_strictly

BLOCK = 1 << 20
_SPACES = " \t\n\r"
_SPACE = re.compile(f"[{_SPACES}]*")
_LENIENT_DECODER = json.JSONDecoder(parse_int=len)
"""Finds the end of a value that the strict one refuses."""
_MARGIN = 16
"""Characters before the end of a block within which an error may come from the cut."""


class BrokenJsonError(RecordError):
    """A value whose end is unknown, so that nothing after it can be read."""


class JsonText:
    """A text with JSON values and what stands between them, read in blocks.

    Args:
        read: gives the next bytes, at most so many; UTF-8, perhaps with a byte order mark.
        name: of the file, for messages.
    """

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self.line = 1
        """The line of the next character, from 1."""
        self._read_bytes = read
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._at = 0
        self._column = 0
        """Characters of the first line of `_text` that are no longer in there."""
        self._ended = False
        self._valid = True
        """Whether all blocks were UTF-8."""

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            if self._text[self._at : self._at + 1] in _SPACES:
                match = _SPACE.match(self._text, self._at)
                assert match is not None
                self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def skip(self) -> None:
        """Pass the character that `peek` showed."""
        self._at += 1

    def value(self) -> object:
        """The next value, which begins with the character that `peek` showed.

        Raises:
            BrokenJsonError: if it is no JSON.
            RecordError: if it is JSON that is refused; the next call reads what follows it.
        """
        try:
            value, end = decode_strictly(self._decode, STRICT_DECODER)
        except RecordError as problem:
            if isinstance(problem.__cause__, json.JSONDecodeError):
                self._fail(problem.__cause__.msg, problem.__cause__.pos)
            self._skip_refused(problem)
            raise
        start = self._at
        self._advance(end)
        if not self._valid:
            check_decoded(self._text[start:end], self._name)
        return value

    def in_array(self) -> bool:
        """After a value of an array: whether another one follows; passes the comma or bracket.

        Raises:
            BrokenJsonError: if there is neither.
        """
        char = self.peek()
        if char not in (",", "]"):
            self._fail("Expecting ',' delimiter", self._at)
        self.skip()
        if char == "," and self.peek() in ("", "]"):
            self._fail("Expecting value", self._at)
        return char == ","

    def drop(self) -> None:
        """Free the text that has been read."""
        newline = self._text.rfind("\n", 0, self._at)
        self._column = self._at - newline - 1 if newline >= 0 else self._column + self._at
        self._text, self._at = self._text[self._at :], 0

    def _decode(self, decoder: json.JSONDecoder) -> tuple[object, int]:
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _MARGIN or error.msg.startswith("Unterminated")
                if not (cut and self._read()):
                    raise
            else:
                # A number may go on in the next block: 12 as 12.5e-3.
                may_go_on = self._text[end - 1].isdigit() and end > len(self._text) - _MARGIN
                if not (may_go_on and self._read()):
                    return value, end

    def _skip_refused(self, problem: RecordError) -> None:
        """Pass the value, whose end must be found."""
        try:
            _, end = self._decode(_LENIENT_DECODER)
        except json.JSONDecodeError as error:
            self._fail(error.msg, error.pos)
        except RecursionError:
            raise BrokenJsonError(str(problem), self.line) from problem
        self._advance(end)

    def _fail(self, problem: str, position: int) -> NoReturn:
        newline = self._text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position + 1
        line = self.line + self._text.count("\n", self._at, position)
        message = f"invalid JSON ({problem}, column {column}). Fix or remove it."
        raise BrokenJsonError(message, line)

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self) -> bool:
        """Append a block, as long as what is left at least; False at the end of the file."""
        if self._ended:
            return False
        raw = self._read_bytes(max(BLOCK, len(self._text) - self._at))
        self._ended = not raw
        if raw:  # at the end positions stay what they are, for errors
            self.drop()
        block = self._decoder.decode(raw, final=self._ended)
        try:
            block.encode()
        except UnicodeEncodeError:
            self._valid = False
        self._text += block
        return bool(raw or block)
