"""Settings of the reader: columns, labels, exports and judgements, and how they are told."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import load_records, read_records, summary_of
from kto_lightning.data.labels import Labels
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record
from kto_lightning.data.repeated import DISAGREEING, JOINED
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.errors import ConfigError, DataError
from tests.data.rows import PLAIN, jsonl

RATED = [
    {"q": "a", "a": {"text": "A"}, "stars": 5, "sure": 0.5},
    {"q": "b", "a": {"text": "B"}, "stars": 1},
    {"q": "c", "a": {"text": "C"}, "stars": 3},
    {"q": "d", "a": {"text": "D"}},
]
STARS = RecordSettings(
    columns=Columns(prompt="q", completion="a.text", label="stars", weight="sure"),
    labels=Labels(at_least=4.0, at_most=2.0),
    unlabeled="skip",
)


def shown(source: Any, settings: RecordSettings, **options: bool) -> list[object]:
    return [
        (item.prompt, item.completion, item.desirable, item.weight)
        if isinstance(item, Record)
        else item.why
        if isinstance(item, SkippedRow)
        else item.message
        for item in read_records(source, settings, **options)
    ]


EXPECTED = [
    ("a", "A", True, 0.5),
    ("b", "B", False, 1.0),
    "judged neither good nor bad",
    "without a judgement",
]


@pytest.mark.parametrize("streaming", [False, True])
def test_rated_answers_in_columns_of_other_names(tmp_path: Path, streaming: bool) -> None:
    source = jsonl(tmp_path / "a.jsonl", *RATED)
    assert shown(source, STARS, streaming=streaming) == EXPECTED


def test_the_same_from_a_table(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RATED), tmp_path / "a.parquet")
    assert shown(str(tmp_path / "a.parquet"), STARS) == EXPECTED


def test_the_data_set_remembers_how_it_was_read(tmp_path: Path) -> None:
    source, cache = jsonl(tmp_path / "a.jsonl", *RATED), str(tmp_path / "cache")
    for _ in range(2):  # parsed, and from the cache
        records = load_records(source, STARS, cache_dir=cache)
        assert records["desirable"] == [True, False]
        assert summary_of(records).sentences == [
            "read as: prompt <- q, completion <- a.text, label <- stars, weight <- sure",
            "labels: at least 4 good; at most 2 bad",
            "left out: 1 judged neither good nor bad, 1 without a judgement",
        ]
    other = RecordSettings(**{**_fields(STARS), "labels": Labels(at_least=3.0)})
    assert load_records(source, other, cache_dir=cache)["desirable"] == [True, False, True]


def _fields(settings: RecordSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in asdict(settings)}


def test_prediction_leaves_nothing_out(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *RATED)
    records = load_records(source, STARS, cache_dir=str(tmp_path), labels_needed=False)
    assert records["desirable"] == [True, False, None, None]


def test_nothing_that_is_left_is_an_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", RATED[2] | {"sure": 1}, RATED[3])
    with pytest.raises(DataError, match=r"no record is left \(left out: 1 judged"):
        load_records(source, STARS, cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(prompt="Q2", completion="a.text"), "prompt Q2: no record of .* has it"),
        (Columns(completion="a.txt"), r"completion a\.txt: .* The nearest is a\.text"),
        (Columns(prompt="q", completion="a.text", system="sys"), "system sys"),
    ],
)
def test_a_path_that_no_record_has(tmp_path: Path, columns: Columns, message: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", *RATED)
    settings = RecordSettings(columns=columns, unlabeled="skip")
    with pytest.raises(ConfigError, match=message):
        load_records(source, settings, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        list(read_records(source, settings, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_another_form_is_not_left_out(tmp_path: Path, streaming: bool) -> None:
    other = {"q": "e", "a": {"text": "E"}, "label": True}
    sources = [jsonl(tmp_path / "a.jsonl", *RATED), jsonl(tmp_path / "b.jsonl", other)]
    with pytest.raises(ConfigError, match=r"label stars: no record of .*b\.jsonl has it"):
        list(read_records(sources, STARS, streaming=streaming))
    unjudged = {"q": "e", "a": {"text": "E"}}
    sources[1] = jsonl(tmp_path / "c.jsonl", unjudged)
    assert shown(sources, STARS, streaming=streaming) == [*EXPECTED, "without a judgement"]


def test_a_label_is_not_named_for_pairs(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "A", "rejected": "B", "mark": "good"}
    source = jsonl(tmp_path / "a.jsonl", row)
    (message,) = shown(source, RecordSettings(columns=Columns(label="mark")))
    assert str(message).startswith("a 'label' is named, but the record is a pair")
    named = Columns(completion="chosen", label="mark")
    assert shown(source, RecordSettings(columns=named)) == [("a", "A", True, 1.0)]


@pytest.mark.parametrize("key", ["role", "content"])
def test_a_key_that_no_message_has(tmp_path: Path, key: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", PLAIN)
    settings = RecordSettings(columns=Columns(**{key: "speaker"}))
    with pytest.raises(ConfigError, match=f"columns.{key} speaker: no record of .* has it"):
        list(read_records(source, settings))


def test_a_label_path_is_not_needed_for_prediction(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "A"})
    settings = RecordSettings(columns=Columns(label="stars"))
    records = load_records(source, settings, cache_dir=str(tmp_path), labels_needed=False)
    assert records["desirable"] == [None]


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_as_messages(tmp_path: Path, streaming: bool) -> None:
    source = jsonl(tmp_path / "a.jsonl", PLAIN | {"system": "Be brief."})
    (record,) = read_records(source, RecordSettings(chat=True), streaming=streaming)
    assert isinstance(record, Record)
    assert record.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PLAIN["prompt"]},
    ]
    assert record.completion == [{"role": "assistant", "content": PLAIN["completion"]}]
    (bad,) = read_records(source)
    assert isinstance(bad, BadRecord)
    assert "--data.chat true" in bad.message


def test_errors_name_columns_and_keys_of_the_file(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"q": 3, "a": {"text": "A"}, "stars": 5, "sure": 1})
    (bad,) = read_records(source, STARS)
    assert isinstance(bad, BadRecord)
    assert bad.message.endswith("('prompt' is read from 'q'.)")
    assert bad.keys == ["q", "a", "stars", "sure"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("keep", [True, False, True, False]),
        ("majority", [True, JOINED, JOINED, False]),
        ("drop_disagreeing", [*[DISAGREEING] * 3, False]),
    ],
)
def test_repeated_judgements(tmp_path: Path, rule: Any, expected: list) -> None:
    rows = [PLAIN, PLAIN | {"label": [0, 1]}, PLAIN | {"completion": "No.", "label": False}]
    source = jsonl(tmp_path / "a.jsonl", *rows)
    found = [
        item.desirable if isinstance(item, Record) else getattr(item, "why", "")
        for item in read_records(source, RecordSettings(repeated=rule))
    ]
    assert found == expected


def test_an_export_is_recognised_and_may_be_read_as_it_is(tmp_path: Path) -> None:
    row = {
        "data": {"rating": 1},
        "meta": {"message_id": "a1", "chat_id": "c"},
        "snapshot": {
            "chat": {
                "chat": {
                    "history": {
                        "messages": {
                            "u1": {"id": "u1", "parentId": None, "role": "user", "content": "q"},
                            "a1": {
                                **{"id": "a1", "parentId": "u1"},
                                **{"role": "assistant", "content": "A"},
                            },
                        }
                    }
                }
            }
        },
    }
    source = tmp_path / "export.json"
    source.write_text(json.dumps([row]))
    (record,) = read_records(str(source))
    assert isinstance(record, Record)
    assert (record.desirable, record.completion) == (True, [{"role": "assistant", "content": "A"}])
    (bad,) = read_records(str(source), RecordSettings(format="records"))
    assert isinstance(bad, BadRecord)
    path = "snapshot.chat.chat.history.messages.u1.content"
    columns = Columns(prompt=path, completion="meta.chat_id", label="data.rating")
    (record,) = read_records(str(source), RecordSettings(columns=columns))
    assert isinstance(record, Record)
    assert (record.prompt, record.completion) == ("q", "c")


def test_a_format_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--data\.format must be one of records, open_webui,"):
        RecordSettings(format="excel")


def test_messages_with_a_rejected_answer(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}
    other = {"role": "assistant", "content": "B"}
    for extra in ({"rejected_response": "B"}, {"rejected_messages": [user, other]}):
        source = jsonl(tmp_path / "a.jsonl", {"messages": [user, answer], **extra})
        good, bad = read_records(source)
        assert isinstance(good, Record)
        assert isinstance(bad, Record)
        assert (good.prompt, good.completion, good.desirable) == ([user], [answer], True)
        assert (bad.prompt, bad.completion, bad.desirable) == ([user], [other], False)


def test_openai_preferences_and_alpaca_rows(tmp_path: Path) -> None:
    row = {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": "A"}],
        "non_preferred_output": [{"role": "assistant", "content": "B"}],
    }
    found = list(read_records(jsonl(tmp_path / "a.jsonl", row)))
    assert [item.desirable for item in found if isinstance(item, Record)] == [True, False]
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "kto_tag": False}
    assert shown(jsonl(tmp_path / "b.jsonl", alpaca), RecordSettings()) == [
        ("Add.\n1 2", "3", False, 1.0)
    ]
    speaker = {"conversations": [{"from": "human", "value": "q"}]}
    pair = {"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}
    good, _ = read_records(jsonl(tmp_path / "c.jsonl", speaker | pair))
    assert isinstance(good, Record)
    assert good.completion == [{"role": "assistant", "content": "A"}]


TURNS = [
    {"speaker": "Customer", "says": {"text": "q"}},
    {"speaker": "bot", "says": {"text": "A"}, "votes": {"value": 1}},
    {"speaker": "customer", "says": {"text": "r"}},
    {"speaker": "bot", "says": {"text": "B"}},
    {"speaker": "customer", "says": {"text": "s"}},
    {"speaker": "bot", "says": {"text": "C"}, "votes": {"value": -1}},
]
TURN_COLUMNS = Columns(
    messages="log.turns", label="log.turns.*.votes.value", role="speaker", content="says.text"
)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_judgements_of_single_turns(tmp_path: Path, streaming: bool, as_text: bool) -> None:
    log = {"turns": json.dumps(TURNS) if as_text else TURNS}
    source = jsonl(tmp_path / "a.jsonl", {"log": log}, {"log": {"turns": TURNS[2:4]}})
    settings = RecordSettings(columns=TURN_COLUMNS, unlabeled="skip")
    first, second, unjudged = read_records(source, settings, streaming=streaming)
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert isinstance(unjudged, SkippedRow)
    texts = [message["content"] for message in [*second.prompt, *second.completion]]
    roles = [message["role"] for message in [*second.prompt, *second.completion]]
    assert (texts, roles) == ([*"qArBsC"], ["user", "assistant"] * 3)
    assert (first.desirable, second.desirable) == (True, False)
    assert [message["content"] for message in [*first.prompt, *first.completion]] == [*"qA"]


def test_only_answers_are_judged(tmp_path: Path) -> None:
    turns = [*TURNS[:2], {"speaker": "customer", "says": {"text": "r"}, "votes": {"value": 1}}]
    source = jsonl(tmp_path / "a.jsonl", {"log": {"turns": turns}})
    (bad,) = read_records(source, RecordSettings(columns=TURN_COLUMNS))
    assert isinstance(bad, BadRecord)
    assert bad.message.startswith('messages[2] is judged, but its role is "user"')


def test_columns_beside_an_export_are_told_of_its_importer(tmp_path: Path) -> None:
    thread = {
        "id": "c",
        "steps": [
            {"id": "u", "threadId": "c", "parentId": None, "type": "user_message", "output": "q"},
        ],
    }
    source = jsonl(tmp_path / "a.jsonl", thread, thread)
    settings = RecordSettings(columns=Columns(label="id"))
    with pytest.raises(DataError, match=r"add --data\.format chainlit: then they are"):
        load_records(source, settings, cache_dir=str(tmp_path))


def test_words_that_yaml_reads_as_true_are_shown_as_written() -> None:
    assert str(Labels(good=[True, "ok"], bad=0)) == "true (yes, on), ok: good; 0: bad"
