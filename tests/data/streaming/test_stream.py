"""Streams: buffers, partners, ranks, resuming, errors of the source."""

import gc
import json
import weakref
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.loader import Batching, ExecutionContext
from kto_lightning.batches.types import StepBatch
from kto_lightning.data.streaming.buffers import StreamedExample, cut_into_buffers
from kto_lightning.data.streaming.sampler import StreamedBatches, StreamSampler
from kto_lightning.data.streaming.stream import ExampleStream, StreamPosition, open_stream
from kto_lightning.errors import DataError
from tests.support.factories import EOS_ID, chat_records, make_tokenizer, plain_records, write_jsonl

TOKENIZER = make_tokenizer()
WEIGHTS = ClassWeights(desirable=1.0, undesirable=2.0)


def example(index: int) -> StreamedExample:
    return StreamedExample(
        index=index,
        prompt_ids=np.array([index], dtype=np.int32),
        completion_ids=np.array([index, index], dtype=np.int32),
        desirable=index % 2 == 0,
        weight=1.0,
        prompt_key=index,
        location=f"file:{index + 1}",
        checksum=0,
    )


@pytest.mark.parametrize(
    ("num_examples", "sizes"),
    [(0, []), (1, [1]), (3, [3]), (4, [4]), (7, [7]), (8, [4, 4]), (9, [4, 5]), (16, [4] * 4)],
)
def test_the_last_buffer_takes_what_is_left(num_examples: int, sizes: list[int]):
    buffers = list(cut_into_buffers(map(example, range(num_examples)), 4))
    assert [len(buffer.examples) for buffer in buffers] == sizes
    assert [buffer.number for buffer in buffers] == list(range(len(sizes)))
    assert [buffer.is_last for buffer in buffers] == [False] * (len(sizes) - 1) + [True] * bool(
        sizes
    )
    indices = [
        e.index
        for buffer in buffers
        for e in map(buffer.examples.__getitem__, range(len(buffer.examples)))
    ]
    assert indices == list(range(num_examples))


def stream_of(path: Path, *, buffer_size: int = 8, **settings: Any) -> ExampleStream:
    return ExampleStream(
        source=str(path),
        tokenizer=settings.get("tokenizer", TOKENIZER),
        max_length=settings.get("max_length", 128),
        truncation=settings.get("truncation", "keep_start"),
        buffer_size=buffer_size,
        warn=settings.get("warn", print),
        end_ids=settings.get("end_ids", {EOS_ID}),
        check_id=settings.get("check_id", lambda *_: None),
    )


def sampler_of(
    stream: ExampleStream, *, rank: int = 0, world_size: int = 1, max_tokens: int = 16384
) -> StreamSampler:
    return StreamSampler(
        stream=stream,
        batching=Batching(
            batch_size=4,
            max_tokens=max_tokens,
            max_length=stream.max_length,
            shuffle=True,
            pairing="distinct_prompts",
            pairing_seed=0,
            num_workers=0,
        ),
        context=ExecutionContext(
            rank=rank, world_size=world_size, shares_prompts=True, with_keys=True
        ),
        needs_partners=True,
        seed=0,
    )


def batches_of(sampler: StreamSampler) -> Iterator[StepBatch]:
    made = StreamedBatches(batching=sampler.batching, weights=WEIGHTS, context=sampler.context)
    return (made[step] for step in sampler)


def seen(batches: Iterator[StepBatch]) -> list[list[int]]:
    return [
        sorted(i for part in batch.micro_batches if not part.is_filler[0] for i in part.indices)
        for batch in batches
    ]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", plain_records(37))


