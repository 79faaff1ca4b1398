"""The parts of a record that are not in its tokens: what a template or a tokenizer drops silently.

The tokens are decoded and each part is looked for in them: the text of every message, reasoning,
the names and arguments of tool calls, the names of tools. Templates change the white space around
a part and write arguments in their own notation, and tokenizers normalize Unicode, so a part that
is not found as it stands is looked for by its letters, digits and emojis alone.
"""

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from kto_lightning.data.strict_json import parse_json_or_text
from kto_lightning.data.token_ids import RecordJson, TokenizedRecord, common_prefix_length

NO_TOKEN = "some characters of record"
"""The name of what a template writes and the tokenizer then drops."""
TOOLS = "tools of record"

_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_SYSTEM_ROLES = ("system", "developer")
_START_OF_REASONING, _END_OF_REASONING = "<think>", "</think>"
_NEITHER_LETTER_NOR_EMOJI = re.compile("(?:[^\\w\u2600-\u27bf\U0001f000-\U0001faff]|_)+")
_DECODED_AS_SPACE = "\u2581"
"""SentencePiece's mark of a space."""


def lost_parts_of(
    records: list[TokenizedRecord], starts: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[str]]:
    """For each record the names of the parts that its tokens lack, such as `reasoning of prompt`.

    Args:
        records: tokenized, before truncation.
        starts: where in `text_ids` each completion begins.
        tokenizer: which made the tokens.
    """
    halves = [
        half
        for item, start in zip(records, starts, strict=True)
        for half in (item.text_ids[:start], item.text_ids[start:])
    ]
    texts = tokenizer.batch_decode(halves, clean_up_tokenization_spaces=False)
    for item, prompt, completion in zip(records, texts[::2], texts[1::2], strict=True):
        yield [] if item.fault is not None else _lost_parts(item, prompt, completion, tokenizer)


def _lost_parts(
    item: TokenizedRecord, prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The names of the parts that are neither in the decoded prompt nor in the completion."""
    decoded, lost = _Text(prompt, completion), dict[str, None]()
    decoded_whole: _Text | None = None
    for part in _parts_of(item.record):
        if part.name in lost or decoded.contains(part):
            continue
        if decoded_whole is None:
            # Decoded in one piece: a character's bytes may lie on both sides of the start.
            whole = str(tokenizer.decode(item.text_ids, clean_up_tokenization_spaces=False))
            decoded_whole = _Text(whole[: len(prompt)], whole[len(prompt) :])
            rendered = _rendered_text(item)
        name = _name_of_loss(part, decoded_whole, rendered)
        lost |= {} if name is None else {name: None}
    return list(lost)


def _rendered_text(item: TokenizedRecord) -> "_Text | None":
    if item.texts is None:
        return None
    prompt, whole = item.texts
    start = common_prefix_length(prompt, whole)
    return _Text(whole[:start], whole[start:])


def _name_of_loss(part: "_Part", decoded: "_Text", rendered: "_Text | None") -> str | None:
    if decoded.contains(part):
        return None
    if rendered is None or not rendered.contains(part):
        return part.name
    return NO_TOKEN if Counter(_letters(part.text)) - decoded.counts else None


@dataclass(frozen=True, slots=True)
class _Part:
    """A text that a record contains."""

    name: str
    """What it is, for the finding."""
    text: str
    in_completion: bool = False
    is_json: bool = False
    """Whether it is JSON text, whose keys and values may be written in another notation."""


class _Text:
    """The text of a prompt and of its completion, to look for parts in."""

    def __init__(self, prompt: str, completion: str) -> None:
        self._halves = prompt, completion

    @cached_property
    def _squeezed(self) -> "_Haystack":
        return _Haystack(*map(_squeeze, self._halves))

    @cached_property
    def _letters(self) -> "_Haystack":
        return _Haystack(*map(_letters, self._halves))

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each letter, digit and emoji occurs."""
        return Counter(self._letters.text)

    def contains(self, part: _Part) -> bool:
        wanted = _squeeze(part.text)
        if self._squeezed.has(wanted, part.in_completion):
            return True
        if part.is_json:
            return all(map(self.contains, _leaf_parts(part)))
        spellings = _spellings(part.text)
        return any(
            self._squeezed.has(_squeeze(text), part.in_completion) for text in spellings
        ) or any(
            self._letters.has(_letters(text) or wanted, part.in_completion)
            for text in (part.text, *spellings)
        )


class _Haystack:
    """A text in which most parts are found in their order, so that each search starts where the
    last one ended."""

    def __init__(self, prompt: str, completion: str) -> None:
        self.text = prompt + completion
        self._completion, self._next = len(prompt), 0

    def has(self, wanted: str, in_completion: bool) -> bool:
        """Whether `wanted` occurs; `in_completion`: so that it ends in the completion.

        A prompt may end with the completion's beginning, such as a tag that opens its reasoning.
        """
        if not wanted:
            return True
        least = max(0, self._completion - len(wanted) + 1) if in_completion else 0
        for start in dict.fromkeys((max(least, self._next), least)):
            found = self.text.find(wanted, start)
            if found >= 0:
                self._next = found + len(wanted)
                return True
        return False


def _squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.replace(_DECODED_AS_SPACE, " ").split())


