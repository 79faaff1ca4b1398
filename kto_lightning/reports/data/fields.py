"""Fields of the data report: dataclasses of plain values, stored as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from kto_lightning.data.lost import LostPart, OtherEnd
from kto_lightning.reports.data.guide_fields import Guide, TriedRecord
from kto_lightning.reports.data.plain import from_plain

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class PerClass(Generic[T]):
    """One value for desirable and one for undesirable records."""

    desirable: T
    undesirable: T


@dataclass(kw_only=True, slots=True)
class Places:
    """A count of records, and the places of the first few."""

    count: int
    first: list[str]
    """As `file:line`; for bad records followed by the error."""


@dataclass(kw_only=True, slots=True)
class Quantiles:
    """Distribution of a length; quantiles are interpolated."""

    minimum: float
    q25: float
    median: float
    q75: float
    q95: float
    maximum: float
    mean: float


@dataclass(kw_only=True, slots=True)
class Column:
    """One column of the file, whether or not training reads it."""

    name: str
    type: str
    """`string`, `boolean`, `number`, `list of objects (role, content)`, …; several joined by ` | `;
    of a parquet file the type in its schema."""
    filled: int
    """Number of rows in which it is present and not null."""


@dataclass(kw_only=True, slots=True)
class Format:
    """Plain text or chat, and its features."""

    kind: Literal["plain", "chat", "mixed", "none"]
    """`mixed`: some records are plain and some chat; `none`: there is no usable record."""
    user_turns: float | None
    """Mean number of user messages in the prompt, over chat records; None without any."""
    most_user_turns: int | None
    system_share: float
    """Share of records whose prompt has a system or developer message."""
    tools_share: float
    """Share of records with tools."""
    tool_call_share: float
    """Share of records whose completion calls a tool."""


@dataclass(kw_only=True, slots=True)
class Labels:
    """Counts of the labels."""

    desirable: int
    undesirable: int
    ratio: float | None
    """Desirable over undesirable records; None without undesirable ones."""
    first: list[bool]
    """The first 30, in file order."""


@dataclass(kw_only=True, slots=True)
class Order:
    """The order of the labels in the file."""

    kind: Literal["alternating", "natural", "sorted", "one label", "none"]
    rule: str
    """The reason for `kind`."""
    changes: float | None
    """Share of neighbouring records with different labels; None for fewer than two records."""
    changes_by_chance: float | None
    """The same, expected after a shuffle."""
    longest_run: PerClass[int]
    """Most records in a row with the same label."""
    batch_size: int
    single_label_batches: float | None
    """Share of full batches in file order whose records all have the same label; None without a
    full batch."""
    single_label_batches_shuffled: float | None
    """The same, expected after a shuffle."""


@dataclass(kw_only=True, slots=True)
class Weights:
    """The class weights that balance both classes, as `auto` chooses them."""

    desirable: float
    undesirable: float
    effective_desirable: float
    """λ_D n_D, over the records that `max_length` keeps."""
    effective_undesirable: float


@dataclass(kw_only=True, slots=True)
class Truncation:
    """Records truncated and dropped by `max_length`, in tokens."""

    max_length: int
    truncated: PerClass[int]
    """Records that lose their end, or under `keep_end` the start of their prompt."""
    dropped: PerClass[int]
    """Records whose prompt alone fills `max_length` under `keep_start`."""


@dataclass(kw_only=True, slots=True)
class Lengths:
    """Lengths of prompts and completions.

    In tokens, of all records before truncation; in the report that `fit` writes, of the records
    that are kept, with prompts after truncation. In characters if there is no tokenizer; a tool
    call counts as its JSON.
    """

    unit: Literal["tokens", "characters"]
    prompt: PerClass[Quantiles | None]
    """None for a class without records."""
    completion: PerClass[Quantiles | None]
    prompt_share: float | None
    """Prompt tokens (or characters) over all tokens."""
    mean_prompt_share: float | None
    """The mean over records of the prompt share of each."""
    auc: float | None
    """AUC of a completion's length for its label: the probability that a desirable one is longer
    than an undesirable one, ties counted half. None if a class is absent."""
    truncation: Truncation | None
    """None without a tokenizer or a limit."""
    prompts_not_prefix: int | None
    """Records whose tokenized prompt is not a prefix of their tokenized text; None: no tokenizer.
    """
    lost_prompt_end: str | None
    """The end of the first such prompt, which is not trained on."""


@dataclass(kw_only=True, slots=True)
class Repeats:
    """Repeats. Two prompts are the same if text, tools and template settings are."""

    distinct_prompts: int
    repeated_prompt_share: float | None
    """Share of records whose prompt occurs in another record."""
    commonest_prompt_share: float | None
    """Share of records that have the commonest prompt."""
    exact_duplicates: Places
    """Records with the prompt, completion and label of an earlier one."""
    contradictory_labels: Places
    """Completions that have both labels for one prompt; `first` has two records of each."""
    same_prompt_mismatches: float | None
    """Share of records whose mismatched completion would answer their own prompt under TRL's
    pairing, which rotates completions in blocks of the batch size; None for a batch size of one."""


@dataclass(kw_only=True, slots=True)
class Histogram:
    """Counts of lengths between edges; each bin includes its lower edge, the last one both."""

    edges: list[float]
    desirable: list[int]
    """One fewer than there are edges."""
    undesirable: list[int]

    def __post_init__(self) -> None:
        if not len(self.edges) - 1 == len(self.desirable) == len(self.undesirable):
            raise ValueError(
                f"{len(self.edges)} edges for {len(self.desirable)} and {len(self.undesirable)} "
                "counts"
            )


@dataclass(kw_only=True, slots=True)
class Shapes:
    """Data of the charts; lengths as in `Lengths`."""

    prompt: Histogram
    completion: Histogram
    both: Histogram
    """Prompt and completion together, to which `max_length` applies."""
    stretch_records: list[int]
    """Number of records in each of about equal stretches of the file, in file order."""
    stretch_desirable: list[int]
    """Number of desirable ones among them."""


@dataclass(kw_only=True, slots=True)
class CutAnswers:
    """Completions that an export has cut at a fixed length."""

    characters: int
    """Those that are left of each, without the mark."""
    mark: str
    """What the export has put at their end, `...` or `…`."""
    answers: Places


@dataclass(kw_only=True, slots=True)
class DataReport:
    """Statistics and findings on a feedback data set."""

    sources: list[str]
    """As given: paths, globs or hub data sets."""
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
    """Name of the tokenizer."""
    tokenizer_problem: str | None
    """Why lengths are in characters although a tokenizer was given."""
    findings: list[str]
    """The findings as sentences."""
    shapes: Shapes | None = None
    """None in reports of earlier versions, or without records."""
    guessed_prompts: Places | None = None
    """Pairs whose prompt was cut from their answers without a sign of where it ends; None in
    reports of earlier versions."""
    messages_left: Places | None = None
    """Conversations with messages after the assistant's last one; None as above."""
    lost_parts: list[LostPart] | None = None
    """Parts of records that their tokens lack; None: no tokenizer."""
    other_end: OtherEnd | None = None
    """Completions whose last token is none at which the model stops."""
    cut_answers: CutAnswers | None = None
    """Completions that an export has cut; None: none found, or in reports of earlier versions."""
    read_as: list[str] = field(default_factory=list)
    """How the rows were read, a sentence each: the mapping of columns, or the tool's export."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Numbers of rows, or judgements in them, by the reason why they are left out."""
    chat_advised: bool = False
    """Whether plain questions and answers should go through the tokenizer's chat template."""
    guide: Guide | None = None
    """None for a file that can be read as it stands."""
    tried: list[TriedRecord] | None = None
    """The first records, if they were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "DataReport":
        """The report from the output of `to_dict`.

        Raises:
            ValueError: if it is not a report of this version.
        """
        try:
            return from_plain(cls, content)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no data report of this version: {error}") from error
