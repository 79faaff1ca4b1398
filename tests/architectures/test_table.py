"""The page on models says of each family what the sweep expects."""

from tests.architectures.outcomes import expected, versions
from tests.architectures.table import PAGE, WIDELY_USED, facts, rows_of, with_table

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_says_what_is_expected() -> None:
    found = {models: facts(expected()[family]) for models, family in WIDELY_USED.items()}
    assert rows_of(TEXT) == found, "Run `python -m tests.architectures.table`."
    assert all(f"{name} {number}" in TEXT for name, number in versions().items())


def test_a_table_is_replaced_by_another() -> None:
    rows = rows_of(TEXT)
    lines = [
        "| models | class |",
        "| --- | --- |",
        "| Mamba | `A` | packed | 1.00 | 1.00 | because | tower |",
    ]
    page = with_table(TEXT, lines)
    assert rows_of(page) == {"Mamba": ["`A`", "packed", "because", "tower"]}
    assert rows_of(with_table(page, lines)) == rows_of(page) != rows