def test_an_epoch_sees_every_example_once_and_its_buffer_before_the_next(train: Path):
    sampler = sampler_of(stream_of(train))
    steps = seen(batches_of(sampler))
    assert [len(step) for step in steps] == [4] * 9 + [1]
    assert sorted(chain(*steps)) == list(range(37))
    for first in range(0, 24, 8):
        buffer = steps[first // 4] + steps[first // 4 + 1]
        assert sorted(buffer) == list(range(first, first + 8))
    sampler.set_epoch(1)
    again = seen(batches_of(sampler))
    assert again != steps
    assert sorted(chain(*again)) == list(range(37))


def test_partners_answer_another_prompt_and_stay_the_same(train: Path):
    """(x, y') recurs in every epoch: their keys are those of the first."""
    sampler = sampler_of(stream_of(train))

    def keys() -> set[tuple[int, bytes]]:
        pairs: set[tuple[int, bytes]] = set()
        for batch in batches_of(sampler):
            (part,) = batch.micro_batches
            assert part.mismatched_keys is not None
            assert part.matched_keys is not None
            assert not set(part.mismatched_keys) & set(part.matched_keys)
            pairs |= set(zip(part.indices, part.mismatched_keys, strict=True))
        return pairs

    first = keys()
    assert len(first) == 37
    sampler.set_epoch(1)
    assert keys() == first


def test_ranks_divide_the_steps_of_one_rank(train: Path):
    one = seen(batches_of(sampler_of(stream_of(train))))
    ranks = [
        seen(batches_of(sampler_of(stream_of(train), rank=rank, world_size=2, max_tokens=64)))
        for rank in range(2)
    ]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == one
    assert all(all(steps[:9]) for steps in ranks)


def test_a_position_resumes_the_rest_of_the_epoch(train: Path):
    whole = seen(batches_of(sampler_of(stream_of(train))))
    for done in range(1, len(whole)):
        sampler = sampler_of(stream_of(train))
        batches = batches_of(sampler)
        for _ in range(done):
            next(batches)
        state = sampler.state_dict(num_steps_done=done, ends_epoch=False)
        other = sampler_of(stream_of(train))
        other.load_state(json.loads(json.dumps(state)))
        assert seen(batches_of(other)) == whole[done:]
    last = sampler_of(stream_of(train))
    list(last)
    assert last.position_after(len(whole), ends_epoch=False) == StreamPosition(epoch=1)
    assert last.position_after(3, ends_epoch=True) == StreamPosition(epoch=1)


def test_what_is_skipped_is_not_tokenized(train: Path, monkeypatch: pytest.MonkeyPatch):
    place = StreamPosition()
    for held in cut_into_buffers(stream_of(train).examples(place), 8):
        if held.number == 3:
            first = held.examples[0]
            place = StreamPosition(buffer=3, step=6, records=first.index, checksum=first.checksum)
    num_tokenized = 0
    call = PreTrainedTokenizerFast.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_tokenized
        num_tokenized += 1 if isinstance(args[0], str) else len(args[0])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    rest = list(stream_of(train).examples(place))
    assert [e.index for e in rest] == list(range(24, 37))
    assert 13 < num_tokenized <= 2 * 13


def test_no_more_than_two_buffers_are_alive(tmp_path: Path):
    train = write_jsonl(tmp_path / "train.jsonl", plain_records(1000))
    made: list[weakref.ref[StreamedExample]] = []

    class Counted(StreamedExample):
        __slots__ = ("__weakref__",)

    def counted(stream: ExampleStream) -> Iterator[StreamedExample]:
        for e in stream.examples(StreamPosition()):
            fields = {name: getattr(e, name) for name in StreamedExample.__slots__}
            copy = Counted(**fields)
            made.append(weakref.ref(copy))
            yield copy

    alive = []
    stream = stream_of(train)
    gc.freeze()  # else every collection walks through all that other tests have imported
    for _ in cut_into_buffers(counted(stream), 16):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
    gc.unfreeze()
    assert len(alive) == 62
    # The one that was given out before is still named by the loop while the next is made.
    assert max(alive) <= 3 * 16


def test_lengths_and_drops_are_those_of_a_data_set(train: Path):
    longest = 12
    start = list(stream_of(train, max_length=longest).examples(StreamPosition()))
    assert 0 < len(start) < 37
    assert all(len(e.prompt_ids) < longest for e in start)
    stream = stream_of(train, max_length=longest, truncation="keep_end")
    end = list(stream.examples(StreamPosition()))
    assert len(end) == 37
    assert all(len(e.prompt_ids) + min(len(e.completion_ids), longest - 1) <= longest for e in end)
    assert stream.counts.dropped == 0
    assert stream.counts.desirable + stream.counts.undesirable == 37


def test_opening_a_stream_reads_its_first_example(tmp_path: Path):
    said: list[str] = []

    def opened(source: Any) -> ExampleStream:
        return open_stream(
            str(source),
            TOKENIZER,
            max_length=64,
            truncation="keep_start",
            buffer_size=10,
            batch_size=4,
            warn=said.append,
            end_ids={EOS_ID},
            check_id=lambda *_: None,
        )

    with pytest.raises(DataError, match="there is no file"):
        opened(tmp_path / "missing.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty, 0 bytes"):
        opened(empty)
    data = tmp_path / "train.jsonl"
    data.write_text("{bad\n" + "".join(json.dumps(r) + "\n" for r in plain_records(3)))
    stream = opened(data)
    assert not said
    assert stream.buffer_size == 12
    assert len(list(stream.examples(StreamPosition()))) == 3
    assert len(said) == 1


def test_a_hub_data_set_is_read_while_it_is_downloaded(monkeypatch: pytest.MonkeyPatch):
    fetched: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(plain_records(200)):
            fetched.append(number)
            yield record | {"id": number}

    def load(name: str, *, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/feedback", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = stream_of(Path("owner/feedback"), max_length=None)
    examples = stream.examples(StreamPosition())
    assert next(examples).location == "owner/feedback:1"
    assert len(fetched) < 200
    assert len(list(examples)) == 199


def test_a_hub_data_set_that_breaks_off_is_named(monkeypatch: pytest.MonkeyPatch):
    def rows() -> Iterator[dict[str, Any]]:
        yield from plain_records(80)
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: datasets.IterableDataset.from_generator(rows),
    )
    with pytest.raises(DataError, match="the line is dead"):
        list(stream_of(Path("owner/feedback")).examples(StreamPosition()))


def test_the_sampler_locates_its_examples(train: Path):
    sampler = sampler_of(stream_of(train))
    batch = next(batches_of(sampler))
    index = batch.micro_batches[0].indices[0]
    assert sampler.location(index) == f"{train}:{index + 1}"
    assert sampler.location(36) == "record 36 of the stream"


def test_what_a_stream_loses_is_said_once_and_counted(tmp_path: Path):
    rows = chat_records(6)
    for row in rows:
        row["completion"][0]["reasoning_content"] = "first weigh the apples"
    said: list[str] = []
    stream = stream_of(write_jsonl(tmp_path / "a.jsonl", rows), warn=said.append, end_ids={7})
    stream.tokenizer = make_tokenizer(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>"
        "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    for _ in range(2):
        list(stream.examples(StreamPosition()))
    assert len(said) == 2
    assert "drops the reasoning of 1 completion, first at" in said[0]
    assert "ends with '<|endoftext|>', at which the model does not stop" in said[1]
    assert all("a.jsonl:1: " in text for text in said)
    assert stream.counts.lost_parts == {"reasoning of completion": 6}
    assert stream.counts.other_ends == 6
    assert "without the reasoning of completion: 6" in str(stream.counts)


def test_the_ids_of_a_stream_are_checked_as_they_come(tmp_path: Path):
    seen: list[tuple[int, str]] = []
    path = write_jsonl(tmp_path / "a.jsonl", plain_records(3))
    list(stream_of(path, check_id=lambda *found: seen.append(found)).examples(StreamPosition()))
    assert [where.rsplit(":", 1)[1] for _, where in seen] == ["1", "2", "3"]
    assert all(EOS_ID <= token < len(TOKENIZER) for token, _ in seen)


def test_a_template_that_takes_too_long_ends_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kto_lightning.data.template_limits.SECONDS", 0.2)
    stream = stream_of(write_jsonl(tmp_path / "a.jsonl", chat_records(3)))
    stream.tokenizer = make_tokenizer(
        chat_template="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{{ messages[0].content }}"
    )
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template of .* takes longer than"):
        list(stream.examples(StreamPosition()))


def test_a_stream_that_changes_between_epochs_says_so(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", plain_records(6))
    said: list[str] = []
    stream = stream_of(path, warn=said.append)
    for _ in range(2):
        list(stream.examples(StreamPosition()))
    assert not said
    write_jsonl(path, plain_records(7))
    list(stream.examples(StreamPosition()))
    assert len(said) == 1
    assert "the records of --data.train have changed since the last epoch" in said[0]


def test_a_stream_counts_prompts_that_were_guessed(tmp_path: Path):
    pairs = [{"chosen": "river cat sat", "rejected": "river dog ran"}] * 3
    said: list[str] = []
    stream = stream_of(write_jsonl(tmp_path / "a.jsonl", pairs), warn=said.append)
    for _ in range(2):
        list(stream.examples(StreamPosition()))
    assert stream.counts.guessed_prompts == 3
    assert len(said) == 1
    assert "a.jsonl:1: a pair without a prompt of its own" in said[0]


def test_a_stream_counts_messages_after_the_answer(tmp_path: Path):
    turns = [{"role": role, "content": "So."} for role in ("user", "assistant", "user")]
    rows = [{"messages": turns, "label": True}, {"messages": turns[:2], "label": False}]
    said: list[str] = []
    stream = stream_of(
        write_jsonl(tmp_path / "a.jsonl", rows * 2),
        warn=said.append,
        tokenizer=make_tokenizer(chat_template="qwen3"),
    )
    list(stream.examples(StreamPosition()))
    assert stream.counts.messages_left == 2
    assert [text for text in said if "a.jsonl:1: messages follow" in text]
