"""Arrow files and the folders of `save_to_disk`."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from kto_lightning.data.dataset import load_records, read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources import expand
from kto_lightning.errors import DataError
from tests.data.rows import PLAIN

ROWS = [PLAIN | {"label": i % 3 == 0, "extra": i} for i in range(200)]


def labels_of(source: object) -> list[bool | None]:
    records = list(read_records(source))
    assert all(isinstance(record, Record) for record in records), records
    return [record.desirable for record in records if isinstance(record, Record)]


def test_arrow_files_of_both_formats(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    feather.write_feather(table, str(tmp_path / "a.feather"))  # compressed
    for name in ("file.arrow", "stream.arrow", "a.feather"):
        read = list(read_records(str(tmp_path / name)))
        assert [(r.line, r.desirable) for r in read if isinstance(r, Record)] == [
            (line, row["label"]) for line, row in enumerate(ROWS, start=1)
        ]
    (tmp_path / "file.arrow").write_bytes((tmp_path / "file.arrow").read_bytes()[:-60])
    with pytest.raises(DataError, match="cannot be read: Not an Arrow file"):
        labels_of(str(tmp_path / "file.arrow"))


def test_a_value_that_python_cannot_hold_matters_where_it_is_chosen(tmp_path: Path) -> None:
    made = pa.array([2**62, 1], pa.timestamp("us"))
    table = pa.table({"prompt": ["a", "b"], "made": made, "completion": ["c", "d"]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (source,) = expand(str(tmp_path / "a.arrow"))
    first, second = source.rows(choose=lambda _: ["made"])
    assert isinstance(first, BadRecord)
    assert first.message.startswith("'made' holds a timestamp[us] that cannot be read")
    assert not isinstance(second, BadRecord)
    first, _ = source.rows(choose=list)
    assert not isinstance(first, BadRecord)
    assert first.value == {"prompt": "a", "made": None, "completion": "c"}


def test_a_saved_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("prompt", "completion")},
            "label": datasets.ClassLabel(names=["desirable", "undesirable"]),
            "image": datasets.Image(),
        }
    )
    rows = [PLAIN | {"label": i % 2, "image": {"bytes": b"no image", "path": None}} for i in (0, 1)]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.remove_columns("image").save_to_disk(tmp_path / "texts")
    assert labels_of(str(tmp_path / "texts")) == [True, False]
    # The image is not decoded, which would fail, but refused.
    first, _ = read_records(str(tmp_path / "saved"))
    assert isinstance(first, BadRecord)
    assert str(first).startswith(f"{tmp_path}/saved:1: 'image' is given, but only text is trained")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [record.file for record in read_records("~/texts")] == [str(tmp_path / "texts")] * 2


def test_a_saved_data_set_is_known_by_its_contents(tmp_path: Path) -> None:
    def load() -> datasets.Dataset:
        return load_records(str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))

    datasets.Dataset.from_list([PLAIN]).save_to_disk(tmp_path / "saved")
    first = load()
    assert load()._fingerprint == first._fingerprint
    datasets.Dataset.from_list([PLAIN | {"label": False}]).save_to_disk(tmp_path / "saved")
    assert load()["desirable"][:] == [False]


def test_folders_that_are_no_saved_data_set(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([PLAIN])
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "both")
    message = f"both holds the splits of a data set. Name one: {tmp_path}/both/train, {tmp_path}/bo"
    with pytest.raises(DataError, match=message):
        labels_of(str(tmp_path / "both"))
    assert labels_of(str(tmp_path / "both/train")) == [True]
    (arrow,) = (tmp_path / "both/test").glob("*.arrow")
    arrow.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=f"{arrow} is a git-LFS pointer"):
        labels_of(str(tmp_path / "both/test"))
    arrow.unlink()
    with pytest.raises(DataError, match="both/test cannot be read as a saved data set"):
        labels_of(str(tmp_path / "both/test"))
    (tmp_path / "both/dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=f"Name one: {tmp_path}/both/train, if there is one"):
        labels_of(str(tmp_path / "both"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="other is a directory"):
        labels_of(str(tmp_path / "other"))


def test_damaged_buffers_are_no_crash(tmp_path: Path) -> None:
    """Reading an Arrow array whose offsets point outside its buffer ends the process."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    offsets = np.arange(len(ROWS) + 1, dtype="<i4") * len(PLAIN["prompt"])
    raw = arrow.read_bytes()
    assert raw.count(offsets.tobytes()) == 1
    damaged = offsets.copy()
    damaged[7] = 2**31 - 1
    arrow.write_bytes(raw.replace(offsets.tobytes(), damaged.tobytes()))
    shutil.copy(arrow, tmp_path / "a.arrow")
    for name in ("a.arrow", "saved"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            labels_of(str(tmp_path / name))
