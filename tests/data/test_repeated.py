"""Several judgements of one answer, joined to one record."""

import pytest

from kto_lightning.data.records import Record
from kto_lightning.data.repeated import DISAGREEING, JOINED, Votes
from kto_lightning.data.rows import SkippedRow


def judged(completion: str, desirable: bool, line: int, weight: float = 1.0) -> Record:
    return Record(
        prompt="Is it raining?",
        completion=completion,
        desirable=desirable,
        weight=weight,
        file="a.jsonl",
        line=line,
    )


@pytest.mark.parametrize(
    ("drop_disagreeing", "expected"),
    [
        (False, [(1, True), "joined", "joined", (4, False), "tie", "tie", (7, True), "joined"]),
        (True, ["tie", "tie", "tie", (4, False), "tie", "tie", (7, True), "joined"]),
    ],
)
def test_judgements_of_one_answer_are_joined(drop_disagreeing: bool, expected: list) -> None:
    records = [
        *(judged("Yes.", True, 1), judged("Yes.", False, 2), judged("Yes.", True, 3)),
        judged("No.", False, 4),
        *(judged("Perhaps.", True, 5), judged("Perhaps.", False, 6)),
        *(judged("Ask.", True, 7, weight=0.5), judged("Ask.", True, 8, weight=1.0)),
    ]
    votes = Votes(drop_disagreeing=drop_disagreeing)
    for record in records:
        votes.add(record)
    for _ in range(2):  # a stream of reports reads more than once
        joined = list(votes.join(records))
        shown = [
            (item.line, item.desirable)
            if isinstance(item, Record)
            else {JOINED: "joined", DISAGREEING: "tie"}[item.why]
            for item in joined
            if isinstance(item, Record | SkippedRow)
        ]
        assert shown == expected
        assert joined[6].weight == 0.75
