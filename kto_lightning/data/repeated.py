"""Records that judge the same answer to the same prompt more than once, joined to one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

from kto_lightning.data.records import Record, record_to_json
from kto_lightning.data.rows import BadRecord, SkippedRow

JOINED = "judged again, and joined with the first judgement"
DISAGREEING = "judged good and bad by as many, or by judges that disagree"


@dataclass(slots=True)
class _Tally:
    """The judgements of one answer: their number and the sum of their weights, by side."""

    good: int = 0
    bad: int = 0
    good_weight: float = 0.0
    bad_weight: float = 0.0
    first_is_read: bool = False


class Votes:
    """The judgements of all records, by prompt and completion.

    Memory: some 200 bytes for each different answer; texts are not kept, but 128 bits of their
    BLAKE2b.

    Args:
        drop_disagreeing: whether an answer is left out unless all its judgements agree; otherwise
            most of them decide, and only a tie is left out.
    """

    def __init__(self, *, drop_disagreeing: bool) -> None:
        self._drop_disagreeing = drop_disagreeing
        self._tallies: dict[bytes, _Tally] = {}

    def add(self, record: Record) -> None:
        """Count the judgement of a record."""
        tally = self._tallies.setdefault(_key(record), _Tally())
        if record.desirable:
            tally.good += 1
            tally.good_weight += record.weight
        else:
            tally.bad += 1
            tally.bad_weight += record.weight

    def join(
        self, records: Iterable[Record | BadRecord | SkippedRow]
    ) -> Iterator[Record | BadRecord | SkippedRow]:
        """The records with one for each answer, in the place of its first.

        Its weight is the mean weight of the judgements that agree with its label.
        """
        for tally in self._tallies.values():
            tally.first_is_read = False
        for record in records:
            if not isinstance(record, Record):
                yield record
                continue
            tally = self._tallies[_key(record)]
            disagree = tally.good == tally.bad or (
                self._drop_disagreeing and tally.good > 0 and tally.bad > 0
            )
            if disagree or tally.first_is_read:
                why = DISAGREEING if disagree else JOINED
                yield SkippedRow(file=record.file, line=record.line, why=why)
                continue
            tally.first_is_read = True
            if tally.good > tally.bad:
                yield replace(record, desirable=True, weight=tally.good_weight / tally.good)
            else:
                yield replace(record, desirable=False, weight=tally.bad_weight / tally.bad)


def _key(record: Record) -> bytes:
    return blake2b(record_to_json(record).encode(), digest_size=16).digest()
