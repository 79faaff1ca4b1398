"""All importers: which rows they recognise, and that nothing in an export makes them raise."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import read_records
from kto_lightning.data.importers import IMPORTERS, find_importer
from kto_lightning.data.labels import Labels
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.errors import DataError
from tests.data.importers.exports import (
    CHAINLIT_STEPS,
    GRADIO_CHAT,
    LIBRE_BRANCHES,
    OTHER_ROWS,
    arena_state,
    arena_vote,
    chainlit_thread,
    chat_log,
    libre_conversation,
    libre_message,
    mixed,
    read,
    webui_chat,
    webui_feedback,
    webui_message,
)
from tests.support.fuzz import fuzz, mutated_json

WEBUI = webui_chat(
    webui_message("u1", None),
    webui_message("a1", "u1", annotation={"rating": 1}),
    params={"system": "Be short."},
)
EXPORTS: dict[str, tuple] = {
    "open_webui": (webui_feedback(WEBUI, "a1"), {"chat": WEBUI}),
    "librechat": (libre_conversation(*LIBRE_BRANCHES), *LIBRE_BRANCHES),
    "gradio": (
        chat_log(GRADIO_CHAT, [3, 4]),
        chat_log([["q", "a"]], [0, 1]),
        {"conversation": GRADIO_CHAT, "index": 1, "value": "Dislike"},
    ),
    "fastchat": (
        arena_vote("upvote", arena_state("q", "a", system_message="Be short.")),
        arena_vote("leftvote", arena_state("q", "a"), arena_state("q", "b")),
    ),
    "chainlit": (chainlit_thread(*CHAINLIT_STEPS), *CHAINLIT_STEPS),
}


def test_every_importer_has_an_export_here():
    assert EXPORTS.keys() == IMPORTERS.keys()


@pytest.mark.parametrize("rows", mixed(OTHER_ROWS))
def test_rows_of_others_are_not_recognised(rows: list):
    assert find_importer(rows) is None


@pytest.mark.parametrize("rows", [[], [None], [3, "x"], [[]], [{}]])
def test_nothing_is_not_recognised(rows: list):
    assert find_importer(rows) is None


@pytest.mark.parametrize("tool", IMPORTERS)
def test_an_export_is_recognised_by_its_own_importer_only(tool: str):
    for row in EXPORTS[tool]:
        assert [name for name, it in IMPORTERS.items() if it.matches([row])] == [tool]
    assert find_importer([*EXPORTS[tool], "damaged"]) == tool


@pytest.mark.parametrize("tool", IMPORTERS)
def test_bad_records_of_the_source_are_passed_on(tool: str):
    bad = BadRecord(file="f", line=1, message="invalid JSON")
    good = Row(file="f", line=2, value=EXPORTS[tool][0])
    first, *rest = IMPORTERS[tool].records(iter([bad, good, bad]))
    assert first == bad
    assert bad in rest
    assert any(isinstance(item, Row) for item in rest)


@pytest.mark.parametrize("tool", IMPORTERS)
@fuzz(40)
@given(data=st.data())
def test_nothing_in_an_export_makes_an_importer_raise(tool: str, data: st.DataObject):
    rows = [
        data.draw(st.one_of(st.just(row), mutated_json(row)))
        for row in data.draw(st.lists(st.sampled_from(EXPORTS[tool]), min_size=1, max_size=4))
    ]
    find_importer(rows)
    for outcome in read(tool, *rows):
        assert isinstance(outcome, Row | BadRecord | SkippedRow)
        if isinstance(outcome, Row):
            value = outcome.value
            assert isinstance(value, dict)
            assert isinstance(value["label"], bool | str)  # options of Gradio can be words
            assert all(isinstance(item["content"], str) for item in value["prompt"])


def test_another_judgement_of_an_export_can_be_named(tmp_path: Path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps([webui_feedback(WEBUI, "a1", rating=-1)]), encoding="utf-8")
    settings = RecordSettings(
        format="open_webui",
        columns=Columns(label="details_rating"),
        labels=Labels(at_least=7.0, at_most=3.0),
    )
    (record,) = read_records(str(path), settings)
    assert isinstance(record, Record)
    assert record.desirable is True  # 7 of 10, though thumbs down
    (record,) = read_records(str(path))
    assert isinstance(record, Record)
    assert record.desirable is False
    assert record.prompt[0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize("tool", ["librechat", "fastchat", "chainlit"])
def test_an_export_without_a_judgement_says_so(tool: str, tmp_path: Path):
    unjudged = {
        "librechat": libre_conversation(libre_message("u1")),
        "fastchat": arena_vote("chat", arena_state("q", "a")),
        "chainlit": chainlit_thread(CHAINLIT_STEPS[1]),
    }
    path = tmp_path / "export.jsonl"
    path.write_text(json.dumps(unjudged[tool]), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(IMPORTERS[tool].nothing_found)):
        list(read_records(str(path)))
