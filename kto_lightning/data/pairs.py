"""Pairs: the prompt that a chosen and a rejected completion share, given or found in them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kto_lightning.data.messages import parse_messages
from kto_lightning.data.strict_json import RecordError
from kto_lightning.data.texts import MEDIA_KEYS, SYSTEM_KEYS, Text, key_names, parse_text

CONVERSATION_KEYS = ("messages", "conversations")
QUESTION_KEYS = ("instruction", "question", "query", "input")
"""Columns with the prompt as text; `input` completes `instruction` where both are given."""
NO_PROMPTS = (
    *("chosen", "rejected", "label", "weight", "tools", "chat_template_kwargs"),
    *(*SYSTEM_KEYS, *MEDIA_KEYS),
)
SPEAKER_TURN = re.compile(r"(?:^|\n) *(?:#+ *)?(?:assistant|response) *:", re.IGNORECASE)
"""The beginning of an answer in a conversation written as plain text."""


@dataclass(kw_only=True, slots=True)
class Pair:
    """A prompt and its two completions."""

    prompt: Text
    chosen: Text
    rejected: Text
    prompt_guessed: bool = False
    """Whether no column and no speaker's turn told where the prompt ends."""


def parse_pair(fields: dict, from_table: bool) -> Pair:
    """Parse a row with `chosen` and `rejected`.

    The prompt is the field `prompt`, or another field known to hold one, or what the two
    completions begin with.

    Raises:
        RecordError: if a field is invalid, or it is unknown which field holds the prompt.
    """
    if "chosen" not in fields:
        fields = _with_chosen(fields, from_table)
    chosen, rejected = (parse_text(key, fields, from_table) for key in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError(
            "'chosen' and 'rejected' must both be text or both messages. Fix the line."
        )
    if "prompt" in fields:
        prompt = parse_text("prompt", fields, from_table)
        return _join(Pair(prompt=prompt, chosen=chosen, rejected=rejected))
    key = _prompt_key(fields)
    split = _split(chosen, rejected)
    if key is None:
        if not split.prompt or split.prompt_guessed:
            _check_no_other_prompt(fields)
        return split
    if key in CONVERSATION_KEYS:
        prompt = _before_answer(key, parse_messages(key, fields[key], from_table), chosen)
    else:
        prompt = _question(key, fields)
    if isinstance(prompt, str) and isinstance(split.prompt, str) and prompt in split.prompt:
        return split  # the completions repeat the whole conversation
    return _join(Pair(prompt=prompt, chosen=chosen, rejected=rejected))


def _with_chosen(fields: dict, from_table: bool) -> dict:
    """The fields of a row with `rejected` beside a conversation whose last answer is the chosen
    one."""
    key = next((key for key in CONVERSATION_KEYS if key in fields), None)
    if key is None or "prompt" in fields:
        return fields
    messages = parse_messages(key, fields[key], from_table)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return fields
    rejected = parse_text("rejected", fields, from_table)
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    others = {name: value for name, value in fields.items() if name != key}
    return {**others, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}


def _prompt_key(fields: dict) -> str | None:
    """The field with the prompt of a pair that has none called `prompt`."""
    keys = [key for key in (*CONVERSATION_KEYS, *QUESTION_KEYS) if _is_filled(fields.get(key))]
    if keys == ["instruction", "input"]:
        keys = ["instruction"]
    if len(keys) > 1:
        raise RecordError(
            f"it is unknown which of {', '.join(keys)} is the prompt of 'chosen' and 'rejected'. "
            "Name it 'prompt', or drop the others."
        )
    return keys[0] if keys else None


def _is_filled(value: object) -> bool:
    """Whether it is text, or a list that may hold text."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], str | dict)
    return isinstance(value, str) and bool(value.strip())


def _question(key: str, fields: dict) -> str:
    parts = [fields[name] for name in ("instruction", "input") if fields.get(name)]
    parts = parts if key == "instruction" else [fields[key]]
    if not all(isinstance(part, str) for part in parts):
        raise RecordError(f"'{key}' must be text. Fix the line, or name the prompt 'prompt'.")
    return "\n".join(parts)


def _before_answer(key: str, prompt: list[dict], chosen: Text) -> list[dict]:
    """A conversation without the chosen answer, which some files repeat at its end."""
    if prompt[-1]["role"] != "assistant":
        return prompt
    answer = prompt[-1].get("content") if isinstance(chosen, str) else prompt[-1]
    if answer != (chosen if isinstance(chosen, str) else chosen[-1]):
        raise RecordError(
            f"'{key}' ends with an answer that is not the chosen one. Let it end with the message "
            "that 'chosen' and 'rejected' answer."
        )
    return prompt[:-1]


def _join(pair: Pair) -> Pair:
    """The pair without a prompt that its completions repeat."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        return pair
    if isinstance(prompt, str):
        # Beside whole conversations, a plain prompt only repeats their user's turn.
        split = _split(chosen, rejected)
        if not split.prompt:
            return pair
        if not is_said(prompt, split.prompt):
            raise RecordError(
                "the prompt is not among the messages that 'chosen' and 'rejected' begin with. "
                "Add it there, or leave only the answers in 'chosen' and 'rejected'."
            )
        return split
    # `chosen` and `rejected` may repeat the prompt; TRL would then train on it twice.
    length = len(prompt)
    if chosen[:length] == rejected[:length] == prompt and min(len(chosen), len(rejected)) > length:
        return Pair(prompt=prompt, chosen=chosen[length:], rejected=rejected[length:])
    return pair


def is_said(text: str, messages: Iterable[str | dict]) -> bool:
    """Whether one of the messages or texts contains the text, up to white space."""
    wanted = " ".join(text.split())
    return any(wanted in " ".join(said.split()) for said in map(message_text, messages))


def message_text(message: str | dict) -> str:
    """The text of a message's content, or of its `value` in ShareGPT's form; or the text itself."""
    content = message
    if isinstance(message, dict):
        content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _check_no_other_prompt(fields: dict) -> None:
    """Raise RecordError if another field may hold the prompt, which would be lost."""
    others = [key for key in fields if key not in NO_PROMPTS and _is_filled(fields[key])]
    if others:
        raise RecordError(
            "'chosen' and 'rejected' have no prompt, and it is unknown whether one of "
            f"{key_names(others)} is it. Name the prompt's column 'prompt', or drop these columns "
            "if the prompt stands in 'chosen' and 'rejected'."
        )


def _split(chosen: Text, rejected: Text) -> Pair:
    """Split off the common beginning as the prompt.

    Messages as TRL's `extract_prompt` splits them. Text is cut after the last speaker's turn that
    both share, else before the word in which they part: TRL would cut in the middle of it.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        length, guessed = _text_length(chosen, rejected)
    else:
        length, guessed = _common_length(chosen, rejected), False
    return Pair(
        prompt=chosen[:length],
        chosen=chosen[length:],
        rejected=rejected[length:],
        prompt_guessed=guessed,
    )


def _text_length(chosen: str, rejected: str) -> tuple[int, bool]:
    """The length of the prompt that two texts begin with, and whether it is uncertain."""
    length = _common_length(chosen, rejected)
    turns = [turn.end() for turn in SPEAKER_TURN.finditer(chosen[: length + 1])]
    turns = [end for end in turns if chosen[:end] == rejected[:end]]
    if turns:
        ends_there = not any(SPEAKER_TURN.search(text, turns[-1]) for text in (chosen, rejected))
        return turns[-1], not ends_there
    in_word = not chosen[length - 1 : length].isspace() and not (
        chosen[length : length + 1].isspace() and rejected[length : length + 1].isspace()
    )
    if in_word:
        space = next((i for i in reversed(range(length)) if chosen[i].isspace()), None)
        if space is not None:
            length = space + (chosen[space] != " ")
    return length, True


def _common_length(chosen: Text, rejected: Text) -> int:
    """The length of the common beginning by the rules of TRL's `extract_prompt`.

    A completion keeps at least its last message or character, and a space before it.
    """
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if length is None:
        return max(shorter - 1, 0)
    return length - 1 if length and chosen[length - 1] == " " else length
