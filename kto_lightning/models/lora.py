"""Settings of new low-rank adapters."""

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any

from peft import LoraConfig

from kto_lightning.errors import ConfigError, check_count, check_number

MAX_RANK = 65_536
ADAPTER = "default"
"""peft's name for the adapter that is trained."""
REFERENCE_ADAPTER = "reference"
"""peft's name for the frozen copy of an adapter that training starts from."""
ALL_LINEAR = "all-linear"

_CHANGES_BASE = "changes the base's weights, which are the reference"
_NEEDS_DATA = "needs data before training"
_SET_HERE = "is set by the training itself"
_REFUSED = {
    "layer_replication": "makes another model of the base, which is the reference",
    "trainable_token_indices": "changes single rows of the embeddings, of which the log-probs know "
    "nothing; modules_to_save trains whole ones",
    "ensure_weight_tying": "is not supported: an adapter on the head is separate from another on "
    "the embeddings",
    "alora_invocation_tokens": "depends on tokens in the prompt, and such an adapter cannot be "
    "merged",
    "monteclora_config": "is random in training, and noise in log-probs is noise in the rewards",
    "kasa_config": _CHANGES_BASE,
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "velora_config"), _NEEDS_DATA),
    "loftq_config": _CHANGES_BASE,
    "fan_in_fan_out": "follows from the kind of layer",
    **dict.fromkeys(("task_type", "peft_type", "inference_mode", "runtime_config"), _SET_HERE),
    "base_model_name_or_path": _SET_HERE,
}
"""Keys of `peft.LoraConfig` that cannot work here, and why."""
_LISTS = (
    *(("target_modules", str, True), ("exclude_modules", str, True), ("layers_pattern", str, True)),
    *(("modules_to_save", str, False), ("target_parameters", str, False)),
    ("layers_to_transform", int, True),
)
"""Settings that are lists, of what, and whether a single one may stand for a list."""
_INITIALIZATIONS = (True, "gaussian")
"""Those that leave the base as it is and begin with an update of exactly 0."""


def _refuse_unknown(initialize: Callable[..., None]) -> Callable[..., None]:
    """Answer a setting that `LoRA` does not have before Python does, which knows no nearest one."""

    @wraps(initialize)
    def checked(self: Any, **settings: Any) -> None:
        for name in settings:
            if name not in self.__slots__:
                raise ConfigError(f"--model.lora.{name} {LoRA.explain_unknown(name)}")
        initialize(self, **settings)

    return checked