def _letters(text: str) -> str:
    """Only letters, digits and emojis, in Unicode's compatibility form and without case."""
    folded = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return _NEITHER_LETTER_NOR_EMOJI.sub("", folded.casefold())


def _spellings(text: str) -> list[str]:
    """The text as JSON and HTML write it."""
    as_json = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return [*as_json, html.escape(text)]


def _parts_of(record: RecordJson) -> Iterator[_Part]:
    """Every part of a record, in the order in which most templates write them."""
    for tool in record.get("tools") or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield _Part(TOOLS, name)
    for key in ("prompt", "completion"):
        content, in_completion = record[key], key == "completion"
        messages = [{"content": content}] if isinstance(content, str) else content
        for message in messages:
            for what, text in _texts_of(message):
                yield _Part(f"{what} of {key}", text, in_completion)
            for name, arguments in _calls_of(message):
                yield _Part(f"tool calls of {key}", name, in_completion)
                yield _Part(f"tool calls of {key}", arguments, in_completion, is_json=True)


def _texts_of(message: RecordJson) -> Iterator[tuple[str, str]]:
    """Each text of a message, with its kind."""
    content = message.get("content") or ""
    kind = "system message" if message.get("role") in _SYSTEM_ROLES else "text"
    for text in [content] if isinstance(content, str) else [part["text"] for part in content]:
        before, end, answer = text.rpartition(_END_OF_REASONING)
        opening, start, reasoning = before.partition(_START_OF_REASONING)
        if end and not start:
            opening, reasoning = "", before
        yield from ((kind, opening), ("reasoning", reasoning), (kind, answer))
    for key in _REASONING_KEYS:
        yield from (("reasoning", leaf) for leaf in _leaves(message.get(key)))
    yield from (("refusal", leaf) for leaf in _leaves(message.get("refusal")))


def _calls_of(message: RecordJson) -> Iterator[tuple[str, str]]:
    """Name and arguments, as JSON text, of each tool call of a message."""
    for key in _CALL_KEYS:
        calls = message.get(key)
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict):
                arguments = function.get("arguments") or ""
                is_text = isinstance(arguments, str)
                text = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
                yield str(function.get("name") or ""), text


def _leaf_parts(part: _Part) -> Iterator[_Part]:
    for text in _leaves(parse_json_or_text(part.text)):
        yield _Part(part.name, text, part.in_completion)


def _leaves(value: object) -> Iterator[str]:
    """Keys, texts and numbers; true, false and null are too short to be told from other text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
