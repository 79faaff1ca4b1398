"""Proposals: the mapping that names and values of columns suggest, and what no mapping gives."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import load_records, read_records
from kto_lightning.data.labels import Labels
from kto_lightning.data.proposal import Proposal, columns_of, name_options, propose
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources import expand
from kto_lightning.errors import DataError
from kto_lightning.reports.data.facts import visible_text
from tests.data.rows import jsonl

QUESTIONS = (
    "What is the capital of France?",
    "Name the capital of Italy.",
    "What is 2 + 2?",
    "Who wrote Faust?",
    "Explain photosynthesis briefly.",
    "How do I boil an egg?",
)
ANSWERS = (
    *("Paris.", "Ask someone else.", "4", "I cannot say.", "Plants turn light into sugar."),
    "Put it in hot water for eight minutes.",
)
TEXTS = tuple(zip(QUESTIONS, ANSWERS, strict=True))
Make = Callable[[str, str, Any], dict[str, Any]]


def rows(make: Make, *judgements: object) -> list[Any]:
    """Six rows of question and answer, with the judgements in turn."""
    judgements = judgements or (None,)
    return [
        make(question, answer, judgements[index % len(judgements)])
        for index, (question, answer) in enumerate(TEXTS)
    ]


def given(**columns: str) -> RecordSettings:
    return RecordSettings(columns=Columns(**columns))


def as_settings(proposal: Proposal) -> RecordSettings:
    mapped = {k: v for k, v in proposal.columns.items() if k not in proposal.built_in}
    labels: Any = {
        name: float(value) if isinstance(value, int) else value
        for name, value in proposal.labels.items()
    }
    return RecordSettings(
        columns=Columns(**mapped),
        labels=Labels(**labels),
        unlabeled="skip" if proposal.skip_unlabeled else "error",
        chat=proposal.chat,
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def options(proposal: Proposal) -> dict[str, object]:
    """The proposed options, read as a shell and YAML read them."""
    split = [shlex.split(flag) for flag in proposal.flags("")]
    assert all(len(parts) == 2 for parts in split)
    return {name.removeprefix("--"): yaml.safe_load(value) for name, value in split}


ARGILLA = rows(
    lambda q, a, judgement: {
        "id": "0",
        "fields": {"prompt": q, "response": a},
        "metadata": {},
        "suggestions": {},
        "responses": {"quality": [{"value": judgement, "user_id": "u1"}]},
        "vectors": {},
        "_server_id": None,
    },
    "good",
    "bad",
)
ARGILLA_FLAT = rows(
    lambda q, a, rating: {
        "id": "0",
        "status": "completed",
        "prompt": q,
        "response": a,
        "rating.responses": [rating],
        "rating.responses.users": ["u1"],
        "rating.responses.status": ["submitted"],
    },
    5,
    1,
)
LABEL_STUDIO = rows(
    lambda q, a, choice: {
        "id": 1,
        "data": {"prompt": q, "response": a},
        "annotations": [
            {
                "completed_by": 1,
                "result": [{"from_name": "q", "type": "choices", "value": {"choices": [choice]}}],
                "was_cancelled": False,
                "ground_truth": False,
                "lead_time": 3.2,
            }
        ],
        "predictions": [],
    },
    "Good",
    "Bad",
)
LANGFUSE = rows(
    lambda q, a, score: {
        "id": "t0",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "environment": "default",
        "tags": [],
        "bookmarked": False,
        "public": False,
        "input": {"messages": [user(q)]},
        "output": assistant(a),
        "user-feedback": [score],
    },
    1,
    0,
)
DIFY = rows(
    lambda q, a, thumb: {
        "feedback_id": "f0",
        "conversation_id": "c",
        "user_query": q,
        "ai_response": a,
        "feedback_rating": thumb,
        "feedback_comment": "",
        "feedback_source": "user",
        "feedback_date": "2026-01-01 00:00:00",
        "has_comment": "No",
    },
    "👍",
    "👎",
)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (
            ARGILLA,
            {
                "columns.prompt": "fields.prompt",
                "columns.completion": "fields.response",
                "columns.label": "responses.quality.0.value",
            },
        ),
        (
            ARGILLA_FLAT,
            {
                "columns.completion": "response",
                "columns.label": "rating.responses",
                "labels.at_least": 4,
                "labels.at_most": 2,
            },
        ),
        (
            LABEL_STUDIO,
            {
                "columns.prompt": "data.prompt",
                "columns.completion": "data.response",
                "columns.label": "annotations.0.result.0.value.choices",
            },
        ),
        (
            LANGFUSE,
            {
                "columns.prompt": "input.messages",
                "columns.completion": "output.content",
                "columns.label": "user-feedback",
            },
        ),
        (
            DIFY,
            {
                "columns.prompt": "user_query",
                "columns.completion": "ai_response",
                "columns.label": "feedback_rating",
            },
        ),
        (
            rows(lambda q, a, j: {"Question": q, "Answer": a, "flag": j}, "Good", "Bad"),
            {
                "columns.prompt": "Question",
                "columns.completion": "Answer",
                "columns.label": "flag",
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "prompt_id": 0,
                    "prompt": [user(q)],
                    "output": [assistant(a)],
                    "label": j,
                    "reward": 2.0 * j - 1,
                    "type": "binary_feedback",
                },
                1,
                0,
            ),
            {"columns.completion": "output"},
        ),
        (
            rows(
                lambda q, a, j: {"instruction": q, "input": "", "output": a, "kto_tag": j},
                True,
                False,
            ),
            {},
        ),
        (
            rows(
                lambda q, a, j: {
                    "messages": [user(q), assistant(a)],
                    "rejected_response": f"no {a}",
                }
            ),
            {},
        ),
        (
            rows(lambda q, a, j: {"system": "", "question": q, "chosen": a, "rejected": f"no {a}"}),
            {"columns.prompt": "question"},
        ),
        (
            rows(
                lambda q, a, j: {
                    "input": {"messages": [user(q)], "tools": []},
                    "preferred_output": [assistant(a)],
                    "non_preferred_output": [assistant("no")],
                }
            ),
            {},
        ),
        (
            rows(
                lambda q, a, j: {"user_input": q, "bot_reply": a, "thumbs": j}, "up", "down", None
            ),
            {
                "columns.prompt": "user_input",
                "columns.completion": "bot_reply",
                "columns.label": "thumbs",
                "unlabeled": "skip",
            },
        ),
        (
            rows(
                lambda q, a, j: {"id": 3, "dialogue": [user(q), assistant(a)], "verdict": j},
                "accept",
                "reject",
                "not sure: neutral",
            ),
            {
                "columns.messages": "dialogue",
                "columns.label": "verdict",
                "labels.good": ["accept"],
                "labels.bad": ["reject"],
                "labels.neither": ["not sure: neutral"],
            },
        ),
        (
            rows(
                lambda q, a, j: {"log": json.dumps({"data": {"input": q, "output": a, "ok": j}})},
                1,
                0,
            ),
            {
                "columns.prompt": "log.data.input",
                "columns.completion": "log.data.output",
                "columns.label": "log.data.ok",
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "request": {"model": "m", "messages": [user(q)]},
                    "response": {"choices": [{"message": assistant(a)}]},
                    "feedback": {"rating": j},
                },
                True,
                False,
            ),
            {
                "columns.prompt": "request.messages",
                "columns.completion": "response.choices.0.message.content",
                "columns.label": "feedback.rating",
            },
        ),
        (
            rows(lambda q, a, j: {"userQuestion": q, "modelAnswer": a, "userRating": j}, 5, 1),
            {
                "columns.prompt": "userQuestion",
                "columns.completion": "modelAnswer",
                "columns.label": "userRating",
                "labels.at_least": 4,
                "labels.at_most": 2,
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "topic": "this and that",
                    "log": {
                        "chat": [
                            {"speaker": "Customer", "says": {"text": q}},
                            {"speaker": "bot", "says": {"text": a}, "stars": j},
                        ]
                    },
                },
                5,
                1,
                None,
            ),
            {
                "columns.messages": "log.chat",
                "columns.role": "speaker",
                "columns.content": "says.text",
                "columns.label": "log.chat.*.stars",
                "labels.at_least": 4,
                "labels.at_most": 2,
                "unlabeled": "skip",
            },
        ),
        (
            rows(
                lambda q, a, j: {"messages": [user(q), assistant(a) | {"feedback": j}]},
                "up",
                "down",
            ),
            {"columns.label": "messages.*.feedback"},
        ),
        (
            rows(
                lambda q, a, j: {
                    "request": json.dumps({"model": "m", "messages": [user(q)]}),
                    "response": json.dumps({"choices": [{"message": assistant(a)}]}),
                    "feedback": f"[{j}]",
                },
                1,
                0,
            ),
            {
                "columns.prompt": "request.messages",
                "columns.completion": "response.choices.0.message.content",
                "columns.label": "feedback",
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "inputs": {"subject": "a word " + q[:9]},
                    "messages": [user(q)],
                    "output": a,
                    "rating": j,
                },
                "good",
                "bad",
            ),
            {
                "columns.prompt": "messages",
                "columns.completion": "output",
                "columns.label": "rating",
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "input": q,
                    "chosen": a,
                    "rejected": a.upper(),
                    "labelling_prompt": [user(f"Which answer to {q} is better?")],
                }
            ),
            {"columns.prompt": "input"},
        ),
        (
            rows(
                lambda q, a, j: {"prompt": q, "text": a, "label": "HELPFUL", "answer": j},
                "accept",
                "reject",
            ),
            {
                "columns.completion": "text",
                "columns.label": "answer",
                "labels.good": ["accept"],
                "labels.bad": ["reject"],
            },
        ),
        (
            rows(
                lambda q, a, j: {
                    "prompt": q,
                    "response": a,
                    "options": [{"id": "good", "text": "Good"}, {"id": "bad", "text": "Bad"}],
                    "accept": [j],
                },
                "good",
                "bad",
            ),
            {"columns.completion": "response", "columns.label": "accept"},
        ),
        (
            rows(
                lambda q, a, j: {
                    "prompt": q,
                    "response": a,
                    "judge_response": f"It is {'good' if j > 5 else 'bad'} because of: {a}",
                    "judge_score": j,
                },
                9,
                2,
            ),
            {
                "columns.completion": "response",
                "columns.label": "judge_score",
                "labels.at_least": 8,
                "labels.at_most": 3,
            },
        ),
        (
            rows(
                lambda q, a, j: {"What was asked?": q, "The answer?": a, "How do you rate it?": j},
                5,
                1,
            ),
            {
                "columns.prompt": "What was asked?",
                "columns.completion": "The answer?",
                "columns.label": "How do you rate it?",
                "labels.at_least": 4,
                "labels.at_most": 2,
            },
        ),
        (
            rows(lambda q, a, j: {"x": q, "y": a, "z": j}, True, False),
            {"columns.prompt": "x", "columns.completion": "y", "columns.label": "z"},
        ),
    ],
)
def test_the_mapping_that_is_proposed(
    tmp_path: Path, records: list[object], expected: dict[str, object]
) -> None:
    proposal = propose(records)
    assert options(proposal) == expected
    assert not proposal.notes
    assert not proposal.missing
    assert len(set(proposal.columns.values())) == len(proposal.columns)
    read = list(read_records(jsonl(tmp_path / "data.jsonl", *records), as_settings(proposal)))
    assert not any(isinstance(item, BadRecord) for item in read)
    kept = [item for item in read if isinstance(item, Record)]
    assert len(kept) >= 2
    for record in kept:
        place = record.line - 1
        assert visible_text(record.prompt) == QUESTIONS[place]
        good = visible_text(record.completion) == ANSWERS[place]
        assert good or (record.desirable is False and "rejected" in proposal.columns)
    assert {record.desirable for record in kept} == {True, False}


@pytest.mark.parametrize(
    ("judgements", "path", "settings"),
    [
        ([{"value": "good"}], "judged.0.value", {}),
        ([{"value": "good"}, {"value": "bad"}], "judged.*.value", {}),
        ([{"value": 4}, {"value": 2}], "judged.*.value", {"at_least": 4, "at_most": 2}),
        ([{"value": "good"}, {"value": "written in French"}], "judged.0.value", {}),
        ([5, 1], "judged", {"at_least": 4, "at_most": 2}),
    ],
)
def test_several_judgements_of_one_answer(
    judgements: list[object], path: str, settings: dict[str, object]
) -> None:
    records = rows(lambda q, a, j: {"question": q, "answer": a, "feedback": judgements})
    records[0]["feedback"] = judgements[:1]
    proposal = propose(records, given(prompt="question"))
    assert proposal.columns["label"].replace("feedback", "judged") == path
    assert proposal.labels == settings
    joins = [note for note in proposal.notes if "`repeated majority` joins them" in note]
    assert len(joins) == (len(judgements) > 1 and path != "judged.0.value")


@pytest.mark.parametrize(
    ("name", "values", "settings"),
    [
        ("toxic", [1, 0], {"labels.good": [0], "labels.bad": [1]}),
        ("is_error", ["1", "0"], {"labels.good": [0], "labels.bad": [1]}),
        ("downvoted", [1, -1], {"labels.good": [-1], "labels.bad": [1]}),
        ("isHallucination", [True, False], {"labels.good": [False], "labels.bad": [True]}),
        ("eval.incorrect", ["Yes", "No"], {"labels.good": [False], "labels.bad": [True]}),
        ("unsafe", ["good", "bad"], {}),
        ("not_harmful", [True, False], {}),
    ],
)
def test_more_of_something_bad_is_worse(
    tmp_path: Path, name: str, values: list[object], settings: dict[str, object]
) -> None:
    records = rows(lambda q, a, j: {"prompt": q, "response": a, name: j}, *values)
    proposal = propose(records)
    columns = {"columns.completion": "response", "columns.label": name}
    assert options(proposal) == columns | settings
    source = jsonl(tmp_path / "data.jsonl", *records)
    read = [
        item.desirable
        for item in read_records(source, as_settings(proposal))
        if isinstance(item, Record)
    ]
    assert read == [not settings, bool(settings)] * 3


def test_true_for_something_bad_is_noted(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "A", "is_toxic": True})
    reader = RecordReader(expand(source), given(label="is_toxic"))
    assert "true in is_toxic is read as good" in reader.notes[-1]
    labels = Labels(good=[False, 0], bad=[True, 1])
    settings = RecordSettings(columns=Columns(label="is_toxic"), labels=labels)
    assert not any(
        "is read as good" in note for note in RecordReader(expand(source), settings).notes
    )


def test_ratings_of_something_bad_are_not_turned() -> None:
    records = rows(lambda q, a, j: {"prompt": q, "response": a, "toxicity": j}, 0.9, 0.1, 0.5)
    proposal = propose(records)
    assert "label" not in proposal.columns
    assert proposal.missing
    given_path = propose(records, given(label="toxicity"))
    assert given_path.columns["label"] == "toxicity"


def test_values_count_more_than_names() -> None:
    records = [
        {
            "prompt": f"p-00{index}",
            "response": 0.3 * index,
            "text": question,
            "answer": answer,
            "label": ("math", "geography")[index % 2],
            "rating": (5, 1, 3)[index % 3],
        }
        for index, (question, answer) in enumerate(TEXTS)
    ]
    found = propose(records).columns
    assert found == {"prompt": "text", "completion": "answer", "label": "rating"}


@pytest.mark.parametrize(
    ("values", "at_least", "at_most"),
    [
        ((1, 5, 3), 4, 2),
        ((3, 4, 5), 4, 2),
        (("1", "5"), 4, 2),
        ((1, 2, 3), 3, 1),
        ((0, 4, 2), 3, 1),
        ((1, 7), 6, 2),
        ((0, 10, 7), 7, 3),
        ((2, 9), 8, 3),
        ((85, 20, 50), 70, 30),
        ((0.1, 0.95, 0.5), 0.7, 0.3),
        ((1, 0, -1), 1, -1),
    ],
)
def test_thresholds_of_usual_scales(
    values: tuple[object, ...], at_least: int | float, at_most: int | float
) -> None:
    records = rows(lambda q, a, j: {"question": q, "answer": a, "score": j}, *values)
    proposal = propose(records)
    assert proposal.labels == {"at_least": at_least, "at_most": at_most}
    assert not proposal.missing


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("yes", "no"), {}),
        ((1, 0), {}),
        ((1, -1), {}),
        (("thumbsUp", "thumbsDown"), {}),
        (("Y", "N"), {"good": ["Y"], "bad": ["N"]}),
        (("correct", "incorrect"), {"good": ["correct"], "bad": ["incorrect"]}),
        (("Helpful", "Not helpful"), {"good": ["Helpful"], "bad": ["Not helpful"]}),
        (
            ("It helps: good", "It isn't good"),
            {"good": ["It helps: good"], "bad": ["It isn't good"]},
        ),
        (("❤️", "😡"), {"good": ["❤️"], "bad": ["😡"]}),
        (
            ("excellent", "ok", "poor"),
            {"good": ["excellent"], "bad": ["poor"], "neither": ["ok"]},
        ),
        (("ok", "wrong"), {"good": ["ok"], "bad": ["wrong"]}),
        (
            ("★★★★★", "★", "★★★"),
            {"good": ["★★★★★"], "bad": ["★"], "neither": ["★★★"]},
        ),
        (("5 stars", "1 star"), {"good": ["5 stars"], "bad": ["1 star"]}),
        (("it's fine: accepted", "no"), {"good": ["it's fine: accepted"], "bad": ["no"]}),
    ],
)
def test_words_of_a_label(values: tuple[object, ...], expected: dict[str, object]) -> None:
    records = rows(lambda q, a, j: {"question": q, "answer": a, "feedback": j}, *values)
    proposal = propose(records)
    assert proposal.columns["label"] == "feedback"
    assert proposal.labels == expected
    assert {
        key.removeprefix("labels."): value
        for key, value in options(proposal).items()
        if key.startswith("labels.")
    } == expected


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            rows(lambda q, a, j: {"question": q, "answer": a, "quality": j}, "blue", "red", "blue"),
            'It is unknown which of the values of `quality` are good: "blue", "red".',
        ),
        (
            rows(lambda q, a, j: {"question": q, "answer": a, "reward": j}, -12.5, 700.0, 3.0),
            "`reward` holds numbers from -12.5 to 700, median 3: choose from which on",
        ),
        (
            rows(lambda q, a, j: {"question": q, "answer": a, "score": j}, "80%", "20%"),
            'The ratings in `score` are texts such as "80%": write them as numbers',
        ),
        (
            rows(lambda q, a, j: {"question": q, "answer": a, "preference": j}, 1, 2),
            "`preference` holds numbers from 1 to 2, median 1.5: choose from which on",
        ),
        (
            rows(lambda q, a, j: {"question": q, "rating": j}, 1, 5),
            "There is no answer to `question` in the file",
        ),
        (
            rows(lambda q, a, j: {"answer": a, "rating": j}, 1, 5),
            "There is no prompt for `answer` in the file",
        ),
        (
            rows(lambda q, a, j: {"question": q, "answer": a}),
            "Nothing says which answers are good, and each prompt has one",
        ),
        (
            [{"question": q, "answer": a} for q in QUESTIONS for a in ANSWERS],
            "Nothing says which answers are good, although prompts have several",
        ),
        (
            rows(lambda q, a, j: {"question": q, "answer": a, "eval": j}, "x", "y", "x"),
            'If one of these does (`eval`: "x", "y"), name it with `columns.label`.',
        ),
        (
            rows(lambda q, a, j: {"timestamp": "t", "user_message": q, "assistant_message": a}),
            "This seems to be a log without feedback",
        ),
        (
            rows(lambda q, a, j: {"traceId": "t0", "name": "user-feedback", "value": j}, 1, 0),
            "export the traces instead",
        ),
        (
            rows(lambda q, a, j: {"run_id": "r0", "key": "user_score", "score": j}, 1, 0),
            "as LangSmith exports them: join them with the exported runs or spans by `run_id`",
        ),
        (
            rows(
                lambda q, a, j: {"span_id": "s0", "label": j, "annotator_kind": "HUMAN"}, "a", "b"
            ),
            "as Phoenix exports them",
        ),
        (
            rows(lambda q, a, j: {"message_id": "m", "parent_id": "n", "text": q, "role": "user"}),
            "The messages form a tree (`parent_id` names the one before)",
        ),
        (
            rows(
                lambda q, a, j: {"prompt": q, "response_a": a, "response_b": q, "winner": j},
                "a",
                "b",
            ),
            "`response_a` and `response_b` are two answers to one prompt",
        ),
        (
            rows(
                lambda q, a, j: {"x": q, "output_1": a, "output_2": f"no {a}", "preference": j},
                1,
                2,
            ),
            "`output_1` and `output_2` are two answers to one prompt",
        ),
        (
            rows(
                lambda q, a, j: {
                    "instruction": q,
                    "completions": [{"response": a, "score": j}, {"response": q, "score": 1}],
                },
                5,
                1,
            ),
            "A row has several answers to its prompt (`completions.*.response`)",
        ),
        (
            rows(
                lambda q, a, j: {
                    "chat": [{"speaker": "Ann", "text": q}, {"speaker": "Bob", "text": a}],
                    "rating": j,
                },
                1,
                5,
            ),
            '`chat` seems to be a conversation, but who of its `speaker` (such as "Ann", "Bob")',
        ),
        (
            rows(
                lambda q, a, j: {
                    "prompt": {
                        "text": q,
                        "role": "prompter",
                        "replies": [{"text": a, "rank": j, "replies": []}],
                    }
                },
                0,
                1,
            ),
            "The messages form a tree (`replies` holds the ones after)",
        ),
        ([1, "text", None], "The rows are no objects with named columns"),
        ([], "The rows are no objects with named columns"),
    ],
)
def test_what_no_mapping_gives(records: list[object], sentence: str) -> None:
    proposal = propose(records)
    assert len(proposal.missing) == 1
    assert sentence in proposal.missing[0]
    if "completion" not in proposal.columns and "messages" not in proposal.columns:
        assert proposal.flags() == []


def test_columns_that_were_named_are_kept_and_not_used_again() -> None:
    records = rows(
        lambda q, a, j: {"question": q, "answer": a, "rating": j, "better_answer": a.upper()}, 5, 1
    )
    proposal = propose(records, given(completion="better_answer"))
    assert proposal.columns["completion"] == "better_answer"
    assert proposal.columns["prompt"] == "question"
    swapped = propose(records, given(prompt="answer")).columns
    assert swapped["prompt"] == "answer"
    assert swapped["completion"] == "better_answer"


def test_no_single_answer_is_proposed_beside_one_of_a_pair() -> None:
    records = rows(lambda q, a, j: {"prompt": q, "better": a, "output": a.upper()})
    assert "completion" not in propose(records, given(chosen="better")).columns


@pytest.mark.parametrize(
    "name", ["Rating: the answer", "[rating]", "-rating", "{rating}", "& rating", "?rating: x"]
)
def test_columns_that_an_option_cannot_name_alone(name: str) -> None:
    proposal = propose(rows(lambda q, a, j: {"question": q, "answer": a, name: j}, True, False))
    columns = {"prompt": "question", "completion": "answer", "label": name}
    (flag,) = proposal.flags()
    assert yaml.safe_load(shlex.split(flag)[1]) == columns


def test_a_column_may_end_like_a_place_in_a_list() -> None:
    records = rows(lambda q, a, j: {"prompt": q, "response": a, "ratings.0": j}, True, False)
    assert propose(records).columns["label"] == "ratings.0"


def test_a_command_for_fit_names_its_group() -> None:
    records = rows(lambda q, a, j: {"the question": q, "answer": a, "rating": j}, 5, 1)
    assert propose(records).flags() == [
        "--data.columns.prompt 'the question'",
        "--data.columns.completion answer",
        "--data.columns.label rating",
        "--data.labels.at_least 4",
        "--data.labels.at_most 2",
    ]


def test_the_chat_template_is_advised_for_questions_and_answers_in_plain_text() -> None:
    def advised(make: Make, *, chat_template: bool = True) -> bool:
        return propose(rows(make, True, False), chat_template=chat_template).chat

    assert advised(lambda q, a, j: {"question": q, "answer": a, "label": j})
    assert not advised(
        lambda q, a, j: {"question": q, "answer": a, "label": j}, chat_template=False
    )
    assert not advised(lambda q, a, j: {"prompt": q, "completion": f" {a}", "label": j})
    assert not advised(lambda q, a, j: {"prompt": f"<|user|>{q}", "completion": a, "label": j})
    assert not advised(lambda q, a, j: {"prompt": [user(q)], "completion": a, "label": j})
    # A system prompt has no place beside plain text.
    assert advised(
        lambda q, a, j: {"system": "Be brief.", "question": q, "answer": a, "label": j},
        chat_template=False,
    )


def test_columns_and_nested_paths_with_their_values() -> None:
    records = rows(
        lambda q, a, j: {
            "data": {"input": q, "tags": ["a", "b"]},
            "chat": [user(q), assistant(a)],
            "json": json.dumps({"score": j}),
            "a.b": 1,
            "nothing": None,
            "empty": {},
        },
        1,
        None,
    )
    facts = {column.path: column for column in columns_of(records)}
    assert list(facts) == [
        *("data.input", "data.tags.0", "data.tags.*", "chat", "json", "json.score", "a.b"),
        *("nothing", "empty"),
    ]
    assert facts["json.score"].filled == 3
    assert facts["json.score"].in_text
    assert facts["json.score"].values == {"1": 3}
    assert facts["data.tags.*"].values == {'"a"': 6, '"b"': 6}
    assert facts["data.tags.*"].filled == 6
    assert facts["chat"].kind == "messages"
    assert facts["chat"].example == '"What is the capital of France?"'
    assert facts["data.input"].values is None
    assert (facts["nothing"].kind, facts["empty"].kind) == ("null", "null")
    assert json.dumps([column.to_dict() for column in facts.values()])


def test_examples_are_short_and_printable() -> None:
    [column] = columns_of([{"x": "\x1b[2J" + "long " * 100}])
    assert len(column.example) < 80
    assert column.example.isprintable()


@pytest.mark.parametrize(
    "value",
    [
        {"a" * 500: [[[[[[[[[[[[1]]]]]]]]]]]]},
        {str(index): {"x": index} for index in range(500)},
        {"x": [10**400, -(10**400), float("inf"), True, None, "", [], {}]},
        {"prompt": "{" * 5000, "label": "[" * 5000, "x": b"bytes"},
        {"": "", ".": ".", "..0": [""], "*": {"*": 1}},
        {"label": [], "prompt": {}, "completion": [{}], "messages": [{"role": None}]},
    ],
)
def test_odd_values_do_no_harm(value: dict[str, object]) -> None:
    proposal = propose([value, value, 3, {**value, "label": 10**400}])
    assert all(isinstance(flag, str) for flag in proposal.flags())
    assert all(column.example.isprintable() for column in proposal.facts)


def test_what_is_given_is_kept_and_completed() -> None:
    records = rows(
        lambda q, a, j: {"question": q, "answer": a, "rating": 3, "verdict": j},
        "fine",
        "poor",
        "so",
    )
    given = RecordSettings(
        columns=Columns(label="verdict"),
        labels=Labels(good="fine", neither=["so"]),
        repeated="majority",
    )
    proposal = propose(records, given)
    assert options(proposal) == {
        "columns.prompt": "question",
        "columns.completion": "answer",
        "columns.label": "verdict",
        "labels.good": "fine",
        "labels.bad": ["poor"],
        "labels.neither": ["so"],
        "repeated": "majority",
    }
    assert proposal.says_more
    assert not propose(records, as_settings(proposal)).says_more
    rated = RecordSettings(columns=Columns(label="rating"), labels=Labels(at_least=3.0))
    assert propose(records, rated).labels == {"at_least": 3.0}


def test_the_error_for_records_that_fail_alike_has_a_command_to_copy(tmp_path: Path) -> None:
    records = rows(lambda q, a, j: {"question": q, "answer": a, "rating": j}, 5, 1)
    file = jsonl(tmp_path / "my data.jsonl", *records)
    with pytest.raises(DataError) as caught:
        load_records(file, cache_dir=str(tmp_path / "cache"))
    message = str(caught.value)
    assert "none of the 6 records can be used" in message
    assert "The columns are question, answer, rating." in message
    command = message.partition("python -m kto_lightning inspect ")[2].partition("\nNothing")[0]
    assert shlex.split(command.replace("\\\n", "")) == [
        file,
        *("--data.columns.prompt", "question", "--data.columns.completion", "answer"),
        *("--data.columns.label", "rating", "--data.labels.at_least", "4"),
        *("--data.labels.at_most", "2", "--try"),
    ]
    assert all(len(line) <= 80 for line in message.splitlines() if file not in line)


def test_the_error_says_what_no_mapping_gives(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", *({"prompt": q, "completion": a} for q, a in TEXTS))
    with pytest.raises(DataError, match="Nothing says which answers are good") as caught:
        load_records(file, cache_dir=str(tmp_path / "cache"))
    assert "inspect" not in str(caught.value)


def test_objects_in_memory_are_mapped_by_arguments(tmp_path: Path) -> None:
    records = rows(lambda q, a, j: {"question": q, "answer": a, "rating": j}, 5, 1, None)
    with pytest.raises(DataError) as caught:
        load_records(records, cache_dir=str(tmp_path / "cache"))
    shown = str(caught.value).partition("import Columns, Labels):\n")[2].splitlines()
    assert shown[:-1] == [
        "  columns=Columns(prompt='question', completion='answer', label='rating'),",
        "  labels=Labels(at_least=4.0, at_most=2.0),",
        "  unlabeled='skip',",
    ]
    code = f"RecordSettings({' '.join(shown[:-1])})"
    settings = eval(code, {"RecordSettings": RecordSettings, "Columns": Columns, "Labels": Labels})
    assert settings == as_settings(propose(records))


def test_no_judgement_is_missed_where_none_is_needed(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", *({"question": q, "answer": a} for q, a in TEXTS))
    with pytest.raises(DataError, match="give `predict` the same options") as caught:
        load_records(file, cache_dir=str(tmp_path / "cache"), labels_needed=False)
    assert "--data.columns.completion answer" in str(caught.value)
    assert "Nothing says" not in str(caught.value)


def test_settings_in_sentences_are_named_as_options() -> None:
    sentence = "Put it into `labels.good`, or say `repeated majority` of `label`."
    assert name_options(sentence, "") == (
        "Put it into `--labels.good`, or say `--repeated majority` of `label`."
    )
    assert "`--data.labels.good`" in name_options(sentence)


def test_texts_of_scripts_without_spaces() -> None:
    records = [
        {"x": "法国的首都是什么城市?", "y": "法国的首都是巴黎。", "label": 1},
        {"x": "意大利的首都是什么?", "y": "请问别人这个问题。", "label": 0},
    ]
    assert propose(records).columns == {"prompt": "x", "completion": "y", "label": "label"}


def test_two_texts_are_no_values_of_few_kinds() -> None:
    words, texts = columns_of([{"w": w, "t": f"text {w}"} for w in ("good", "bad")])
    assert words.values == {'"good"': 1, '"bad"': 1}
    assert texts.values is None
