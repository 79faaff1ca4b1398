"""`propose`: the most plausible mapping of a file, as options for the command line.

Nothing is trained by a guess: `inspect` and errors show it to be copied.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kto_lightning.data.columns import (
    MAX_PATH_DEPTH,
    NATIVE_NAMES,
    TEXT_FIELDS,
    aliases_beside,
    filled_keys,
)
from kto_lightning.data.labels import Labels
from kto_lightning.data.proposal.facts import ALL, ColumnFacts, columns_of, messages_of, number_of
from kto_lightning.data.proposal.labels import LabelGuess, guess_labels
from kto_lightning.data.proposal.mapping import Proposal, proposal_of
from kto_lightning.data.proposal.missing import missing_sentences, notes_of, unmappable
from kto_lightning.data.proposal.names import name_score
from kto_lightning.data.proposal.polarity import names_something_bad, turned
from kto_lightning.data.proposal.texts import Found, best_named, find_texts, is_free
from kto_lightning.data.proposal.turns import find_conversation, has_unjudged, inside_answers
from kto_lightning.data.record_settings import RecordSettings

ROLES = ("prompt", "completion", "messages", "chosen", "rejected", "system", "label", "weight")
BY_VALUES = 4.0
"""From this score on, values alone say that a column judges."""
NAMED = 1.5
WELL_NAMED = 2.0
TEMPLATE_MARK = re.compile(r"<\|\w+\|>|<start_of_turn>|\[INST\]|\n\n(?:Human|Assistant):")
MAX_SEARCHED = 2000
SYSTEM = {"system": ("system_prompt",)}
"""Further names that are read as a field without a mapping."""


def propose(
    rows: Sequence[object],
    settings: RecordSettings | None = None,
    *,
    chat_template: bool = False,
    labels_needed: bool = True,
) -> Proposal:
    """The most plausible mapping of a file, by names and values of its columns.

    Args:
        rows: the first rows, as JSON values; a few hundred are enough.
        settings: what is said of the file already; it is kept.
        chat_template: whether the records are for a tokenizer with a chat template.
        labels_needed: whether records without a judgement are of no use.
    """
    settings = settings or RecordSettings()
    given = {} if settings.columns is None else settings.columns.given()
    seen = columns_of(rows)
    facts = [c for c in seen if c.path and c.path.count(".") < MAX_PATH_DEPTH]
    aliased = _aliased(rows, given)
    found = _find_texts({**aliased, **given}, facts)
    guess = None
    if not found.keys() & {"chosen", "rejected"}:
        label, guess = _find_label(facts, found, settings.labels)
        if label is None and "messages" in found:
            label, guess = _find_turn_label(rows, found, settings.labels)
        found |= {"label": label} if label else {}
    start = proposal_of(settings)
    why_not = unmappable(found, facts)
    if why_not is not None:
        return replace(start, missing=[why_not], facts=seen)
    found = _find_others(facts, found)
    columns = {role: found[role] for role in (*ROLES, *found) if role in found}
    if "label" in found and not {"label"} & {*given, *aliased}:
        # A list of judgements is one judgement each.
        whole = found["label"].removesuffix(".0").removesuffix(f".{ALL}")
        is_key = any(isinstance(row, dict) and found["label"] in row for row in rows)
        columns["label"] = found["label"] if is_key or not whole else whole
    proposal = Proposal(
        columns=columns,
        built_in=frozenset(role for role in columns if _is_built_in(role, columns, aliased)),
        labels=dict(start.labels),
        skip_unlabeled=start.skip_unlabeled,
        chat=start.chat or ((chat_template or "system" in found) and _is_plain(facts, found)),
        others=start.others,
        missing=missing_sentences(found, facts, guess, labels_needed=labels_needed),
        notes=notes_of(found, facts) if settings.repeated == "keep" else [],
        facts=seen,
    )
    if proposal.missing and not found.keys() & {"completion", "messages", "chosen"}:
        proposal.columns = start.columns  # without answers, no other column is worth naming
        return proposal
    if guess is not None:
        column = _column(facts, found["label"])
        proposal.skip_unlabeled |= (
            has_unjudged(rows, found)
            if column is None
            else guess.blank or column.filled < len(rows)
        )
        for name, value in guess.settings().items():
            more = proposal.labels.get(name)
            more = [] if more is None else more if isinstance(more, list) else [more]
            proposal.labels[name] = [*more, *value] if isinstance(value, list) else value
    proposal.says_more = not set(proposal.flags()) <= set(start.flags())
    return proposal


def _aliased(rows: Sequence[object], given: Mapping[str, str]) -> dict[str, str]:
    """The columns that are read by their names in another tool."""
    return {
        role: path if isinstance(path, str) else str(path.__doc__).partition(",")[0]
        for alias in aliases_beside(given, filled_keys(rows))
        for role, path in alias.fields.items()
    }


def _is_built_in(role: str, columns: Mapping[str, str], aliased: Mapping[str, str]) -> bool:
    path = columns[role]
    names = NATIVE_NAMES.get(role, (role,))
    return aliased.get(role) == path or path.strip().casefold() in (*names, *SYSTEM.get(role, ()))


def _column(facts: list[ColumnFacts], path: str | None) -> ColumnFacts | None:
    return next((column for column in facts if column.path == path), None)


def _find_label(
    facts: list[ColumnFacts], found: Found, labels: Labels | None, *, by_name: bool = False
) -> tuple[str | None, LabelGuess | None]:
    """The column that judges, and what its values mean that `labels` does not say.

    With `by_name`, its name must say so.
    """
    if "label" in found:
        path = found["label"]
        inside = (_column(facts, f"{path}{end}") for end in ("", f".{ALL}", ".0"))
        column = next((column for column in inside if column is not None), None)
        if column is None:
            return path, None
        return path, _guess(column, labels) or guess_labels(column.cells, labels)
    guesses = [
        (name_score(column.path, "label"), column, guess)
        for column in facts
        if column.cells and is_free(column.path, found)
        if (guess := _guess(column, labels)) is not None
    ]
    sure = [
        (name + guess.score, column, guess)
        for name, column, guess in guesses
        if ((name >= NAMED and guess.score >= 1) or name >= WELL_NAMED or guess.score >= BY_VALUES)
        if name + guess.score >= WELL_NAMED and (name >= NAMED or not by_name)
    ]
    if sure:
        # Where all values judge alike, they may say what was asked, and another column the answer.
        sure = [item for item in sure if item[2].both and item[2].score >= 3] or sure
        best = max(score for score, _, _ in sure)
        _, column, guess = next(item for item in sure if item[0] == best)
        column, guess = _all_judges(facts, column, guess)
        return column.path, guess
    # Two values that mean something, in the only column of that kind.
    weak = [(c, guess) for name, c, guess in guesses if name >= 0 and guess.score >= 3]
    return (weak[0][0].path, weak[0][1]) if len(weak) == 1 and not by_name else (None, None)


def _guess(column: ColumnFacts, labels: Labels | None) -> LabelGuess | None:
    """What the values of a column judge, by its name too, as far as `labels` does not say it."""
    guess = guess_labels(column.cells, labels)
    if guess is None or labels is not None or not names_something_bad(column.path):
        return guess
    return turned(guess, column.cells)


def _all_judges(
    facts: list[ColumnFacts], first: ColumnFacts, guess: LabelGuess
) -> tuple[ColumnFacts, LabelGuess]:
    """The judgements of all elements of a list for those of its first, if they are of one kind."""
    same = [
        (column, other)
        for column in facts
        if ALL in column.path.split(".") and column.path.replace(f".{ALL}", ".0") == first.path
        if (other := guess_labels(column.cells)) is not None
        if other.score >= guess.score and not other.unknown and not other.without_scale
    ]
    return max(same, key=lambda item: len(item[0].cells)) if same else (first, guess)


def _find_texts(found: Found, facts: list[ColumnFacts]) -> Found:
    """The columns of prompt and completion, of a pair, or of a conversation of any form."""
    other = find_conversation(facts)
    is_used = bool(other) and not is_free(other["messages"], found)
    if not other or is_used or found.keys() & TEXT_FIELDS:
        return find_texts(found, facts)
    outside = [c for c in facts if not c.path.startswith(f"{other['messages']}.")]
    texts = find_texts(found, outside)
    return texts if texts.keys() & {"completion", "chosen", "messages"} else {**other, **found}


def _find_turn_label(
    rows: Sequence[object], found: Found, labels: Labels | None
) -> tuple[str | None, LabelGuess | None]:
    """The judgement inside the answers of a conversation."""
    label, guess = _find_label(inside_answers(rows, found), {}, labels, by_name=True)
    return (None, None) if label is None else (f"{found['messages']}.{ALL}.{label}", guess)


def _find_others(facts: list[ColumnFacts], found: Found) -> Found:
    """The columns found before, and those of system prompt and weight."""
    found = dict(found)
    if found.keys() & {"prompt", "completion", "messages", "chosen"}:
        texts = [column for column in facts if column.texts]
        system = best_named(texts, "system", found)
        found |= {"system": system} if system else {}
    if "weight" not in found:
        for column in facts:
            numbers = [number_of(cell) for cell in column.cells]
            positive = bool(numbers) and all(n is not None and n > 0 for n in numbers)
            named = name_score(column.path, "weight") >= WELL_NAMED
            if positive and named and is_free(column.path, found):
                found["weight"] = column.path
                break
    return found


def _is_plain(facts: list[ColumnFacts], found: Found) -> bool:
    """Whether prompt and answers are plain text that no chat template has rendered."""
    roles = [role for role in ("prompt", "completion", "chosen", "rejected") if role in found]
    columns = [_column(facts, found[role]) for role in roles]
    cells = [cell for column in columns if column for cell in column.cells]
    if "prompt" not in roles or len(roles) < 2 or not cells:
        return False
    answers = _column(facts, found[roles[-1]])
    if answers and sum(text[0].isspace() for text in answers.texts) >= 0.5 * len(answers.cells):
        return False  # they continue the prompt's sentence
    return not any(
        messages_of(cell) or not isinstance(cell, str) or is_rendered(cell) for cell in cells
    )


def is_rendered(text: str) -> bool:
    """Whether a text seems to have the marks of a chat template."""
    return TEMPLATE_MARK.search(text, 0, MAX_SEARCHED) is not None