@dataclass(kw_only=True, slots=True)
class LoRA:
    """A new low-rank adapter (arXiv:2106.09685) on a frozen base; most keys as `peft.LoraConfig`.

    Raises:
        ConfigError: if a setting has a wrong value, is unknown or cannot work here.
    """

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    target_modules: str | list[str] = ALL_LINEAR
    """Names of the modules to adapt, `lm_head` too; `all-linear`: all linear ones but the head, and
    but those that peft cannot adapt."""
    dropout: float = 0.0
    """Dropout on the update's input; unlike the model's own, it is on whenever it is above 0."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each weight's rows apart from their direction (arXiv:2402.09353)."""
    bias: str = "none"
    """Which biases of the base to train: only `none`, as the base is the reference."""
    lora_bias: bool = False
    """Add a trained bias to the update."""
    init_lora_weights: bool | str = True
    """How A is drawn: true (Kaiming, uniform) or `gaussian`. B begins with 0."""
    modules_to_save: list[str] | None = None
    """Names of modules to train whole, beside the adapter."""
    target_parameters: list[str] | None = None
    """Names of parameters to adapt that belong to no linear layer, such as those of experts."""
    exclude_modules: str | list[str] | None = None
    """Names of modules not to adapt, or a pattern that their whole names match."""
    rank_pattern: dict[str, int] | None = None
    """Ranks other than `r`, by names or patterns of modules."""
    alpha_pattern: dict[str, float] | None = None
    """Values other than `alpha`, by names or patterns of modules."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the layers to adapt; null: all."""
    layers_pattern: str | list[str] | None = None
    """The name of the list of layers, where it is none of the usual ones."""
    lora_alpha: float | None = None
    """peft's name of `alpha`; one of the two."""
    lora_dropout: float | None = None
    """peft's name of `dropout`; one of the two."""

    def __post_init__(self) -> None:
        self._resolve_alias("alpha", 32.0)
        self._resolve_alias("dropout", 0.0)
        check_count("--model.lora.r", self.r, most=MAX_RANK)
        check_number("lora.alpha", self.alpha, above=0.0)
        check_number("lora.dropout", self.dropout, below=1.0)
        self._check_types()
        for name, rank in _items("rank_pattern", self.rank_pattern):
            check_count(f"--model.lora.rank_pattern {name}", rank, most=MAX_RANK)
        for name, alpha in _items("alpha_pattern", self.alpha_pattern):
            check_number(f"lora.alpha_pattern {name}", alpha, above=0.0)
        if self.bias != "none":
            raise ConfigError(
                f"--model.lora.bias must be none, got {self.bias}: it trains biases of the base, "
                "and the base is the reference. --model.lora.lora_bias true gives the update one."
            )
        if self.init_lora_weights not in _INITIALIZATIONS:
            raise ConfigError(
                f"--model.lora.init_lora_weights must be true or gaussian, got "
                f"{self.init_lora_weights}: others change the base, which is the reference, need "
                "data, or begin with an update that is not 0."
            )
        if self.target_parameters and self.dropout:
            raise ConfigError(
                "--model.lora.dropout cannot drop the input of --model.lora.target_parameters. "
                "Remove one of the two."
            )
        if self.lora_bias and (self.use_dora or self.init_lora_weights is not True):
            raise ConfigError(
                "--model.lora.lora_bias is for plain LoRA. Remove it, or use_dora and "
                "init_lora_weights."
            )

    def _check_types(self) -> None:
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"--model.lora.{name} must be true or false.")
        for name, kind, alone in _LISTS:
            value = getattr(self, name)
            if isinstance(value, tuple | set):  # as peft takes them
                setattr(self, name, sorted(value, key=str))
            _check_list(name, getattr(self, name), kind, alone=alone)

    def _resolve_alias(self, name: str, default: float) -> None:
        given = getattr(self, f"lora_{name}")
        if given is None:
            return
        if getattr(self, name) not in (default, given):
            raise ConfigError(
                f"--model.lora.lora_{name} {given} is peft's name of --model.lora.{name}, which is "
                f"{getattr(self, name)}. Give one of the two."
            )
        setattr(self, name, given)
        setattr(self, f"lora_{name}", None)

    def settings(self) -> dict[str, Any]:
        """`r`, `alpha`, `target_modules` and `dropout`, and what differs from its default."""
        always = ("r", "alpha", "target_modules", "dropout")
        default = {field.name: field.default for field in fields(self)}
        return {n: v for n, v in asdict(self).items() if n in always or v != default[n]}

    @staticmethod
    def explain_unknown(name: str) -> str:
        """What is to be said of a setting that there is not, after its name."""
        if name in _REFUSED:
            return f"{_REFUSED[name]}. Remove it."
        if name in {field.name for field in fields(LoraConfig)}:
            return "of peft.LoraConfig is not supported. Remove it."
        known = [field.name for field in fields(LoRA)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        nearest = f"Did you mean {near[0]}? " if near else ""
        return f"is no setting of an adapter. {nearest}It has {', '.join(known)}."


LoRA.__init__ = _refuse_unknown(LoRA.__init__)


def _check_list(name: str, value: Any, kind: type, *, alone: bool) -> None:
    if value is None or (alone and isinstance(value, kind)):
        return
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        words = "names" if kind is str else "whole numbers"
        raise ConfigError(f"--model.lora.{name} must be a list of {words}, got {value!r}.")


def _items(name: str, pattern: Any) -> list[tuple[str, Any]]:
    if not isinstance(pattern, dict | None) or not all(
        isinstance(key, str) for key in pattern or ()
    ):
        raise ConfigError(
            f"--model.lora.{name} must map names of modules to numbers, got {pattern}."
        )
    return list((pattern or {}).items())
