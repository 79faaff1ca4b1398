"""`Proposal`: a mapping of columns, as options for the command line."""

import json
import re
import shlex
from dataclasses import asdict, dataclass, field

from kto_lightning.data.labels import Number, Words
from kto_lightning.data.proposal.facts import ColumnFacts
from kto_lightning.data.proposal.names import word_set
from kto_lightning.data.record_settings import RecordSettings

SETTING = re.compile(r"`(?=(?:columns|labels)\.|repeated |unlabeled )")
NOT_PLAIN = re.compile(r"^[-\[{&#]|^(?:null|~)$|:\s", re.IGNORECASE)
"""Names that YAML or a shell's options would not read as a text."""
PLAIN_WORD = re.compile(r"[^\W\d_](?:[\w -]*\w)?")
YAML_WORDS = word_set("yes no true false on off null y n nan")


@dataclass(kw_only=True, slots=True)
class Proposal:
    """A mapping of columns to the fields of a record, and what no mapping can give."""

    columns: dict[str, str] = field(default_factory=dict)
    """The column or path of each field that was found."""
    built_in: frozenset[str] = frozenset()
    """Fields that are read from these columns without being asked for."""
    labels: dict[str, Words | Number] = field(default_factory=dict)
    """`good`, `bad`, `neither`: words; `at_least`, `at_most`: thresholds; those that are needed."""
    skip_unlabeled: bool = False
    """Whether some rows have no label."""
    chat: bool = False
    """Whether prompt and answer are plain text and should go through the chat template."""
    others: dict[str, str] = field(default_factory=dict)
    """Further settings that were given, by name."""
    missing: list[str] = field(default_factory=list)
    """What no mapping gives, a sentence each with the way out."""
    notes: list[str] = field(default_factory=list)
    """What else there is to know, a sentence each."""
    facts: list[ColumnFacts] = field(default_factory=list)
    """The columns of the rows."""
    says_more: bool = False
    """Whether there are options that were not given."""

    def flags(self, prefix: str = "data.") -> list[str]:
        """Options for the command line, quoted for a shell: `--data.columns.prompt question`.

        Args:
            prefix: `data.` for `fit`, `validate` and `predict`; nothing for `inspect`.
        """
        columns = {role: path for role, path in self.columns.items() if role not in self.built_in}
        options = [(f"columns.{role}", path) for role, path in columns.items()]
        if any(map(NOT_PLAIN.search, columns.values())):
            options = [("columns", json.dumps(columns, ensure_ascii=False))]
        options += [(f"labels.{name}", _as_yaml(value)) for name, value in self.labels.items()]
        options += [("unlabeled", "skip")] if self.skip_unlabeled else []
        options += [("chat", "true")] if self.chat else []
        options += self.others.items()
        return [f"--{prefix}{name} {shlex.quote(value)}" for name, value in options]

    def arguments(self) -> list[str]:
        """The same as arguments of `KTODataModule`, for a Python program."""
        columns = {role: path for role, path in self.columns.items() if role not in self.built_in}
        labels = {
            name: float(value) if name.startswith("at_") and isinstance(value, int) else value
            for name, value in self.labels.items()
        }
        groups = [("Columns", "columns", columns), ("Labels", "labels", labels)]
        arguments = [
            f"{name}={kind}({', '.join(f'{key}={value!r}' for key, value in values.items())})"
            for kind, name, values in groups
            if values
        ]
        arguments += ["unlabeled='skip'"] if self.skip_unlabeled else []
        arguments += ["chat=True"] if self.chat else []
        return arguments + [f"{name}={value!r}" for name, value in self.others.items()]


def name_options(sentence: str, prefix: str = "data.") -> str:
    """A sentence of a proposal with its settings as options: `--data.columns.label`."""
    return SETTING.sub(f"`--{prefix}", sentence)


def proposal_of(settings: RecordSettings) -> Proposal:
    """What settings say already."""
    others = {"repeated": settings.repeated, "format": settings.format or ""}
    labels = {} if settings.labels is None else asdict(settings.labels)
    return Proposal(
        columns={} if settings.columns is None else settings.columns.given(),
        labels={name: value for name, value in labels.items() if value is not None},
        skip_unlabeled=settings.unlabeled == "skip",
        chat=settings.chat,
        others={name: value for name, value in others.items() if value not in ("keep", "")},
    )


def _as_yaml(value: Words | Number) -> str:
    """A value as YAML, a list in one line, with quotes around the words that need them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}"
    if isinstance(value, str) and PLAIN_WORD.fullmatch(value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
