"""`notebooks/kto.ipynb` is committed without outputs, and runs from top to bottom."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.cli import ROOT, rows
from tests.support.factories import chat_records, make_tokenizer, save_model, write_jsonl

NOTEBOOK = ROOT / "notebooks/kto.ipynb"
SMALL = {"EPOCHS": 2, "BATCH_SIZE": 8, "START_STEPS": 3, "NUM_GOOD": 30, "NUM_BAD": 10}
SMALL |= {"MAX_NEW_TOKENS": 4}


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(folder: Path, **settings: Any) -> NotebookNode:
    """Run the notebook in `folder`, with a cell of settings after its own; writes to `OUTPUT`."""
    notebook = read()
    cells = notebook.cells
    (place,) = (at for at, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    settings = {"OUTPUT": str(folder / "out"), **settings}
    text = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("IPYTHONDIR", str(folder / "ipython"))
        environment.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
        resources = {"metadata": {"path": str(folder / "cwd")}}
        # An error in a cell is an error here.
        NotebookClient(notebook, timeout=600, resources=resources).execute()
    return notebook


def printed(notebook: NotebookNode, name: str) -> str:
    """The standard output of a cell."""
    outputs = cell(notebook, name).outputs
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def cell(notebook: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def shown(notebook: NotebookNode, name: str, kind: str) -> list[str]:
    """The outputs of a cell of one MIME type."""
    return [o.data[kind] for o in cell(notebook, name).outputs if kind in o.get("data", {})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder: Path) -> NotebookNode:
    return execute(folder, **SMALL)


def test_it_is_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    named = nbformat.writes(notebook)
    assert not [name for name in ("/work", "/home", "/tmp", "/root") if name in named]


def test_it_trains_every_step_and_leaves_another_model(executed: NotebookNode, folder: Path):
    run = folder / "out" / "fit"
    lines = (folder / "out" / "log.jsonl").read_text().splitlines()
    stars = [json.loads(line)["stars"] for line in lines]
    assert sum(number in (4, 5) for number in stars) == 30
    assert sum(number in (1, 2) for number in stars) == 10
    assert {3, None} <= set(stars)
    table = rows(run)
    # 36 training records: two epochs of five steps with up to eight records.
    assert [int(row["step"]) for row in table] == list(range(1, 11))
    assert all(math.isfinite(float(row["train/loss"])) for row in table)
    assert [int(row["step"]) for row in table if row["val/loss"]] == [5, 10]
    before, after = (
        load_file(path / "model.safetensors") for path in (folder / "out/start", run / "model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_it_shows_data_weights_curves_and_answers(executed: NotebookNode, folder: Path):
    guide = printed(executed, "guide")
    assert "--columns.prompt chat.question" in guide
    assert "--labels.at_least 4 --labels.at_most 2" in guide
    assert "30 : 10" in printed(executed, "report")
    (weights,) = shown(executed, "weights", "text/plain")
    assert [float(number) for number in weights.split() if number[0].isdigit()] == [
        *(30, 1.0, 30.0),
        *(10, 3.0, 30.0),
    ]
    for name in ("lengths", "curves"):
        (picture,) = shown(executed, name, "image/png")
        assert len(picture) > 10_000
    (talk,) = shown(executed, "talk", "text/html")
    questions = re.findall(r'class="data row\d+ col0" >(.*?)</td>', talk, re.DOTALL)
    assert len(questions) == 8
    trained_on = (folder / "out/log.jsonl").read_text()
    assert all("\nAnswer:" in q and json.dumps(q) not in trained_on for q in questions)
    share = printed(executed, "share")
    assert "before  " in share
    assert str(folder / "out/fit/report.html") in share
    assert (folder / "out/fit/report.html").is_file()


def test_it_writes_nothing_outside_its_folder(executed: NotebookNode, folder: Path):
    assert list((folder / "cwd").iterdir()) == []
    assert {p.name for p in (folder / "out").iterdir()} == {"start", "log.jsonl", "fit"}


@pytest.mark.slow
def test_it_takes_a_file_and_a_model_of_ones_own(tmp_path: Path):
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    model = save_model(tmp_path / "model", "qwen2", tokenizer)
    data = write_jsonl(tmp_path / "data.jsonl", chat_records(40))
    settings = {"FILE": str(data), "MODEL": str(model), "EPOCHS": 1, "BATCH_SIZE": 8}
    settings |= {"QUESTIONS": ["1 < 2?", [{"role": "user", "content": "Who are you?"}]]}
    notebook = execute(tmp_path, **settings, MAX_NEW_TOKENS=4)
    (talk,) = shown(notebook, "talk", "text/html")
    assert "1 &lt; 2?" in talk
    assert "Who are you?" in talk
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"fit"}
    assert len(rows(tmp_path / "out/fit")) == 5
