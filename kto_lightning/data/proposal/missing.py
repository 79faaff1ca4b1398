"""What no mapping can give, with the way out: answers, judgements, texts that stand elsewhere."""

import re
from collections.abc import Iterator

from kto_lightning.data.proposal.facts import ALL, ColumnFacts, messages_of
from kto_lightning.data.proposal.labels import LabelGuess
from kto_lightning.data.proposal.names import name_score, parts_of, word_set
from kto_lightning.data.proposal.turns import unknown_speakers
from kto_lightning.data.strict_json import quote

Found = dict[str, str]
CONTEXT = ("input", "context", "history", "document")
TRACE_IDS = {
    "traceid": "Langfuse",
    "observationid": "Langfuse",
    "runid": "LangSmith",
    "spanid": "Phoenix",
}
LOG_WORDS = word_set("session conversation timestamp time date created user model latency")
NUMBERED = re.compile(r"(.+?)[_. -]?([ab12]|[01])$", re.IGNORECASE)


def unmappable(found: Found, facts: list[ColumnFacts]) -> str | None:
    """Why no mapping of columns gives records, with the way out; None if one may."""
    if not facts:
        return "The rows are no objects with named columns: write one JSON object a line."
    checks = (_scores_without_texts, _message_tree, _several_answers)
    return next((said for check in checks if (said := check(found, facts)) is not None), None)


def missing_sentences(
    found: Found,
    facts: list[ColumnFacts],
    guess: LabelGuess | None,
    *,
    labels_needed: bool,
) -> list[str]:
    """What keeps rows with these columns from being trained on, the most telling first.

    Args:
        found: the column of each field.
        facts: all columns.
        guess: what the values of the label mean.
        labels_needed: whether records need a judgement.
    """
    texts = list(_about_texts(found, facts))
    if not labels_needed or (texts and not found.keys() & {"prompt", "completion"}):
        return texts
    return [*texts, *_about_label(found, facts, guess)]


def _scores_without_texts(found: Found, facts: list[ColumnFacts]) -> str | None:
    """Scores that refer to a trace, which holds the texts."""
    if found.keys() & {"completion", "messages", "chosen"}:
        return None
    keys = {"".join(parts_of(column.path)[0]): column.path for column in facts}
    tool = next((name for key, name in TRACE_IDS.items() if key in keys), None)
    if tool is None:
        return None
    if tool == "Langfuse":
        return (
            "These are scores without the texts they judge, as Langfuse's export of scores: export "
            "the traces instead, which hold input, output and scores."
        )
    key = next(path for name, path in keys.items() if TRACE_IDS.get(name) == tool)
    return (
        f"These are judgements without the texts they judge, as {tool} exports them: join them "
        f"with the exported runs or spans by `{key}`; the page on exports in the documentation has "
        "a recipe."
    )


def _message_tree(found: Found, facts: list[ColumnFacts]) -> str | None:
    """Messages in rows of their own, each with the id of the one before."""
    parents = {
        column.path.rpartition(".")[0]: column.path
        for column in facts
        if "".join(parts_of(column.path)[0]) in ("parentid", "parentmessageid")
    }
    if "messages" not in found and any(map(_is_below_a_reply, facts)):
        return (
            "The messages form a tree (`replies` holds the ones after): write each judged answer "
            "with the messages before it as one record."
        )
    if not parents or "messages" in found:
        return None
    objects = {found.get(role, "").rpartition(".")[0] for role in ("prompt", "completion")}
    if found.keys() >= {"prompt", "completion"} and not (
        len(objects) == 2 and objects <= parents.keys()
    ):
        return None
    parent = next(iter(parents.values()))
    return (
        f"The messages form a tree (`{parent}` names the one before): write each judged answer "
        "with the messages before it as one record."
    )


def _is_below_a_reply(column: ColumnFacts) -> bool:
    parts = column.path.split(".")
    messages = (message for cell in column.cells for message in messages_of(cell))
    inside = parts[-1] == "replies" and any("replies" in message for message in messages)
    return inside or parts.count("replies") > 1


def _several_answers(found: Found, facts: list[ColumnFacts]) -> str | None:
    """Several answers to the prompt of one row, in columns side by side or in one list."""
    answer = found.get("completion", found.get("messages"))
    if answer is None or found.keys() & {"chosen", "rejected"}:
        return None
    numbered = NUMBERED.fullmatch(answer)
    used = (answer, found.get("prompt"))
    others = (NUMBERED.fullmatch(c.path) for c in facts if c.path not in used and _has_text(c))
    other = next((o for o in others if numbered and o and o[1] == numbered[1]), None)
    if other is not None:
        one, two = sorted((answer, other[0]))
        return (
            f"`{one}` and `{two}` are two answers to one prompt: write each with its own "
            "judgement as one record, or the better one to `chosen` and the other to `rejected`."
        )
    listed = next((c.path for c in facts if ALL in c.path and _first(c.path) == answer), None)
    if listed is None:
        return None
    return (
        f"A row has several answers to its prompt (`{listed}`): write each with its own judgement "
        "as one record."
    )


def _has_text(column: ColumnFacts) -> bool:
    return bool(column.texts) or any(map(messages_of, column.cells))


def _first(path: str) -> str:
    return path.replace(f".{ALL}", ".0")


