"""Labels: words row by row, numbers column by column, classes by their names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_lightning.data import reader
from kto_lightning.data.dataset import load_records, read_records
from kto_lightning.data.labels import PAIRS, LabelReader, Labels
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.streaming.stream import open_stream
from kto_lightning.data.strict_json import RecordError
from kto_lightning.errors import ConfigError, DataError
from tests.data.rows import PLAIN, jsonl, message_of, read_one
from tests.support.factories import make_tokenizer

FEATURES = {"prompt": datasets.Value("string"), "completion": datasets.Value("string")}


def labels_of(source: str | list[str], **options: bool) -> list[bool | str]:
    """The labels of a source, and the messages of those that cannot be read."""
    read = read_records(source, **options)
    return [item.message if isinstance(item, BadRecord) else item.desirable for item in read]


def column(path: Path, *values: object) -> str:
    return jsonl(path, *(PLAIN | {"label": value} for value in values))


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        *((True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)),
        *(("desirable", True), ("Undesirable", False), ("true", True), ("FALSE", False)),
        *(("1", True), (" 0 ", False), ("thumbs_up", True), ("thumbsDown", False)),
        *(("Thumbs-Up", True), ("👍🏽", True), ("👎️", False), ("YES", True), ("no", False)),
        *((word, place == 0) for pair in PAIRS for place, word in enumerate(pair)),
    ],
)
def test_labels_that_are_understood(tmp_path: Path, label: object, desirable: bool) -> None:
    assert read_one(tmp_path, PLAIN | {"label": label}).desirable is desirable


@pytest.mark.parametrize(
    "label", [-1, 2, 0.5, "", "maybe", [], [[True]], {}, 10**400, "inf", "5", "-1", "👌"]
)
def test_labels_that_are_not_understood(tmp_path: Path, label: object) -> None:
    assert message_of(tmp_path, PLAIN | {"label": label}).startswith("'label' must be true or")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, 1], [True, False, True]),
        ([1, -1, 1], [True, False, True]),
        (["1", "-1", 1.0], [True, False, True]),
        ([True, 1, "no"], [True, True, False]),
    ],
)
def test_numbers_of_one_scale(tmp_path: Path, values: list, expected: list[bool]) -> None:
    assert labels_of(column(tmp_path / "a.jsonl", *values)) == expected


@pytest.mark.parametrize(
    ("values", "numbers", "first"),
    [
        ([5, 1, 5, 1], "1, 5", "5 first at {}:1"),
        ([1] * 70 + [4, 2, 3], "1, 2, 3, 4", "4 first at {}:71"),
        ([1, 0, -1], "-1, 0, 1", "-1 first at {}:3"),
        ([1, 0.5], "0.5, 1", "0.5 first at {}:2"),
        (["1", "5"], "1, 5", "5 first at {}:2"),
        (list(range(1, 30)), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …", "2 first at {}:2"),
    ],
)
def test_other_numbers_make_a_rating_of_the_whole_column(
    tmp_path: Path, values: list, numbers: str, first: str
) -> None:
    source = column(tmp_path / "a.jsonl", *values)
    for found in (labels_of(source), labels_of(source, streaming=True)):
        assert len(found) == len(values)
        for message in found:
            assert isinstance(message, str)
            assert f"in a column with the numbers {numbers} (" in message
            assert first.format(source) in message


def test_words_stay_words_beside_ratings(tmp_path: Path) -> None:
    good, rating, bad = labels_of(column(tmp_path / "a.jsonl", "good", 3, False))
    assert (good, bad) == (True, False)
    assert "numbers 3" in str(rating)


def test_the_files_of_a_source_have_one_label_column(tmp_path: Path) -> None:
    sorted_by_stars = [column(tmp_path / f"{star}.jsonl", star) for star in (1, 5)]
    assert all(isinstance(found, str) for found in labels_of(sorted_by_stars))
    with pytest.raises(DataError, match="the numbers 1, 5"):
        load_records(sorted_by_stars, cache_dir=str(tmp_path / "cache"))


def test_a_stream_of_ratings_trains_on_none(tmp_path: Path) -> None:
    source = column(tmp_path / "a.jsonl", *[1] * 300, 5)
    with pytest.raises(DataError, match="100 bad records and 0 usable ones so far"):
        open_stream(
            source,
            make_tokenizer(),
            max_length=64,
            truncation="keep_start",
            buffer_size=8,
            batch_size=4,
            warn=lambda _: None,
            end_ids=set(),
            check_id=lambda *_: None,
        )


def test_a_hub_stream_stops_at_a_number_that_its_first_records_have_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from (PLAIN | {"label": star} for star in [1] * 9 + [5])

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(reader, "STREAM_SAMPLE", 4)
    read = read_records("owner/feedback", streaming=True)
    assert [next(read).line for _ in range(9)] == list(range(1, 10))
    with pytest.raises(DataError, match="a 'label' is 5, but the column was taken for one of 1,"):
        next(read)


def classes(*names: str) -> datasets.Dataset:
    """Records whose labels are the classes of these names, in their order."""
    rows = [PLAIN | {"label": index} for index in range(len(names))]
    features = datasets.Features(FEATURES | {"label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_list(rows, features=features)


def test_classes_are_read_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = classes("desirable", "undesirable")
    encoded.to_parquet(tmp_path / "a.parquet")
    assert labels_of(str(tmp_path / "a.parquet")) == [True, False]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: encoded)
    assert labels_of("owner/feedback") == [True, False]
    stream = encoded.to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert labels_of("owner/feedback", streaming=True) == [True, False]


def test_classes_of_other_names_are_refused_by_name(tmp_path: Path) -> None:
    classes("neg", "neutral", "yes").to_parquet(tmp_path / "a.parquet")
    neg, neutral, yes = labels_of(str(tmp_path / "a.parquet"))
    assert yes is True
    assert str(neg).startswith("""'label' must be true or false, got "neg".""")
    assert str(neutral).startswith("""'label' must be true or false, got "neutral".""")


def test_class_numbers_without_a_name(tmp_path: Path) -> None:
    table = classes("no", "yes").data.table
    columns = table.set_column(2, "label", pa.array([-1, 7]))
    pq.write_table(columns, tmp_path / "a.parquet")
    missing, unknown = labels_of(str(tmp_path / "a.parquet"))
    assert str(missing).startswith("'label' must be true or false, got null.")
    assert str(unknown) == """'label' is 7, but its classes are "no, yes". Fix it."""


@pytest.mark.parametrize("metadata", [b"{", b"[]", json.dumps({"info": {}}).encode(), b"\xff"])
def test_classes_that_cannot_be_read_are_no_labels(tmp_path: Path, metadata: bytes) -> None:
    table = pa.Table.from_pylist([PLAIN | {"label": 0}])
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the features that `datasets` wrote into it cannot be"):
        list(read_records(str(tmp_path / "a.parquet")))


def test_only_records_are_read_where_no_number_occurs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordReader, "_label_column", lambda _: pytest.fail("the column was read"))
    assert labels_of(column(tmp_path / "a.jsonl", True, "no", "👍")) == [True, False, True]


def test_several_judges_of_one_answer_give_a_record_each(tmp_path: Path) -> None:
    source = column(tmp_path / "a.jsonl", [True], [1, 0, None], ["👎"], "[1, 0]")
    assert labels_of(source) == [True, True, False, False, True, False]


@pytest.mark.parametrize("label", ["[]", "[null]", " [ ] "])
def test_a_list_in_text_may_hold_no_judgement(tmp_path: Path, label: str) -> None:
    settings = RecordSettings(unlabeled="skip")
    (item,) = read_records(column(tmp_path / "a.jsonl", label), settings)
    assert isinstance(item, SkippedRow)


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (
            Labels(at_least=4.0, at_most=2.0),
            [1, 2, 3, 4, "5", 4.5],
            [False, False, None, *[True] * 3],
        ),
        (Labels(at_least=4.0), [1, 3.9, 4], [False, False, True]),
        (Labels(at_most=2.0), [2, 2.5, 5], [False, True, True]),
        (Labels(at_least=0.0, at_most=-1.0), [0, -0.5, -1], [True, None, False]),
        (Labels(good=["resolved"], bad="open"), ["Resolved", "OPEN", "yes"], [True, False, True]),
        (Labels(good=[True], bad=[False]), ["yes", "no", "On", True], [True, False, True, True]),
        (Labels(good=["no"], bad=["yes"]), ["no", "yes", "good"], [True, False, True]),
        (Labels(good=[2], bad=[1], neither=[3]), [1, 2.0, "3"], [False, True, None]),
        (Labels(neither=["unsure"]), ["unsure", 1, 0], [None, True, False]),
        (Labels(at_least=4.0, neither=["n/a"]), ["N/A", 5], [None, True]),
        (Labels(at_least=4.0, neither=[3]), [3, 5, 2], [None, True, False]),
        (Labels(at_most=2.0, good=[4, 5]), [1, 4, "5"], [False, True, True]),
        (Labels(good=["yes"]), [True, 1, 0], [True, True, False]),
    ],
)
def test_what_settings_say_that_labels_mean(labels: Labels, values: list, expected: list) -> None:
    labelled = LabelReader(lambda: (("a.jsonl:1", value) for value in values), labels=labels)
    assert [labelled.read(value) for value in values] == expected


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (Labels(good=["resolved"]), "pending", "neither --data.labels.good nor --data.labels.bad"),
        (Labels(good=[2], bad=[1]), 0, "'label' is 0. It is in neither"),
        (Labels(at_most=2.0, good=[4, 5]), 3, "'label' is 3. It is in neither"),
        (Labels(at_least=4.0), "90%", "Thresholds compare numbers: write it as one"),
        (Labels(at_least=4.0), "four", """'label' must be true or false, got "four"."""),
        (Labels(at_least=4.0), None, "--data.unlabeled skip leaves such lines out"),
        (Labels(at_least=4.0), "nan", "'label' must be true or false"),
    ],
)
def test_what_settings_do_not_explain(labels: Labels, value: object, message: str) -> None:
    labelled = LabelReader(lambda: [("a.jsonl:1", value)], labels=labels)
    with pytest.raises(RecordError, match=message):
        labelled.read(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"good": ["yes"], "bad": ["YES"]}, "in --data.labels.good and in --data.labels.bad"),
        ({"good": [1], "neither": ["1.0"]}, "in --data.labels.good and in --data.labels.neither"),
        ({"at_least": 2.0, "at_most": 2.0}, "at_most 2 must be below --data.labels.at_least 2"),
        ({"at_least": float("nan")}, "must be a finite number"),
        ({"good": [" "]}, "must hold words or numbers"),
    ],
)
def test_label_settings_that_contradict_themselves(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Labels(**settings)


def test_ratings_are_answered_with_thresholds(tmp_path: Path) -> None:
    message = labels_of(column(tmp_path / "a.jsonl", 1, 2, 3, 4, 5))[0]
    assert "such as --data.labels.at_least 4 --data.labels.at_most 2." in str(message)
