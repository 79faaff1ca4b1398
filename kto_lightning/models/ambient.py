"""What holds for all layers of a forward, without being an argument of the model.

Some models (StableLM, Nemotron) pass no unknown arguments on to their layers, and none to RoPE.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ambient(Generic[T]):
    """A value of this thread, None outside of `active`. Create one for each purpose, once."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        _variables.append(self._variable)

    def get(self) -> T | None:
        return self._variable.get()

    def active(self, value: T | None) -> AbstractContextManager[None]:
        """A context in which `get` gives this value."""
        return _Values([(self._variable, value)])


_variables: list[ContextVar[Any]] = []


class _Values(AbstractContextManager[None]):
    """Sets variables. Can be entered again: backward recomputes as often as it is called."""

    def __init__(self, values: list[tuple[ContextVar[Any], Any]]) -> None:
        self._values = values
        self._entered: list[list[Token[Any]]] = []

    def __enter__(self) -> None:
        self._entered.append([variable.set(value) for variable, value in self._values])

    def __exit__(self, *exception: object) -> None:
        for (variable, _), token in zip(self._values, self._entered.pop(), strict=True):
            variable.reset(token)


def contexts_of_checkpoint() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a forward and of its recomputation, which has the values of the forward although
    backward comes after it, in another thread on a GPU."""
    return nullcontext(), _Values([(variable, variable.get()) for variable in _variables])
