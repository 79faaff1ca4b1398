"""What goes wrong in a process of its own is told and ends nothing else."""

import os
import signal
import time

import pytest

from tests.architectures.isolation import IsolatedError, isolated


def test_a_result_comes_back() -> None:
    assert isolated(divmod, 7, 2, seconds=60) == (3, 1)


@pytest.mark.parametrize(
    ("function", "arguments", "seconds", "message"),
    [
        (divmod, (7, 0), 60, "ZeroDivisionError"),
        (os._exit, (3,), 60, "ended with status 3"),
        (signal.raise_signal, (signal.SIGKILL,), 60, "ended with status -9"),
        (time.sleep, (60,), 0.1, "has not ended after 0.1 seconds"),
    ],
)
def test_a_failure_is_told(function, arguments, seconds, message) -> None:
    with pytest.raises(IsolatedError, match=message):
        isolated(function, *arguments, seconds=seconds)
