"""Calls in a process of their own with a limit on time: a crash ends the call alone."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class IsolatedError(AssertionError):
    """A call failed, crashed or took too long."""


def isolated(function: Callable[..., Any], *arguments: Any, seconds: float, **options: Any) -> Any:
    """The result of a call in a forked process.

    Raises:
        IsolatedError: with the traceback of the call, or how its process ended.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments, options))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise IsolatedError(f"it has not ended after {seconds} seconds")
        failure, result = receiver.recv()
    except EOFError:
        process.join()
        raise IsolatedError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if failure is not None:
        raise IsolatedError(failure)
    return result


def _call(
    sender: Connection, function: Callable[..., Any], arguments: Any, options: dict[str, Any]
) -> None:
    try:
        answer = None, function(*arguments, **options)
    except BaseException:
        answer = traceback.format_exc(), None
    sender.send(answer)
