"""What the tokens of a set of records lack, counted, and the sentences that say so.

Imports nothing: reports are read and shown without a tokenizer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LostPart:
    """A part of records that their tokens lack."""

    name: str
    """Such as `reasoning of completion`; the last word is counted."""
    count: int
    """Of records."""
    first: str
    """The first of them, as `file:line`."""


@dataclass(kw_only=True, slots=True)
class OtherEnd:
    """Completions whose last token is none at which the model stops."""

    token: str
    """The most frequent one."""
    end_tokens: list[str]
    """Those at which the model stops."""
    count: int
    first: str
    """The first of them, as `file:line`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A sentence in the three parts of a finding."""

    what: str
    meaning: str
    action: str

    @property
    def sentence(self) -> str:
        """For the summary of a run."""
        return f"{self.what}: {self.meaning}. {self.action[0].upper()}{self.action[1:]}."


def losses_of(parts: list[LostPart], end: OtherEnd | None) -> Iterator[Loss]:
    """What is to be said, a sentence each."""
    template = [part for part in parts if not part.name.startswith("some ")]
    if template:
        # Many templates show a model its earlier answers without their reasoning.
        intended = any(part.name == "reasoning of prompt" for part in template)
        yield Loss(
            what=f"the chat template drops {', and '.join(map(_shown, template))}",
            meaning="the model is trained without them",
            action="give a template that writes them with `--data.chat_template FILE_OR_NAME`, or "
            "train on records without them"
            + (" (of reasoning in a prompt this may be intended)" if intended else ""),
        )
    if len(template) < len(parts):
        (part,) = (part for part in parts if part not in template)
        yield Loss(
            what=f"the tokenizer drops {_shown(part)}",
            meaning="it has no token for them",
            action="use a tokenizer that has, or remove them",
        )
    if end is not None:
        completions = "completion ends" if end.count == 1 else "completions end"
        yield Loss(
            what=f"{end.count:,} {completions} with {end.token!r}, at which the model does not "
            f"stop, first at {end.first}",
            meaning=f"it stops at {_join(map(repr, end.end_tokens)) or 'no token at all'}",
            action="end completions with such a token by `--data.chat_template FILE_OR_NAME`, or, "
            "if the token only ends turns, add it to `eos_token_id` in the model's "
            "generation_config.json",
        )


def _shown(part: LostPart) -> str:
    article = "" if part.name.startswith("some ") else "the "
    what, counted = part.name.split(" of ")
    counted += "" if part.count == 1 else "s"
    return f"{article}{what} of {part.count:,} {counted}, first at {part.first}"


def _join(texts: Iterable[str]) -> str:
    *most, last = [*texts] or [""]
    return f"{', '.join(most)} and {last}" if most else last
