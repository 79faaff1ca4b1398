"""`inspect` on files that cannot be read as they stand: what it shows, proposes and takes."""

import html
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from kto_lightning.cli.inspect import main
from kto_lightning.cli.record_options import OPTIONS
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.reports.data import DataReport
from tests.support.factories import make_tokenizer, write_jsonl

RATINGS = (5, 1, 3, 4, 2, 1)
RATED = [
    {
        "id": f"r{index}",
        "data": {"question": f"What is {index} plus 1?", "answer": f"It is {index + 1}."},
        "review": {"stars": rating, "by": "ann"},
    }
    for index, rating in enumerate(RATINGS)
]
FLAGS = [
    *("--columns.prompt", "data.question", "--columns.completion", "data.answer"),
    *("--columns.label", "review.stars", "--labels.at_least", "4", "--labels.at_most", "2"),
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rated(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "rated data.jsonl", RATED)
    return "rated data.jsonl"


def commands_in(text: str) -> list[list[str]]:
    """The commands that a text shows, as a shell reads them, after the name of the program."""
    joined = re.sub(r" \\\n +", " ", text)
    found = re.findall(r"^ +python -m kto_lightning (.*)$", joined, flags=re.MULTILINE)
    return [shlex.split(command) for command in found]


def test_columns_and_commands_to_copy(rated: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([rated]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {rated}: no usable record. See what is said above.\n"
    guide = printed.out.partition("The columns, by the first 6 rows:\n")[2]
    assert guide.splitlines()[:5] == [
        '  id             string  "r0"',
        '  data.question  string  "What is 0 plus 1?"',
        '  data.answer    string  "It is 1."',
        "  review.stars   number  1 (2), 5 (1), 3 (1), 4 (1), 2 (1)",
        '  review.by      string  "ann" (6)',
    ]
    assert all(len(line) <= 80 for line in guide.splitlines())
    (look, train) = commands_in(guide)
    assert look == ["inspect", rated, *FLAGS, "--try"]
    with_data = [re.sub("^--", "--data.", part) for part in FLAGS]
    assert train == ["fit", "--model.policy", "MODEL", "--data.train", rated, *with_data]
    assert "Labels\n" not in printed.out  # nothing but the file's columns can be said
    assert main(look[1:]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "desirable : undesirable 2 : 3" in shown
    assert "left out 1 judged neither good nor bad" in shown
    assert "read as: prompt <- data.question, completion <- data.answer" in shown
    assert f"{rated}:1: desirable prompt | What is 0 plus 1? completion | It is 1." in shown
    assert f"{rated}:2: undesirable" in shown
    assert f"{rated}:4: desirable" in shown
    assert f"{rated}:5" not in shown


def test_the_same_as_json(rated: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([rated, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    guide = content["guide"]
    assert guide["flags"] == [
        "--columns.prompt data.question",
        "--columns.completion data.answer",
        "--columns.label review.stars",
        "--labels.at_least 4",
        "--labels.at_most 2",
    ]
    assert guide["fit_flags"][0] == "--data.columns.prompt data.question"
    columns = {column["path"]: column for column in guide["columns"]}
    assert columns["review.stars"]["values"] == {"1": 2, "5": 1, "3": 1, "4": 1, "2": 1}
    assert columns["data.answer"]["values"] is None
    assert DataReport.from_dict(content).to_dict() == content


def test_a_page_has_it_too(rated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([rated, "--html", str(tmp_path / "page.html")]) == 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    listing = page.partition('<pre class="details">')[2].partition("</pre>")[0]
    look, train = commands_in(html.unescape(listing))
    assert look[1:-1] == [rated, *FLAGS]
    assert train[0] == "fit"
    assert "review.stars" in page


@pytest.mark.parametrize(
    "arguments",
    [
        FLAGS,
        [re.sub("^--", "--data.", part) for part in FLAGS],
        [
            "--columns",
            "{prompt: data.question, completion: data.answer, label: review.stars}",
            *("--data.labels", "{at_least: 4, at_most: 2}"),
        ],
        [*FLAGS[:6], "--labels.good", "[4, 5]", "--labels.bad", "[1, 2]", "--labels.neither=3"],
        ["--config", "fit.yaml", *FLAGS[6:]],
        ["--config", "fit.yaml", "--labels.at_least", "4", "--data.labels.at_most=2"],
    ],
)
def test_settings_as_fit_takes_them(
    rated: str, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "fit.yaml").write_text(
        "model: {policy: x}\n"
        "data:\n"
        "  train: other.jsonl\n"
        "  columns: {prompt: data.question, completion: data.answer, label: review.stars}\n"
    )
    assert main([rated, "--json", *arguments]) == 0, capsys.readouterr().err
    content = json.loads(capsys.readouterr().out)
    assert (content["labels"]["desirable"], content["labels"]["undesirable"]) == (2, 3)
    assert content["left_out"] == {"judged neither good nor bad": 1}
    assert content["guide"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unlabeled", "drop"], "--data.unlabeled must be error or skip, got drop."),
        (["--labels.at_least", "good"], "--data.labels.at_least must be a number or null"),
        (["--chat", "perhaps"], "--data.chat must be true or false, got perhaps."),
        (["--format", "nothing"], "--format must be one of records,"),
        (["--repeated", "x"], "--data.repeated must be keep, majority or drop_disagreeing"),
        (
            ["--labels.at_least", "1", "--labels.at_most", "3"],
            "--labels.at_most 3 must be below --labels.at_least 1",
        ),
        (
            ["--columns.prompt", "data.questions"],
            "--columns.prompt data.questions: no record of rated data.jsonl has it. The nearest is "
            "data.question.",
        ),
        (["--columns.prompts", "x"], "unrecognized arguments: --columns.prompts"),
        (["--config", "missing.yaml"], "--config missing.yaml cannot be read"),
        (["--config", "rated data.jsonl"], "--config rated data.jsonl is not valid YAML"),
        (["--config", "model.yaml"], "--config model.yaml has no settings of `data`"),
    ],
)
def test_wrong_settings_are_usage_errors(
    rated: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.yaml").write_text("model: {policy: x}\n")
    assert main([rated, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"traceId": f"t{i}", "name": "user-feedback", "value": i % 2} for i in range(6)]
    write_jsonl(tmp_path / "scores.jsonl", rows)
    assert main(["scores.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "See below what is missing." in " ".join(out.split())
    assert "What is missing:\n  These are scores without the texts they judge" in out
    assert not commands_in(out)


def test_options_for_rows_without_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"{i}?", "completion": "a", "label": (True, False, None)[i % 3]}
        for i in range(9)
    ]
    write_jsonl(tmp_path / "log.jsonl", rows)
    assert main(["log.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "Give the options shown below, or fix or drop these records" in " ".join(out.split())
    assert commands_in(out)[0] == ["inspect", "log.jsonl", "--unlabeled", "skip", "--try"]
    assert main(["log.jsonl", "--unlabeled", "skip"]) == 0
    out = capsys.readouterr().out
    assert "3 without a judgement" in out
    assert not commands_in(out)


def test_a_broken_line_among_many_is_no_reason_for_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [{"prompt": f"{i}?", "completion": "a", "label": i % 2} for i in range(50)]
    write_jsonl(tmp_path / "data.jsonl", [*rows, {"prompt": "?", "completion": 3, "label": 1}])
    assert main(["data.jsonl"]) == 0
    assert not commands_in(capsys.readouterr().out)


def save_tokenizer(directory: Path, template: str | None = TEMPLATE) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(directory))
    return str(directory)


def test_records_as_they_would_be_trained(
    rated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    arguments = [rated, *FLAGS, "--try", "--data.tokenizer", tokenizer, "--data.max_length", "99"]
    assert main([*arguments, "--chat", "true"]) == 0
    shown = capsys.readouterr().out.partition("The first 3 as they would be trained:\n\n")[2]
    assert shown.splitlines()[:5] == [
        f"{rated}:1: desirable",
        "  prompt     | <|user|>What is 0 plus 1?",
        "             | <|assistant|>",
        "  completion | It is 1.",
        "             |",
    ]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["tried"]) == 3
    assert content["lengths"]["truncation"]["max_length"] == 99
    first = content["tried"][0]
    assert (first["place"], first["desirable"], first["rendered"]) == (f"{rated}:1", True, True)
    assert first["prompt"] == "What is 0 plus 1?"
    assert first["completion"].startswith("It is 1.<")  # the end-of-text token
    assert DataReport.from_dict(content).to_dict() == content


def test_spaces_at_the_border_can_be_seen_and_long_texts_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "2 + 2 = ", "completion": " 4\x1b[2J" + "x" * 9000, "label": i} for i in (1, 0)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    assert main(["data.jsonl", "--try"]) == 0
    out = capsys.readouterr().out
    assert "prompt     | 2 + 2 =␣" in out
    assert "completion | ␣4\\x1b[2Jxxx" in out
    assert "characters are not shown" in out
    assert len(out) < 6000


def test_a_record_that_the_template_cannot_render(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "data.jsonl", [{"messages": messages, "label": i} for i in (1, 0)])
    tokenizer = save_tokenizer(tmp_path / "tokenizer", "{{ raise_exception('no such role') }}")
    assert main(["data.jsonl", "--try", "--tokenizer", tokenizer]) == 0
    out = capsys.readouterr().out
    assert "cannot be rendered by the tokenizer" in out
    assert "no such role" in out
    assert "prompt     | user: a" in out


def test_the_chat_template_is_recommended_for_questions_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    turns = [{"prompt": f"{i}?", "completion": f"{i}!", "label": i % 2} for i in range(6)]
    texts = [row | {"completion": f" {row['completion']}"} for row in turns]

    def recommended(rows: list[dict[str, Any]], *arguments: str) -> bool:
        write_jsonl(tmp_path / "data.jsonl", rows)
        assert main(["data.jsonl", *arguments]) == 0
        return "Give `--data.chat true`" in " ".join(capsys.readouterr().out.split())

    assert recommended(turns, "--tokenizer", tokenizer)
    assert not recommended(turns, "--tokenizer", tokenizer, "--chat", "true")
    assert not recommended(turns)
    assert not recommended(texts, "--tokenizer", tokenizer)
    bare = save_tokenizer(tmp_path / "bare", None)
    assert not recommended(turns, "--tokenizer", bare)


def test_every_setting_of_records_is_an_option() -> None:
    expected: list[str] = []
    hints = get_type_hints(RecordSettings)
    for field in fields(RecordSettings):
        expected.append(field.name)
        for group in filter(is_dataclass, get_args(hints[field.name])):
            expected += [f"{field.name}.{inner.name}" for inner in fields(group)]
    assert sorted(OPTIONS) == sorted(expected)
