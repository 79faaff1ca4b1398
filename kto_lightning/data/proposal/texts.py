"""Finds prompt and completion, a conversation, or a pair among the columns of a file."""

import re

from kto_lightning.data.pairs import message_text
from kto_lightning.data.proposal.facts import ALL, ColumnFacts, messages_of
from kto_lightning.data.proposal.names import name_score
from kto_lightning.data.turns import role_of

Found = dict[str, str]
"""The column or path of each field of a record."""
MAX_CANDIDATES = 8
NAMED = 1.5
WELL_NAMED = 2.0
LEAST_FILLED = 0.2
"""Texts that fewer rows have, as a share, are not those to train on."""
FIRST_UNSPACED = "\u0e00"
"""Thai; from here on are most scripts that write no spaces between words."""
ID_LIKE = re.compile(r"[\w.:/@#+-]*\d[\w.:/@#+-]*")


def find_texts(found: Found, facts: list[ColumnFacts]) -> Found:
    """The columns found before, and those of prompt and completion, messages, or a pair."""
    found = dict(found)
    most = max((column.filled for column in facts), default=0)
    facts = [
        column
        for column in facts
        if column.filled > LEAST_FILLED * most and ALL not in column.path.split(".")
        if not _holds_messages(column, facts)
    ]
    rejected = best_named(facts, "rejected", found)
    pair = found if rejected is None else found | {"rejected": rejected}
    chosen = best_named(facts, "chosen", pair)
    if rejected is not None and not found.keys() & {"completion", "label"}:
        conversation = _conversation(facts, pair)
        if chosen is not None:
            found = pair | {"chosen": chosen}
        elif conversation and not found.keys() & {"prompt", "messages"}:
            return found | {"messages": conversation.path, "rejected": rejected}
    if "messages" in found:
        return found
    if found.keys() & {"chosen", "rejected"}:
        prompts = [] if "prompt" in found else _candidates(facts, "prompt", found)
        return found | ({"prompt": prompts[0][1].path} if prompts else {})
    conversation = _conversation(facts, found)
    if conversation and not found.keys() & {"prompt", "completion"}:
        completions = _candidates(facts, "completion", found)
        if not any(_is_other_answer(column, conversation) for _, column in completions):
            return found | {"messages": conversation.path}
    texts = _prompt_and_completion(facts, found)
    whole = _conversation(facts, found, least_ends=0.0)
    if whole and "completion" not in texts and not found.keys() & {"prompt", "completion"}:
        return found | {"messages": whole.path}
    return found | texts


def _holds_messages(column: ColumnFacts, facts: list[ColumnFacts]) -> bool:
    """Whether it is the JSON text of an object that holds messages, which then are the text."""
    inside = f"{column.path}."
    return bool(column.texts) and any(
        other.in_text
        and other.path.startswith(inside)
        and other.filled >= 0.5 * column.filled
        and (any(map(messages_of, other.cells)) or other.path.endswith(".message.content"))
        for other in facts
    )


def is_free(path: str, found: Found) -> bool:
    """Whether neither the column, nor what it stands in or holds, is used already."""
    return not any(_overlap(path, used) for used in found.values())


def _overlap(one: str, other: str) -> bool:
    one, other = one.replace(f".{ALL}", ".0"), other.replace(f".{ALL}", ".0")
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def best_named(facts: list[ColumnFacts], role: str, found: Found) -> str | None:
    """The column with texts or messages whose name fits a field best."""
    if role in found:
        return found[role]
    scored = [
        (name_score(column.path, role), column.path)
        for column in facts
        if column.texts or any(map(messages_of, column.cells))
        if is_free(column.path, found) and not _is_choice(column)
    ]
    best = max((score for score, _ in scored), default=0.0)
    return next(path for score, path in scored if score == best) if best >= WELL_NAMED else None


def _is_choice(column: ColumnFacts) -> bool:
    """Whether it names one of a few, such as `winner: model_a`, or holds ids."""
    values, texts = column.values, column.texts
    few = values is not None and len(values) <= 3 < len(column.cells) and len(texts) > 3
    return (few and not any(" " in value for value in values or ())) or _id_share(texts) >= 0.8


def _id_share(texts: list[str]) -> float:
    return sum(bool(ID_LIKE.fullmatch(text)) for text in texts) / max(len(texts), 1)


