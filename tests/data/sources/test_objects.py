"""Records from objects in memory: data sets, lists of dicts, DataFrames."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from lightning import Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.data.dataset import load_records, read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rewards import SUFFIX, exclude_rewards_files, write_rewards
from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources import Source, expand, names_of
from kto_lightning.errors import DataError
from kto_lightning.module import KTOModule
from tests.data.rows import CALL, GOOD, PLAIN, USER, jsonl
from tests.support.factories import plain_records

pandas = pytest.importorskip("pandas")

ROWS = [PLAIN | {"prompt": f"Question {i}?", "label": i % 2 == 0} for i in range(4)]


def frame(rows: list[dict]) -> Any:
    return pandas.DataFrame(rows)


KINDS = {"list": list, "Dataset": datasets.Dataset.from_list, "DataFrame": frame}


def read(source: object, **options: Any) -> list[Record]:
    records = list(read_records(source, **options))
    assert all(isinstance(record, Record) for record in records), records
    return [record for record in records if isinstance(record, Record)]


def values(source: object) -> list[object]:
    (found,) = expand(source)
    rows = list(found.rows())
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_objects_are_read_as_files_are(kind: str, streaming: bool) -> None:
    records = read(KINDS[kind](ROWS), streaming=streaming)
    assert [(r.prompt, r.completion, r.desirable) for r in records] == [
        tuple(row.values()) for row in ROWS
    ]
    assert [r.location for r in records] == [f"{kind}:{line}" for line in (1, 2, 3, 4)]
    bad = [*ROWS, PLAIN | {"label": None}]
    *_, last = read_records(KINDS[kind](bad), streaming=streaming)
    assert str(last).startswith(f"{kind}:5: 'label' must be true or false, got null.")


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_cached_by_their_contents(tmp_path: Path, kind: str) -> None:
    def load(rows: list[dict]) -> datasets.Dataset:
        return load_records(KINDS[kind](rows), cache_dir=str(tmp_path))

    first = load(ROWS)
    assert load([dict(row) for row in ROWS])._fingerprint == first._fingerprint
    other = load([*ROWS[1:], ROWS[0]])
    assert other._fingerprint != first._fingerprint
    assert other["desirable"][:] == [False, True, False, True]
    assert first["file"][:] == [kind] * 4


def test_objects_and_files_together(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", PLAIN)
    source = [Path(file), datasets.Dataset.from_list(ROWS[:1]), ROWS[1:2], frame(ROWS[2:3]), file]
    assert [r.location for r in read([*source, datasets.Dataset.from_list(ROWS[3:])])] == [
        *(f"{file}:1", "Dataset:1", "list:1", "DataFrame:1", f"{file}:1", "Dataset 2:1")
    ]
    assert names_of(source) == [file, "Dataset", "list", "DataFrame", file]
    assert names_of(ROWS) == "list"
    assert names_of(Path("~/a.jsonl")) == "~/a.jsonl"
    assert names_of([file]) == [file]
    assert len(read(tuple(ROWS))) == 4


def test_a_path_object_is_what_its_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = jsonl(tmp_path / "a.jsonl", PLAIN)
    for path in (Path(file), Path("~/a.jsonl"), tmp_path / "*.jsonl"):
        assert [record.file for record in read(path)] == [file]


def test_a_data_set_is_read_without_its_format_and_by_class_names() -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["good", "bad"]),
        }
    )
    rows = [row | {"label": int(not row["label"])} for row in ROWS]
    data = datasets.Dataset.from_list(rows, features=features)
    for given in (data, data.with_format("torch"), data.select([2, 3, 0, 1])):
        assert [record.desirable for record in read(given)] == [True, False, True, False]
    assert [record.prompt for record in read(data.select([2, 0]))] == ["Question 2?", "Question 0?"]


def test_messages_in_cells_of_a_frame() -> None:
    texts = frame([{"messages": json.dumps([USER, GOOD]), "label": "yes", "weight": "0.5"}])
    lists = frame([{"messages": [USER, GOOD], "label": 1.0, "weight": None}])
    arrays = frame([{"messages": np.array([USER, GOOD]), "label": np.bool_(True)}])
    for given in (texts, lists, arrays):
        (record,) = read(given)
        assert (record.prompt, record.completion, record.desirable) == ([USER], [GOOD], True)


def test_an_empty_argument_in_a_list_is_kept() -> None:
    (record,) = read([{"messages": [USER, CALL], "label": True}])
    assert record.completion == [CALL]


def test_missing_values_and_numpy() -> None:
    stamp = pandas.Timestamp("2026-01-02T03:04:05")
    columns = {
        "a": [1, None],
        "b": pandas.array([True, None], dtype="boolean"),
        "c": [stamp, None],
        "d": pandas.Categorical(["x", None]),
        "e": ["y", float("nan")],
        "f": [np.arange(3), None],
        7: [np.float32(0.5), np.datetime64("NaT")],
    }
    given = pandas.DataFrame(columns, index=[5, 5])
    first = {"a": 1.0, "b": True, "c": "2026-01-02T03:04:05", "d": "x", "e": "y", "f": [0, 1, 2]}
    assert values(given) == [first | {"7": 0.5}, dict.fromkeys([*first, "7"])]
    rows = [{"a": np.int64(1), "b": {"c": (np.bool_(True), "x")}, "d": float("nan")}]
    assert values([*rows, {"e": datetime.date(2026, 1, 2)}]) == [
        {"a": 1, "b": {"c": [True, "x"]}, "d": None},
        {"e": "2026-01-02"},
    ]
    assert json.loads(json.dumps(values(given)))


def test_rows_are_made_one_at_a_time() -> None:
    class Watched(dict):
        """A record that counts how many are read."""

        num_read = 0

        def values(self) -> Any:
            Watched.num_read += 1
            return super().values()

    rows = iter(expand([Watched(row) for row in ROWS])[0].rows())
    next(rows)
    assert Watched.num_read == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=None),
            "a DatasetDict has several splits: train, test. Give one of them, such as "
            "dataset['train'].",
        ),
        (
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            "an IterableDataset cannot be read a second time in the same order. Give its name",
        ),
        ({"prompt": ["a"]}, "a dict is no list of records. Give a list of dicts, or"),
        ([PLAIN, "a.jsonl"], "a list of records must hold dicts only, and a list of sources none;"),
        ([], "the list of data files is empty. Name at least one file or hub data set."),
        (np.arange(3), "records cannot be read from an object of type ndarray. Give a path, a"),
        ((row for row in ROWS), "records cannot be read from an object of type generator."),
        ([[["a"]]], "records cannot be read from an object of type list."),
        ([1], "records cannot be read from an object of type int."),
        (
            pandas.DataFrame([[1, 2]], columns=["a", "a"]),
            "DataFrame: a column is named twice: a, a. Rename one.",
        ),
    ],
    ids=range(10),
)
def test_objects_that_are_no_records(source: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        list(read_records(source))
    assert str(error.value).startswith(message)


def test_empty_objects_have_no_record() -> None:
    for empty in (datasets.Dataset.from_list([]), pandas.DataFrame({"prompt": []})):
        with pytest.raises(DataError, match="no record in there"):
            list(read_records(empty))


def test_pandas_is_not_imported_to_recognise_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    given = frame(ROWS)
    monkeypatch.delitem(sys.modules, "pandas")
    with pytest.raises(DataError, match="an object of type DataFrame"):
        expand(given)
    assert "pandas" not in sys.modules


def test_sources_stay_what_they_are() -> None:
    found = expand([ROWS, "a/b"])
    assert all(isinstance(source, Source) for source in found)
    assert expand(found) == found
    assert exclude_rewards_files(found) == (found, [])


def make_trainer(folder: Path) -> Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        accelerator="cpu",
        max_steps=1,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),  # type: ignore[arg-type]
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_validation_and_prediction(policy: Path, tmp_path: Path) -> None:
    records = plain_records(8)
    data = KTODataModule(
        train=frame(records),
        validation=datasets.Dataset.from_list(records[:4]),
        predict=[records, datasets.Dataset.from_list(records[:1])],
        batch_size=4,
        preprocessing_workers=1,
    )
    module = KTOModule(str(policy))
    make_trainer(tmp_path).fit(module, datamodule=data)
    facts = data.facts()
    assert (facts["train"], facts["validation"]) == ("DataFrame", "Dataset")
    assert json.loads(json.dumps(facts)) == facts
    assert data.location(0).startswith("DataFrame:")
    predictions = make_trainer(tmp_path).predict(module, datamodule=data)
    assert data.prepared.predict_set is not None
    found = [item for batch in predictions or [] for item in batch]  # type: ignore[union-attr]
    paths = write_rewards(data.prepared.predict_set, found, tmp_path / "rewards")
    assert paths == [tmp_path / "rewards" / f"{name}{SUFFIX}" for name in ("list", "Dataset")]
    lines = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 9))
    assert all(isinstance(line["reward"], float) for line in lines)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_stream_of_objects(policy: Path, tmp_path: Path) -> None:
    data = KTODataModule(train=plain_records(8), batch_size=4, streaming=True)
    module = KTOModule(str(policy), desirable_weight=1.0, undesirable_weight=1.0)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    assert data.facts()["train"] == "list"


def test_a_bad_record_among_objects_is_counted() -> None:
    *_, bad = read_records([PLAIN, PLAIN | {"weight": -1}])
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith("list:2: 'weight' must be a positive, finite number, got -1.")
