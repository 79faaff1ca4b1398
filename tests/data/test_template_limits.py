"""Chat templates that never end, or ask for all memory: a message, and soon."""

import gc
import signal
import threading
import time
from pathlib import Path

import pytest

from kto_lightning.data import template_limits
from kto_lightning.data.template_limits import TemplateLimitError, limit_rendering
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import DataError
from tests.data.test_tokenize import as_dataset
from tests.support.factories import chat_records, make_tokenizer

ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{{ messages[0].content }}"
)
ONLY_THE_THIRD = f"{{% if messages[0].content == 'stop' %}}{ENDLESS}{{% endif %}}{{{{ messages }}}}"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_template_without_end_names_itself_and_the_record(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    rows = chat_records(8)
    rows[5]["prompt"] = [{"role": "user", "content": "stop"}]
    tokenizer = make_tokenizer(chat_template=ONLY_THE_THIRD)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"train\.jsonl:6: the chat template of 'Tok.* was stopped"):
        tokenize_records(as_dataset(rows), tokenizer, max_length=64, num_workers=num_workers)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "expression",
    [
        "'a' * 10 ** 10",
        "'%9999999999d' % 1",
        "'a'.ljust(10 ** 10)",
        "'a' * 10 ** 7",
        "messages[0].content * 10 ** 5",
    ],
)
def test_a_template_that_asks_for_all_memory_names_the_record(expression: str) -> None:
    tokenizer = make_tokenizer(chat_template=f"{{{{ {expression} }}}}")
    start = time.monotonic()
    said = (
        r"train\.jsonl:1: the chat template of .*(more than 1,\d+ MiB of mem|characters for this)"
    )
    with pytest.raises(DataError, match=said):
        tokenize_records(as_dataset(chat_records(3)), tokenizer, max_length=64)
    assert time.monotonic() - start < 30


def test_limits_are_lifted_afterwards_and_another_alarm_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    rung: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    try:
        with pytest.raises(TemplateLimitError), limit_rendering(0):
            time.sleep(5)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
        time.sleep(0.4)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_the_garbage_of_others_is_left_until_afterwards() -> None:
    """A finalizer that waits, as a loader's does for its workers, would swallow the signal."""
    finalized = []

    class Waits:
        def __del__(self) -> None:
            finalized.append(True)

    gc.collect()
    one = Waits()
    vars(one)["itself"] = one
    with limit_rendering(0):
        del one
        kept = [[] for _ in range(100_000)]  # many times what sets off a collection
        assert not finalized
    assert gc.isenabled()
    del kept
    gc.collect()
    assert finalized


def test_a_thread_renders_without_a_time_limit() -> None:
    done: list[bool] = []

    def render() -> None:
        with limit_rendering(0):
            done.append(True)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_large_record_may_take_longer_and_grow_more(tmp_path: Path) -> None:
    template = "{{ 'x' * 30 }}{% for m in messages %}{{ m.content * 90 }}{% endfor %}"
    rows = chat_records(2)
    for row in rows:
        row["completion"][0]["content"] = "word " * 2000
    examples = tokenize_records(
        as_dataset(rows), make_tokenizer(chat_template=template), max_length=None
    )
    assert examples.completion_lengths.min() > 90 * 2000