def _about_texts(found: Found, facts: list[ColumnFacts]) -> Iterator[str]:
    if "messages" in found or found.keys() >= {"chosen", "rejected"}:
        return
    shown = _shown([column.path for column in facts if column.texts])
    other = _other_conversation(facts)
    if found.keys() >= {"prompt", "completion"}:
        return
    if other is not None:
        yield other
    elif "prompt" in found:
        yield (
            f"There is no answer to `{found['prompt']}` in the file: KTO judges answers. Add the "
            "column with the model's answers, or export the log that has them."
        )
    elif "completion" in found:
        yield (
            f"There is no prompt for `{found['completion']}` in the file. Add the column with what "
            "was asked, or name it with `columns.prompt`."
        )
    else:
        yield (
            "There is neither a prompt nor an answer to be seen"
            + (f" (texts are in {shown})" if shown else "")
            + ". Name them with `columns.prompt` and `columns.completion`, or give the file that "
            "has them."
        )


def _other_conversation(facts: list[ColumnFacts]) -> str | None:
    """A list of messages whose speakers are unknown."""
    unknown = unknown_speakers(facts)
    if unknown is None:
        return None
    name, speaker, speakers = unknown
    shown = f" (such as {', '.join(map(quote, speakers))})" if speakers else ""
    return (
        f"`{name}` seems to be a conversation, but who of its `{speaker}`{shown} is the user and "
        "who the assistant is unknown: write user and assistant there."
    )


def _about_label(found: Found, facts: list[ColumnFacts], guess: LabelGuess | None) -> Iterator[str]:
    if found.keys() & {"chosen", "rejected"}:
        return
    if "label" not in found:
        yield _no_judgement(found, facts)
        return
    column = next((c for c in facts if c.path == found["label"]), None)
    if column is None:
        return
    if guess is None:
        yield (
            f"`{column.path}` holds no judgement that could be read (such as {column.example}): "
            "name another column, or write true and false."
        )
    elif guess.without_scale:
        yield _unknown_scale(column)
    elif guess.unknown:
        words = ", ".join(map(quote, guess.unknown))
        yield (
            f"It is unknown which of the values of `{column.path}` are good: {words}. Put each "
            "into `labels.good`, `labels.bad` or `labels.neither`."
        )


def _unknown_scale(column: ColumnFacts) -> str:
    if any(isinstance(cell, str) for cell in column.cells) and "%" in column.example:
        return (
            f"The ratings in `{column.path}` are texts such as {column.example}: write them as "
            "numbers, and choose `labels.at_least` and `labels.at_most`."
        )
    return (
        f"`{column.path}` holds numbers {column.describe_numbers()}: choose from which on an "
        "answer is good (`labels.at_least`) and up to which it is bad (`labels.at_most`)."
    )


def _no_judgement(found: Found, facts: list[ColumnFacts]) -> str:
    candidates = [c for c in facts if _may_judge(c, set(found.values()))]
    if candidates:
        shown = "; ".join(
            f"`{c.path}`: {', '.join(list(c.values or ())[:5])}" for c in candidates[:3]
        )
        return (
            "No column says by its name or its values which answers are good. If one of these does "
            f"({shown}), name it with `columns.label`."
        )
    words = {word for column in facts for word in parts_of(column.path)[0]}
    prompt = next((c for c in facts if c.path == found.get("prompt")), None)
    if prompt is not None and len(prompt.cells) > 1:
        texts = [quote(cell) for cell in prompt.cells]
        if len(set(texts)) <= len(texts) / 2:
            return (
                "Nothing says which answers are good, although prompts have several: add a column "
                "with a judgement, such as `label`: true or false."
            )
    if words & LOG_WORDS:
        return (
            "This seems to be a log without feedback: no column judges the answers. Export it with "
            "its feedback (ratings, thumbs, scores), or have the answers judged."
        )
    return (
        "Nothing says which answers are good, and each prompt has one: have the answers judged "
        "(`label`: true or false). For answers that are all good, train with SFT instead."
    )


def _may_judge(column: ColumnFacts, used: set[str]) -> bool:
    """Whether a column has few different values, which nothing explains otherwise."""
    values = column.values
    free = column.path not in used and name_score(column.path, "label") >= 0
    texts = any(value.count(" ") > 1 for value in values or ())
    return free and values is not None and len(values) > 1 and not texts


def notes_of(found: Found, facts: list[ColumnFacts]) -> list[str]:
    """What else there is to know of a mapping: texts that would not be read, a weight to use."""
    used = set(found.values())
    notes = []
    if found.keys() & {"prompt"} and found.keys() & {"completion", "chosen"}:
        for column in facts:
            own = "".join(parts_of(column.path)[0])
            is_text = bool(column.texts) or any(map(messages_of, column.cells))
            if own in CONTEXT and column.path not in used and is_text:
                notes.append(
                    f"`{column.path}` is not read: if the answers need it, write it into "
                    f"`{found['prompt']}`."
                )
    label, messages = found.get("label", ""), found.get("messages")
    if ALL in label.split(".") and not label.startswith(f"{messages}."):
        notes.append(
            "Some rows have several judgements, and each becomes a record: `repeated majority` "
            "joins them to one, `repeated drop_disagreeing` keeps those that agree."
        )
    confidence = next((c for c in facts if parts_of(c.path)[0][-1:] == ["confidence"]), None)
    if confidence is not None and "weight" not in found and "number" in confidence.kind:
        notes.append(
            f"`{confidence.path}` can weight the records: `columns.weight {confidence.path}`."
        )
    return notes


def _shown(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (", …" if len(names) > 3 else "")
