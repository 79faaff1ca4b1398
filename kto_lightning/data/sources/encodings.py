"""Messages for bytes that are not UTF-8."""

from kto_lightning.data.sources.wrong_kind import conversion
from kto_lightning.data.strict_json import RecordError

KIND = "not valid UTF-8"
WINDOWS_TEXT = frozenset(range(0xA0, 0xFF)) | frozenset(b"\x80\x85") | frozenset(range(0x91, 0x98))
"""Letters and punctuation in Windows-1252, where other bytes above 0x7f are rare or undefined."""


def decode(raw: bytes, name: str) -> str:
    """Text of a row of the file `name`.

    Raises:
        RecordError: if it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise RecordError(f"{KIND} ({got}){_advice(raw, name)}", kind=KIND) from error


def check_decoded(text: str, name: str) -> None:
    """Check a text that was decoded with `surrogateescape`.

    Raises:
        RecordError: if its bytes were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        advice = _advice(text.encode("utf-8", "surrogateescape"), name)
        raise RecordError(f"{KIND}{advice}", kind=KIND) from error


def _advice(raw: bytes, name: str) -> str:
    others = {byte for byte in raw if byte > 0x7F}
    # Where some characters are UTF-8, the rest is more likely damaged than of another encoding.
    if others <= WINDOWS_TEXT and raw.decode("utf-8", "ignore").isascii():
        return f", perhaps Windows-1252. Convert the file: {conversion('CP1252', name)}"
    return ". Save the file as UTF-8."
