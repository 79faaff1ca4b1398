"""The data report: every field by hand on small data, and known numbers of real data."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import load_records
from kto_lightning.data.labels import Labels
from kto_lightning.data.lost import LostPart, OtherEnd
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import KTOError
from kto_lightning.models.tokenizer import load_tokenizer
from kto_lightning.reports.data import (
    DataReport,
    report_of_source,
    report_of_training_set,
    summary_sentences,
    write_data_report,
)
from kto_lightning.reports.data.fields import Column, Order, PerClass, Places
from kto_lightning.reports.data.order import order_of, single_label_chance
from kto_lightning.reports.data.statistics import length_auc
from tests.support.factories import (
    EOS_ID,
    chat_records,
    make_tokenizer,
    plain_records,
    tool_records,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def record(prompt: Any, completion: Any, label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def labelled(letters: str) -> list[dict[str, Any]]:
    """A record of its own prompt for each letter, T or F."""
    return [record(f"{i}?", f"answer {i}", letter == "T") for i, letter in enumerate(letters)]


def report(tmp_path: Path, records: list[dict[str, Any]], **settings: Any) -> DataReport:
    return report_of_source(str(write_jsonl(tmp_path / "data.jsonl", records)), **settings)


def order(letters: str, batch_size: int = 2) -> Order:
    return order_of(
        np.array([letter == "T" for letter in letters], dtype=bool), batch_size=batch_size
    )


def finding(found: DataReport, beginning: str) -> str:
    return next(text for text in found.findings if beginning in text)


@dataclass
class Known:
    """Numbers counted independently of this code; lengths in characters."""

    counts: tuple[int, int]
    weights: tuple[float, float]
    longest_runs: tuple[int, int]
    single_label: tuple[float, float, float]
    """At batches of 2, 4 and 8."""
    auc: float
    mean_prompt_share: float
    prompts: int
    duplicates: int
    same_prompt: float


KNOWN = {
    "claudesidian_1000": Known(
        (746, 254), (1.0, 2.94), (40, 14), (0.84, 0.60, 0.41), 0.81, 0.07, 933, 19, 0.02
    ),
    "toolcalls_2386": Known(
        (1344, 1042), (1.0, 1.29), (304, 2), (0.13, 0.13, 0.12), 0.85, 0.30, 1619, 0, 0.00
    ),
    "kto_en_demo_300": Known(
        (150, 150), (1.0, 1.0), (8, 11), (0.55, 0.21, 0.05), 0.51, 0.45, 297, 0, 0.00
    ),
    "gsm8k_solutions_5276": Known(
        (2001, 3275), (1.64, 1.0), (14, 22), (0.70, 0.45, 0.11), 0.3645, 0.47, 1319, 8, 0.75
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_numbers_of_real_data(shared_data: Path, name: str) -> None:
    known, source = KNOWN[name], shared_data / f"{name}.jsonl"
    found = report_of_source(str(source))
    assert found.examples == sum(known.counts)
    assert found.bad_records.count == 0
    assert (found.labels.desirable, found.labels.undesirable) == known.counts
    assert found.labels.ratio == known.counts[0] / known.counts[1]
    assert (found.weights.desirable, found.weights.undesirable) == known.weights
    runs = found.order.longest_run
    assert (runs.desirable, runs.undesirable) == known.longest_runs
    lines = source.read_text(encoding="utf-8").splitlines()
    labels = np.array([json.loads(line)["label"] for line in lines])
    shares = [order_of(labels, batch_size=size).single_label_batches for size in (2, 4, 8)]
    assert shares == pytest.approx(known.single_label, abs=0.0051)
    assert found.order.single_label_batches == shares[-1]
    assert found.lengths.unit == "characters"
    assert found.lengths.auc == pytest.approx(known.auc, abs=0.0051)
    assert found.lengths.mean_prompt_share == pytest.approx(known.mean_prompt_share, abs=0.0051)
    assert found.repeats.distinct_prompts == known.prompts
    assert found.repeats.exact_duplicates.count == known.duplicates
    assert found.repeats.same_prompt_mismatches == pytest.approx(known.same_prompt, abs=0.0051)


def test_findings_on_claudesidian(shared_data: Path) -> None:
    found = report_of_source(str(shared_data / "claudesidian_1000.jsonl"))
    assert found.order.kind == "natural"
    assert found.weights.effective_desirable == 746.0
    assert found.weights.effective_undesirable == pytest.approx(746.76)
    assert "Leave both at `auto`" in finding(found, "2.94 : 1")
    assert "longer ones (median 1,432 against 628 characters)" in finding(found, "(AUC 0.81)")
    assert "41% of the batches of 8" in finding(found, "In file order")
    assert "19 records repeat an earlier one" in finding(found, "word for word")
    raw = report_of_source(str(shared_data / "claudesidian_1000_raw.jsonl"))
    assert raw.labels == found.labels
    assert Column(name="label", type="boolean", filled=1000) in raw.columns
    assert [column.filled for column in raw.columns if column.name == "context"] == [48]


def test_labels_and_weights_by_hand(tmp_path: Path) -> None:
    found = report(tmp_path, labelled("TTFTTTFT" * 5))
    assert (found.examples, found.labels.desirable, found.labels.undesirable) == (40, 30, 10)
    assert found.labels.ratio == 3.0
    assert found.labels.first == [letter == "T" for letter in ("TTFTTTFT" * 5)[:30]]
    assert (found.weights.desirable, found.weights.undesirable) == (1.0, 3.0)
    assert (found.weights.effective_desirable, found.weights.effective_undesirable) == (30, 30)
    assert "desirable_weight 1.0 and undesirable_weight 3.0" in finding(found, "3 : 1")


@pytest.mark.parametrize(
    ("letters", "kind"),
    [
        ("TF" * 20, "alternating"),
        ("TF" * 20 + "TT", "alternating"),
        ("T" * 50 + "F" * 50, "sorted"),
        ("F" * 25 + "T" * 50 + "F" * 25, "sorted"),
        ("TTFF" * 10, "natural"),
        ("TTTF" * 10, "natural"),
        ("TTTT", "one label"),
        ("F", "one label"),
        ("", "none"),
    ],
)
def test_kinds_of_order(letters: str, kind: str) -> None:
    assert order(letters).kind == kind


def test_an_order_by_hand() -> None:
    found = order("TTTFFTFFF", batch_size=4)
    assert found.longest_run == PerClass(desirable=3, undesirable=3)
    assert found.changes == 3 / 8
    assert found.changes_by_chance == 2 * 4 * 5 / (9 * 8)
    assert found.rule.startswith("38% of neighbours have different labels, 56% would by chance")
    # TTTF and FTFF; the last record is no whole batch.
    assert found.single_label_batches == 0.0
    assert order("TTTTFTTTF", batch_size=4).single_label_batches == 1 / 2
    assert order("TTT", batch_size=4).single_label_batches is None
    # Of 126 batches of four, 1 is all good and 5 are all bad.
    assert found.single_label_batches_shuffled == pytest.approx(6 / 126)
    assert order("FFFF").longest_run == PerClass(desirable=0, undesirable=4)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 130))
def test_the_chance_of_a_single_label_is_exact(good: int, bad: int, size: int) -> None:
    chance = single_label_chance(good, bad, size)
    if size > good + bad:
        assert chance is None
        return
    exact = (math.comb(good, size) + math.comb(bad, size)) / math.comb(good + bad, size)
    assert chance == pytest.approx(exact, rel=1e-9)


def test_single_label_batches_are_a_finding(tmp_path: Path) -> None:
    sorted_labels = report(tmp_path, labelled("T" * 64 + "F" * 64))
    assert "100% of the batches of 8" in finding(sorted_labels, "Keep `--data.shuffle true`")
    rare = report(tmp_path, labelled(("T" * 19 + "F") * 20))
    assert "Raise `--data.batch_size` to 32" in finding(rare, "Even shuffled")
    hopeless = report(tmp_path, labelled("T" * 9999 + "F"))
    assert "Add records of the rarer label" in finding(hopeless, "Even shuffled")
    assert not any(
        "batches of 1" in text for text in report(tmp_path, labelled("TTF"), batch_size=1).findings
    )


def test_one_label_only(tmp_path: Path) -> None:
    found = report(tmp_path, labelled("TTTT"))
    assert found.labels.ratio is None
    assert found.lengths.auc is None
    assert found.lengths.completion.undesirable is None
    assert (found.weights.desirable, found.weights.undesirable) == (1.0, 1.0)
    assert finding(found, "All 4 records are desirable: ").endswith("if there are any.")


def test_lengths_in_characters_by_hand(tmp_path: Path) -> None:
    rows = [(1, True), (2, True), (4, True), (8, False)]
    records = [record("ab", "x" * length, label) for length, label in rows]
    lengths = report(tmp_path, records).lengths
    assert lengths.completion.desirable is not None
    assert asdict(lengths.completion.desirable) == pytest.approx(
        {
            "minimum": 1,
            "q25": 1.5,
            "median": 2,
            "q75": 3,
            "q95": 3.8,
            "maximum": 4,
            "mean": 7 / 3,
        }
    )
    assert lengths.completion.undesirable is not None
    assert set(asdict(lengths.completion.undesirable).values()) == {8}
    assert lengths.prompt.desirable is not None
    assert lengths.prompt.desirable.maximum == 2
    assert lengths.prompt_share == 8 / 23
    assert lengths.mean_prompt_share == pytest.approx((2 / 3 + 2 / 4 + 2 / 6 + 2 / 10) / 4)
    assert lengths.truncation is None
    assert lengths.prompts_not_prefix is None


def test_the_auc_of_length_by_hand() -> None:
    # Pairs (good, bad): 3 > 1, 3 = 3, 5 > 1, 5 > 3: three and a half of four.
    found = length_auc(np.array([3, 1, 5, 3]), np.array([True, False, True, False]))
    assert found == 3.5 / 4
    assert length_auc(np.array([7, 7]), np.array([True, False])) == 0.5
    assert length_auc(np.array([0, 0]), np.array([True, False])) == 0.5
    assert length_auc(np.array([10**6, 10**6 + 1]), np.array([True, False])) == 0.0
    assert length_auc(np.array([1, 2]), np.array([True, True])) is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40))
def test_the_auc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    good = [length for length, desirable in rows if desirable]
    bad = [length for length, desirable in rows if not desirable]
    found = length_auc(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]))
    if not good or not bad:
        assert found is None
        return
    won = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    assert found == pytest.approx(won / (len(good) * len(bad)), abs=1e-6)


def test_length_that_predicts_the_label_is_a_finding(tmp_path: Path) -> None:
    records = [record(f"{i}?", f"{i}" * (1 + i % 2), i % 2 == 0) for i in range(10, 30)]
    text = finding(report(tmp_path, records), "Length alone predicts the label (AUC 0.00)")
    assert "desirable completions are the shorter ones (median 2 against 4 characters)" in text
    few = report(tmp_path, records[:4])
    assert few.lengths.auc == 0.0
    assert not any("Length alone" in text for text in few.findings)


def test_lengths_in_tokens_and_truncation_by_hand(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    records = [
        record("a", "b", True),  # 1 + 1 and the end-of-text token
        record("a", "!?" * 20, True),
        record("?!" * 20, "b", False),
        record("a", "!?" * 20, False, weight=2.0),
    ]
    found = report(tmp_path, records, tokenizer=tokenizer, max_length=10)
    long = len(tokenizer("!?" * 20)["input_ids"])
    assert long > 10
    lengths = found.lengths
    assert lengths.unit == "tokens"
    assert lengths.completion.desirable is not None
    assert lengths.completion.desirable.minimum == 2
    assert lengths.completion.desirable.maximum == long + 1
    assert lengths.truncation is not None
    assert lengths.truncation.truncated == PerClass(desirable=1, undesirable=1)
    assert lengths.truncation.dropped == PerClass(desirable=0, undesirable=1)
    # Over the records that are trained on: 2 good, 1 bad.
    assert (found.weights.desirable, found.weights.undesirable) == (1.0, 2.0)
    assert (found.labels.desirable, found.labels.undesirable) == (2, 2)
    assert "1 of 4 prompts fill max_length 10 alone" in finding(found, "are dropped")
    assert "(1 desirable, 1 undesirable)" in finding(found, "2 of 4 records are cut")


def test_prompts_that_are_not_a_prefix(tmp_path: Path) -> None:
    records = [record("the ", "garden"), record("the", " garden", False)]
    found = report(tmp_path, records, tokenizer=make_tokenizer())
    assert found.lengths.prompts_not_prefix == 1
    assert found.lengths.lost_prompt_end == " "
    assert "1 tokenized prompts are not the beginning" in finding(found, '(first " ")')


def test_a_template_that_cannot_render_falls_back_to_characters(tmp_path: Path) -> None:
    records = chat_records(6, system=True)
    strict = "{{ raise_exception('no system messages here') }}"
    tokenizer = make_tokenizer(chat_template=strict)
    found = report(tmp_path, records, tokenizer=tokenizer)
    assert found.lengths.unit == "characters"
    assert found.tokenizer_problem is not None
    assert "6 of 6 records cannot be turned into tokens" in found.tokenizer_problem
    assert any("Lengths are in characters" in text for text in found.findings)


def test_repeats_by_hand(tmp_path: Path) -> None:
    records = [
        record("p", "a", True),
        record("p", "a", True),  # a duplicate of line 1
        record("q", "a", True),
        record("p", "a", False),  # contradicts line 1
        record("p", "b", False),
        record("p", "a", False),  # a duplicate of line 4
        record("r", " \n", True),
    ]
    found = report(tmp_path, records, batch_size=4)
    path = str(tmp_path / "data.jsonl")
    repeats = found.repeats
    assert repeats.distinct_prompts == 3
    assert repeats.repeated_prompt_share == 5 / 7
    assert repeats.commonest_prompt_share == 5 / 7
    assert repeats.exact_duplicates == Places(count=2, first=[f"{path}:2", f"{path}:6"])
    assert repeats.contradictory_labels == Places(count=1, first=[f"{path}:1", f"{path}:4"])
    assert found.empty_completions == Places(count=1, first=[f"{path}:7"])
    # Completions rotate in p p q p and p p r: lines 1 and 2 get a p's, as does line 6.
    assert repeats.same_prompt_mismatches == 3 / 7
    assert "(data.jsonl:2, data.jsonl:6)" in finding(found, "word for word")
    assert "(data.jsonl:1, data.jsonl:4)" in finding(found, "1 completion carries both labels")
    assert "1 completion is empty" in finding(found, "(data.jsonl:7)")
    assert "holds 71% of all records" in finding(found, "One prompt")


def test_only_the_first_places_are_named(tmp_path: Path) -> None:
    found = report(tmp_path, [record("p", "a")] * 9 + [record("q", "b", False)])
    assert found.repeats.exact_duplicates.count == 8
    assert len(found.repeats.exact_duplicates.first) == 5
    assert "(data.jsonl:2, data.jsonl:3, …)" in finding(found, "word for word")


def test_prompts_differ_by_their_tools_too(tmp_path: Path) -> None:
    prompt, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f"}}
    records = [record(prompt, answer), record(prompt, answer, tools=[tool]), record(prompt, answer)]
    found = report(tmp_path, records)
    assert found.repeats.distinct_prompts == 2
    assert found.repeats.exact_duplicates.count == 1


def test_pair_ordered_data_is_a_finding(tmp_path: Path) -> None:
    records = [record(f"{i // 4}?", f"answer {i}", i % 2 == 0) for i in range(32)]
    found = report(tmp_path, records)
    assert found.repeats.same_prompt_mismatches == 0.75
    assert "75% of the mismatched completions" in finding(found, "distinct_prompts")
    assert report(tmp_path, records, batch_size=1).repeats.same_prompt_mismatches is None
    single = report(tmp_path, [record("p", f"{i}", i % 2 == 0) for i in range(4)])
    assert "apo_zero_unpaired" in finding(single, "All records share one prompt")


def test_formats_by_hand(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "q"}, {"role": "developer", "content": "be brief"}
    said, called = tool_records(2)[1]["completion"], tool_records(2)[0]["completion"]
    records = [
        record([system, user], said),
        record([user, said[0], user, said[0], user], called, tools=tool_records(1)[0]["tools"]),
        record("plain", "text", False),
        record("plain", "again", False),
    ]
    form = report(tmp_path, records).format
    assert form.kind == "mixed"
    assert (form.user_turns, form.most_user_turns) == (2.0, 3)
    assert (form.system_share, form.tools_share, form.tool_call_share) == (0.25, 0.25, 0.25)
    assert report(tmp_path, records[:2]).format.kind == "chat"
    plain = report(tmp_path, records[2:]).format
    assert (plain.kind, plain.user_turns, plain.most_user_turns) == ("plain", None, None)


def test_a_tool_call_is_not_an_empty_completion(tmp_path: Path) -> None:
    found = report(tmp_path, tool_records(4))
    assert found.empty_completions.count == 0
    assert found.format.tool_call_share == 0.5
    assert found.lengths.completion.desirable is None or (
        found.lengths.completion.desirable.minimum > 0
    )
    nothing = [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]
    user = [{"role": "user", "content": "q"}]
    assert report(tmp_path, [record(user, nothing)]).empty_completions.count == 1


def test_columns_of_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "x": 1}]
    records = [
        {"messages": messages, "label": 1, "score": 0.5, "note": None},
        {"messages": messages[:2], "label": "true", "extra": {"id": 7}, "tags": ["a", 1, [2]]},
        {"messages": messages, "label": False, "tags": []},
    ]
    assert report(tmp_path, records).columns == [
        Column(name="messages", type="list of objects (role, content, x)", filled=3),
        Column(name="label", type="number | string | boolean", filled=3),
        Column(name="score", type="number", filled=1),
        Column(name="note", type="", filled=0),
        Column(name="extra", type="object (id)", filled=1),
        Column(name="tags", type="list of strings or numbers or lists | empty list", filled=2),
    ]


def test_columns_of_tables(tmp_path: Path) -> None:
    rows = [record(f"{i}?", "a", i > 0, source=None if i else "here") for i in range(3)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    columns = report_of_source(str(path)).columns
    assert [(column.name, column.type, column.filled) for column in columns] == [
        ("prompt", "string", 3),
        ("completion", "string", 3),
        ("label", "bool", 3),
        ("source", "string", 1),
    ]
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,label,weight\nq,a,1,\nr,,0,2\n", encoding="utf-8")
    found = report_of_source(str(path))
    assert [column.filled for column in found.columns] == [2, 2, 2, 1]
    assert found.empty_completions.first == [f"{path}:3"]


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_bad_records_are_reported_and_not_fatal(tmp_path: Path, with_tokenizer: bool) -> None:
    rows = [row | {"label": None} if i % 2 else row for i, row in enumerate(plain_records(16))]
    tokenizer = make_tokenizer() if with_tokenizer else None
    found = report(tmp_path, rows, tokenizer=tokenizer)
    assert found.examples == 8
    assert found.bad_records.count == 8
    assert len(found.bad_records.first) == 5
    assert found.bad_records.first[0] == (
        f"{tmp_path / 'data.jsonl'}:2: 'label' must be true or false, got null. "
        "Drop the line or give it a label; --data.unlabeled skip leaves such lines out."
    )
    assert found.lengths.unit == ("tokens" if with_tokenizer else "characters")
    assert "8 records cannot be used and would stop `fit`" in found.findings[0]


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    found = report(tmp_path, [{"prompt": "q"}], tokenizer=make_tokenizer())
    assert (found.examples, found.format.kind, found.order.kind) == (0, "none", "none")
    assert found.order.single_label_batches is None
    assert found.findings[0].startswith("There is no usable record")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [record("q", "a")])
    found = report_of_source([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert found.examples == 2
    assert found.repeats.exact_duplicates.first == [f"{tmp_path / 'b.jsonl'}:1"]


@pytest.mark.parametrize("template", [None, "qwen2_5"])
def test_a_training_set_has_the_report_of_its_file(tmp_path: Path, template: str | None) -> None:
    rows = plain_records(40) if template is None else tool_records(40)
    tokenizer = make_tokenizer(chat_template=template)
    source = str(write_jsonl(tmp_path / "data.jsonl", rows))
    records = load_records(source)
    examples = tokenize_records(records, tokenizer, max_length=1024)
    found = report_of_training_set(
        source,
        records,
        examples,
        batch_size=8,
        max_length=1024,
        tokenizer=tokenizer.name_or_path,
        other_end=examples.other_end({EOS_ID}, tokenizer),
    )
    assert found == report_of_source(source, tokenizer=tokenizer)
    path = tmp_path / "data_report.json"
    write_data_report(path, found)
    assert json.loads(path.read_text(encoding="utf-8")) == found.to_dict()
    with pytest.raises(KTOError, match="cannot be written"):
        write_data_report(tmp_path, found)


def test_how_the_rows_were_read_and_what_was_left_out(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "a": f"{i}!", "stars": (5, 1, 3, None)[i % 4]} for i in range(12)]
    source = str(write_jsonl(tmp_path / "data.jsonl", rows))
    settings = RecordSettings(
        columns=Columns(prompt="q", completion="a", label="stars"),
        labels=Labels(at_least=4.0, at_most=2.0),
        unlabeled="skip",
    )
    tokenizer = make_tokenizer()
    records = load_records(source, settings)
    examples = tokenize_records(records, tokenizer, max_length=1024)
    trained = report_of_training_set(source, records, examples, batch_size=8, max_length=1024)
    for found in (report_of_source(source, settings, tokenizer=tokenizer), trained):
        assert found.examples == 6
        assert found.left_out == {"judged neither good nor bad": 3, "without a judgement": 3}
        assert found.read_as == [
            "read as: prompt <- q, completion <- a, label <- stars",
            "labels: at least 4 good; at most 2 bad",
        ]
    content = trained.to_dict()
    assert DataReport.from_dict(content) == trained
    for name in ("left_out", "read_as", "cut_answers", "guide", "tried", "chat_advised"):
        del content[name]  # as in reports of earlier versions
    assert DataReport.from_dict(content).left_out == {}
    with pytest.raises(ValueError, match="no data report of this version"):
        DataReport.from_dict(content | {"left_out": {"a": "b"}})


def test_a_training_set_with_dropped_records(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "data.jsonl", plain_records(60)))
    records = load_records(source)
    tokenizer = make_tokenizer()
    examples = tokenize_records(records, tokenizer, max_length=40)
    found = report_of_training_set(source, records, examples, batch_size=8, max_length=40)
    whole = report_of_source(source, tokenizer=tokenizer, max_length=40)
    assert found.examples == 60
    assert found.lengths.truncation == whole.lengths.truncation
    assert found.weights == whole.weights
    assert found.lengths.truncation is not None
    dropped = found.lengths.truncation.dropped
    assert dropped.desirable > 0
    assert dropped.undesirable > 0
    assert len(examples) == 60 - dropped.desirable - dropped.undesirable
    unlimited = tokenize_records(records, tokenizer, max_length=None)
    found = report_of_training_set(source, records, unlimited, batch_size=8, max_length=None)
    assert found.lengths.truncation is None


def test_messages_after_the_answer_are_a_finding(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "So."} for role in ("user", "assistant", "user")]
    rows = [{"messages": turns[:2], "label": True}, {"messages": turns, "label": False}]
    found = report(tmp_path, rows)
    assert found.messages_left == Places(count=1, first=[f"{tmp_path / 'data.jsonl'}:2"])
    assert "what follows it is not used" in finding(found, "1 conversation goes on after")
    assert [text for text in summary_sentences(found) if "1 conversation goes on" in text]
    assert not [text for text in report(tmp_path, rows[:1]).findings if "goes on" in text]


def test_prompts_cut_from_answers_are_a_finding(tmp_path: Path) -> None:
    pairs = [{"chosen": "It is wet.", "rejected": "It is dry."}]
    pairs += [{"prompt": "Rain?", "chosen": "It is.", "rejected": "It is not."}]
    found = report(tmp_path, pairs)
    place = f"{tmp_path / 'data.jsonl'}:1"
    assert found.guessed_prompts == Places(count=1, first=[place])
    assert "column `prompt`" in finding(found, "1 pair has no prompt")
    assert not [text for text in report(tmp_path, pairs[1:]).findings if "no prompt" in text]


def test_what_a_template_drops_is_a_finding(tmp_path: Path) -> None:
    rows = chat_records(6)
    for row in rows[2:]:
        content = row["completion"][0]["content"]
        row["completion"][0]["content"] = f"<think>\nweigh the apples\n</think>\n\n{content}"
    tokenizer = make_tokenizer(chat_template="deepseek_r1_distill", bos=True)
    found = report(tmp_path, rows, tokenizer=tokenizer)
    first = f"{tmp_path / 'data.jsonl'}:3"
    assert found.lost_parts == [LostPart(name="reasoning of completion", count=4, first=first)]
    assert finding(found, "The chat template drops").startswith(
        f"The chat template drops the reasoning of 4 completions, first at {first}: the model is "
        "trained without them."
    )
    assert DataReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    whole = report(tmp_path, rows, tokenizer=make_tokenizer(chat_template="qwen3"))
    assert whole.lost_parts == []
    assert report(tmp_path, rows).lost_parts is None


def test_completions_that_end_at_no_end_token_are_a_finding(tmp_path: Path) -> None:
    rows = chat_records(4)
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    found = report(tmp_path, rows, tokenizer=tokenizer)
    first = f"{tmp_path / 'data.jsonl'}:1"
    assert found.other_end == OtherEnd(
        token="<|im_end|>", end_tokens=["<|endoftext|>"], count=4, first=first
    )
    assert "4 completions end with '<|im_end|>', at which the model" in finding(found, "4 compl")
    directory = tmp_path / "model"
    tokenizer.save_pretrained(directory)
    ids = [EOS_ID, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert report(tmp_path, rows, tokenizer=load_tokenizer(str(directory))).other_end is None
    tokenizer.eos_token = "<|im_end|>"  # which the template follows with a line break
    assert report(tmp_path, rows, tokenizer=tokenizer).other_end is None


def _answer(characters: int, mark: str, start: str) -> dict[str, Any]:
    """A record whose completion has so many characters before the mark."""
    return record(f"{start}?", start + "x" * (characters - len(start)) + mark)


@pytest.mark.parametrize(
    ("lengths", "mark", "cut_at"),
    [
        ([500, 500, 120], "...", 500),
        ([500, 20], "...", 500),
        ([200, 200, 200], "…", 200),
        ([200, 200], "...", None),
        ([500, 510], "...", None),
        ([20, 20, 20], "...", None),
        ([200, 200, 200], "!", None),
        ([300, 200, 200, 200], "...", None),
    ],
)
def test_answers_that_an_export_has_cut(
    tmp_path: Path, lengths: list[int], mark: str, cut_at: int | None
) -> None:
    records = [_answer(length, mark, f"answer {i} ") for i, length in enumerate(lengths)]
    found = report(tmp_path, [*records, *labelled("TFTF")])
    assert (found.cut_answers and found.cut_answers.characters) == cut_at
    said = [text for text in found.findings if "by the export" in text]
    assert len(said) == (cut_at is not None)
    assert [text for text in summary_sentences(found) if "by the export" in text] == said
    if cut_at is not None:
        count = lengths.count(cut_at)
        answers = "1 answer is" if count == 1 else f"{count} answers are"
        assert said[0].startswith(f"{answers} cut at {cut_at} characters by the export")
        assert "data.jsonl:1" in said[0]
        assert DataReport.from_dict(found.to_dict()) == found


def test_one_answer_to_many_prompts_is_not_taken_for_a_cut(tmp_path: Path) -> None:
    text = "I am sorry, but I cannot " * 10 + "..."
    found = report(tmp_path, [record(f"{i}?", text) for i in range(5)])
    assert found.cut_answers is None
