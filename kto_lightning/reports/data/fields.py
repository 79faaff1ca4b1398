"""What the data report says: plain dataclasses of plain values, which JSON holds as they are."""

from dataclasses import asdict, dataclass, is_dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class PerClass(Generic[T]):
    """The same of desirable and of undesirable records."""

    desirable: T
    undesirable: T


@dataclass(kw_only=True, slots=True)
class Places:
    """How often something was found, and where it stands first."""

    count: int
    first: list[str]
    """The first few as `file:line`; of bad records with what is wrong."""


@dataclass(kw_only=True, slots=True)
class Quantiles:
    """How a length is distributed; quantiles between two values are interpolated."""

    minimum: float
    q25: float
    median: float
    q75: float
    q95: float
    maximum: float
    mean: float


@dataclass(kw_only=True, slots=True)
class Column:
    """One column of the file as it was published, whether or not training reads it."""

    name: str
    type: str
    """`string`, `boolean`, `number`, `list of objects (role, content)`, …; several joined by ` | `;
    of a parquet file the type in its schema."""
    filled: int
    """In how many rows it is there and not null."""


@dataclass(kw_only=True, slots=True)
class Format:
    """What the records are made of."""

    kind: Literal["plain", "chat", "mixed", "none"]
    """`mixed`: some are text and some are messages; `none`: there is no usable record."""
    user_turns: float | None
    """Mean number of the user's messages in the prompt, over chat records; None without any."""
    most_user_turns: int | None
    system_share: float
    """Share of records whose prompt has a system or developer message."""
    tools_share: float
    """Share of records that name tools."""
    tool_call_share: float
    """Share of records whose completion calls a tool."""


@dataclass(kw_only=True, slots=True)
class Labels:
    """How many records were marked good and bad."""

    desirable: int
    undesirable: int
    ratio: float | None
    """Desirable over undesirable records; None without undesirable ones."""
    first: list[bool]
    """The first 30, in file order."""


@dataclass(kw_only=True, slots=True)
class Order:
    """In which order the labels stand in the file."""

    kind: Literal["alternating", "natural", "sorted", "one label", "none"]
    rule: str
    """Why it is called that."""
    changes: float | None
    """Share of neighbouring records with different labels; None below two records."""
    changes_by_chance: float | None
    """The same, expected after a shuffle."""
    longest_run: PerClass[int]
    """Most records in a row with the same label."""
    batch_size: int
    single_label_batches: float | None
    """Share of the whole batches, cut in file order, whose records all have the same label; None if
    there are too few records for one."""
    single_label_batches_shuffled: float | None
    """The same, expected after a shuffle."""


@dataclass(kw_only=True, slots=True)
class Weights:
    """The class weights that make both classes count the same: what `auto` chooses."""

    desirable: float
    undesirable: float
    effective_desirable: float
    """λ_D n_D over the records that would be trained on."""
    effective_undesirable: float


@dataclass(kw_only=True, slots=True)
class Truncation:
    """What `max_length` does to the records, in tokens."""

    max_length: int
    truncated: PerClass[int]
    """Records that stay and lose their end, or under `keep_end` their prompt's start."""
    dropped: PerClass[int]
    """Records whose prompt alone fills `max_length` under `keep_start`."""


@dataclass(kw_only=True, slots=True)
class Lengths:
    """How long prompts and completions are.

    In tokens of all records, before truncation; in the report that `fit` writes, of the records
    that stay, their prompts after truncation. In characters where there is no tokenizer; a tool
    call counts as its JSON.
    """

    unit: Literal["tokens", "characters"]
    prompt: PerClass[Quantiles | None]
    """None for a class without records."""
    completion: PerClass[Quantiles | None]
    prompt_share: float | None
    """Prompt tokens (characters) over all: what decides the cost of a step."""
    mean_prompt_share: float | None
    """The mean over records of each one's own share."""
    auc: float | None
    """How well a completion's length alone predicts its label: the chance that a desirable one is
    longer than an undesirable one, ties counted half. None if a class is absent."""
    truncation: Truncation | None
    """None without a tokenizer or a limit."""
    prompts_not_prefix: int | None
    """Records whose tokenized prompt is not a prefix of their tokenized text; None: no tokenizer.
    """
    lost_prompt_end: str | None
    """The end of the first such prompt, which is not trained on."""


@dataclass(kw_only=True, slots=True)
class Repeats:
    """What occurs more than once. Prompts are the same with the same text, tools and settings."""

    distinct_prompts: int
    repeated_prompt_share: float | None
    """Share of records whose prompt another record has too."""
    commonest_prompt_share: float | None
    """Share of records that have the commonest prompt."""
    exact_duplicates: Places
    """Records with the prompt, completion and label of an earlier one."""
    contradictory_labels: Places
    """Completions of one prompt that carry both labels; `first` has two records of each."""
    same_prompt_mismatches: float | None
    """Share of records whose mismatched completion would answer their own prompt if completions
    rotated in blocks of the batch size, as TRL's do; None for a batch size of one."""


@dataclass(kw_only=True, slots=True)
class Histogram:
    """How many lengths lie from each edge up to the next, the last edge included."""

    edges: list[float]
    desirable: list[int]
    """One fewer than there are edges."""
    undesirable: list[int]


@dataclass(kw_only=True, slots=True)
class Shapes:
    """What the pictures of the report are drawn from; lengths as in `Lengths`."""

    prompt: Histogram
    completion: Histogram
    both: Histogram
    """Prompt and completion together, which `max_length` limits."""
    stretch_records: list[int]
    """The file in stretches of about equal length: the records of each, in file order."""
    stretch_desirable: list[int]
    """How many of them are desirable."""


@dataclass(kw_only=True, slots=True)
class DataReport:
    """What is worth knowing of a feedback data set before anything is trained on it."""

    sources: list[str]
    """As they were named: paths, globs or hub data sets."""
    examples: int
    """Usable records; a pair of a chosen and a rejected completion is two."""
    bad_records: Places
    columns: list[Column]
    format: Format
    labels: Labels
    order: Order
    weights: Weights
    lengths: Lengths
    repeats: Repeats
    empty_completions: Places
    """Completions without a visible character and without a tool call."""
    tokenizer: str | None
    """The name of the one that counted tokens."""
    tokenizer_problem: str | None
    """Why lengths are in characters although a tokenizer was given."""
    findings: list[str]
    """One plain sentence for each thing that matters, with what to do about it."""
    shapes: Shapes | None = None
    """None in a report that an earlier version wrote, or of no record."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it: dicts, lists, strings, numbers, booleans and None."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "DataReport":
        """The report that `to_dict` gave.

        Raises:
            ValueError: if it is none, or one of another version.
        """
        try:
            return _from_plain(cls, content)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no data report of this version: {error}") from error


def _from_plain(kind: Any, value: Any) -> Any:
    """A dataclass of this type from dicts, or a plain value as it is."""
    if get_origin(kind) in (Union, UnionType):
        some = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else _from_plain(some[0], value)
    if get_origin(kind) is list:
        return [_from_plain(get_args(kind)[0], item) for item in value]
    made: Any = get_origin(kind) or kind
    if not isinstance(made, type) or not is_dataclass(made):
        return value
    hints = get_type_hints(made)
    of_class = get_args(kind)  # PerClass[int]: both its fields are that
    known = {name: of_class[0] if of_class else hints[name] for name in value if name in hints}
    make: Any = made
    return make(**{name: _from_plain(hint, value[name]) for name, hint in known.items()})