def _prompt_and_completion(facts: list[ColumnFacts], found: Found) -> Found:
    """The two columns that together fit best; or the one that is there."""
    roles = ("prompt", "completion")
    candidates = {
        role: [(0.0, ColumnFacts(path=found[role]))]
        if role in found
        else _candidates(facts, role, found)
        for role in roles
    }
    pairs = [
        (score + other + _belong(prompt.path, completion.path), prompt.path, completion.path)
        for score, prompt in candidates["prompt"]
        for other, completion in candidates["completion"]
        if not _overlap(prompt.path, completion.path)
    ]
    if pairs:
        _, prompt, completion = max(pairs, key=lambda pair: pair[0])
        return {"prompt": prompt, "completion": completion}
    singles = [(score, role, c.path) for role in roles for score, c in candidates[role]]
    named = [single for single in singles if name_score(single[2], single[1]) >= NAMED]
    return {max(named)[1]: max(named)[2]} if named else {}


def _belong(one: str, other: str) -> float:
    """A little for two columns in the same object."""
    return 0.5 * (one.rpartition(".")[0] == other.rpartition(".")[0])


def _candidates(
    facts: list[ColumnFacts], role: str, found: Found
) -> list[tuple[float, ColumnFacts]]:
    """Columns that may be prompt or completion, the best first."""
    free = [column for column in facts if is_free(column.path, found)]
    scored = [(_text_score(column, role), column) for column in free]
    scored = [item for item in scored if item[0] >= NAMED]
    return sorted(scored, key=lambda item: -item[0])[:MAX_CANDIDATES]


def _text_score(column: ColumnFacts, role: str) -> float:
    """How well a column's name and values fit prompt or completion; below 0 if not at all."""
    name, cells, texts = name_score(column.path, role), column.cells, column.texts
    lists = [messages for messages in map(messages_of, cells) if messages]
    if len(lists) >= 0.5 * len(cells):
        only = all(_is_assistant(message) for messages in lists for message in messages)
        fits = only if role == "completion" else _ends_with_assistant(column) < 0.5
        # Messages are what the model got; texts beside them may be a part of it.
        return name + (5.0 if name > 0 else 3.0) if fits else -1.0
    if len(texts) < 0.5 * len(cells) or name <= -1.0:
        return -1.0
    # One of a few words, such as `answer: accept`: other texts are read before.
    name -= 1.5 * (role == "completion" and _is_choice(column))
    words = sum(map(_has_words, texts)) / len(texts)
    # An answer may be a number.
    ids = _id_share([t for t in texts if role == "prompt" or not t.strip().isdigit()])
    different = len(set(texts)) / len(texts)
    questions = sum("?" in text for text in texts) / len(texts)
    if name < WELL_NAMED and (words < 0.5 or different < 0.3) and (name <= 0 or different < 0.3):
        return -1.0
    return name + 2 * words + different - 3 * ids + (questions / 2 if role == "prompt" else 0)


def _has_words(text: str) -> bool:
    """Whether a text has several words; those of some scripts have no spaces between them."""
    text = text.strip()
    return len(text.split(None, 1)) > 1 or len(text) > (5 if max(text) >= FIRST_UNSPACED else 40)


def _conversation(
    facts: list[ColumnFacts], found: Found, *, least_ends: float = 0.5
) -> ColumnFacts | None:
    """The best named column of conversations of which so many end with the assistant's answer."""
    several = [
        column
        for column in facts
        if is_free(column.path, found) and _ends_with_assistant(column) >= least_ends
        if sum(len(messages_of(cell)) > 1 for cell in column.cells) >= 0.5 * len(column.cells)
        if len({_is_assistant(m) for cell in column.cells for m in messages_of(cell)}) == 2
    ]
    return max(several, key=lambda c: name_score(c.path, "messages")) if several else None


def _is_other_answer(column: ColumnFacts, conversation: ColumnFacts) -> bool:
    """Whether a column named as an answer holds others than the ends of the conversations."""
    if name_score(column.path, "completion") < WELL_NAMED:
        return False
    last = [messages_of(cell)[-1:] for cell in conversation.cells]
    ends = {message_text(message).strip() for messages in last for message in messages}
    answers = [_answer_text(cell).strip() for cell in column.cells]
    return sum(answer in ends for answer in answers) < 0.5 * len(answers)


def _answer_text(cell: object) -> str:
    messages = messages_of(cell)
    return message_text(messages[-1]) if messages else str(cell)


def _is_assistant(message: dict) -> bool:
    return role_of(message.get("role", message.get("from"))) == "assistant"


def _ends_with_assistant(column: ColumnFacts) -> float:
    """Share of conversations whose last message is the assistant's."""
    lists = [messages for messages in map(messages_of, column.cells) if messages]
    return sum(_is_assistant(messages[-1]) for messages in lists) / len(lists) if lists else 0.0
