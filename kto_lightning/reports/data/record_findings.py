"""Findings of the data report on its records: unusable, uncertain, cut, contradictory, empty."""

from collections.abc import Iterator
from pathlib import Path

from kto_lightning.reports.data.fields import DataReport, Places
from kto_lightning.reports.finding import Finding


def about_records(report: DataReport) -> Iterator[Finding]:
    """The findings on the records themselves."""
    bad, repeats = report.bad_records, report.repeats
    if not report.examples:
        yield Finding(
            grade="problem",
            what="There is no usable record",
            meaning="KTO takes a prompt, a completion and a label from each",
            action=_action_for_unusable(report),
        )
    elif bad.count:
        yield Finding(
            grade="problem",
            what=f"{bad.count:,} {_are(bad, 'record cannot', 'records cannot')} be used and would "
            "stop `fit` before its first step",
            meaning="KTO takes a prompt, a completion and a label from each",
            action="fix or drop the records named below"
            if report.guide is None
            else "give the options shown below, or fix or drop these records",
        )
    yield from uncertain_records(report)
    chat = _chat_finding(report)
    if chat is not None:
        yield chat
    contradictory, empty = repeats.contradictory_labels, report.empty_completions
    if contradictory.count:
        yield Finding(
            grade="warning",
            what=f"{contradictory.count:,} "
            f"{_are(contradictory, 'completion carries', 'completions carry')} both labels for the "
            "same prompt",
            meaning="their gradients in KTO's loss oppose each other and cancel out",
            action=f"keep one of the two ({_shown(contradictory)})",
        )
    if repeats.exact_duplicates.count:
        duplicates = repeats.exact_duplicates
        yield Finding(
            grade="note",
            what=f"{duplicates.count:,} "
            f"{_are(duplicates, 'record repeats', 'records repeat')} an earlier one word for word",
            meaning="each counts the same label again, and a training record among the held-out "
            "records makes held-out metrics too good",
            action=f"drop those that are unintended ({_shown(duplicates)})",
        )
    if empty.count:
        yield Finding(
            grade="warning",
            what=f"{empty.count:,} {_are(empty, 'completion is', 'completions are')} empty",
            meaning="only their end-of-text token is learnt: a desirable one teaches the model to "
            "answer nothing",
            action=f"drop or complete them ({_shown(empty)})",
        )


def _action_for_unusable(report: DataReport) -> str:
    guide = report.guide
    if guide is None:
        return "fix the records named below, or give another file"
    if guide.missing:
        return "see below what is missing"
    return "name its columns as shown below" if guide.flags else "fix the records named below"


def _chat_finding(report: DataReport) -> Finding | None:
    if not report.chat_advised:
        return None
    return Finding(
        grade="note",
        what="Prompts and completions are plain text, and the tokenizer has a chat template",
        meaning="a chat model meets its questions and answers in the template's form only",
        action="give `--data.chat true` if they are questions and answers; leave it out for texts "
        "to continue",
    )


def uncertain_records(report: DataReport) -> Iterator[Finding]:
    """The findings on records of which something else may be meant; `fit` repeats them."""
    found = (
        _guessed_prompts_finding(report),
        _messages_left_finding(report),
        _cut_answers_finding(report),
    )
    yield from (finding for finding in found if finding is not None)


def _guessed_prompts_finding(report: DataReport) -> Finding | None:
    guessed = report.guessed_prompts
    if guessed is None or not guessed.count:
        return None
    return Finding(
        grade="warning",
        what=f"{guessed.count:,} {_are(guessed, 'pair has', 'pairs have')} no prompt of "
        "their own: what both answers begin with was taken, up to a whole word",
        meaning="the completion may begin inside an answer or inside the question",
        action=f"give these pairs a column `prompt` ({_shown(guessed)})",
    )


def _messages_left_finding(report: DataReport) -> Finding | None:
    left = report.messages_left
    if left is None or not left.count:
        return None
    return Finding(
        grade="note",
        what=f"{left.count:,} {_are(left, 'conversation goes', 'conversations go')} on after the "
        "assistant's last turn",
        meaning="the label is taken for that turn, and what follows it is not used",
        action=f"remove these messages if the label is meant for another turn ({_shown(left)})",
    )


def _cut_answers_finding(report: DataReport) -> Finding | None:
    cut = report.cut_answers
    if cut is None:
        return None
    answers = cut.answers
    return Finding(
        grade="warning",
        what=f"{answers.count:,} {_are(answers, 'answer is', 'answers are')} cut at "
        f"{cut.characters:,} characters by the export, which ends them with {cut.mark}",
        meaning="the model would learn to break off there",
        action="take the whole answers from the tool's message log or API, or drop these records "
        f"({_shown(answers)})",
    )


def _are(places: Places, one: str, several: str) -> str:
    return one if places.count == 1 else several


def _shown(places: Places) -> str:
    """The first two places, without directories."""
    names = [Path(place).name for place in places.first]
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
