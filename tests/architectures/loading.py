"""What becomes of a family: loaded and probed as a run does it."""

import json
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kto_lightning.errors import KTOError
from kto_lightning.models.architecture import check_positions
from kto_lightning.models.build import BuiltModels, build_models
from kto_lightning.models.lora import LoRA
from kto_lightning.models.routes.choose import explain_obstacles
from kto_lightning.models.settings import ModelSettings
from tests.architectures.build import save_family
from tests.architectures.shrink import POSITIONS

_LONGEST_REASON = 250


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a family."""

    outcome: str
    """The route, or `refused`, or `not built` where transformers cannot make it tiny."""
    reason: str = ""
    """Why no faster route, why it is refused, or why it is not built."""
    model_class: str = ""
    unused: list[str] = field(default_factory=list)
    """The modules that text does not reach."""


def route_of(family: str, directory: Path) -> Outcome:
    """The outcome alone; the model is saved to `directory`."""
    try:
        save_family(directory, family)
    except Exception as error:  # whatever transformers raises
        return Outcome(outcome="not built", reason=_one_line(error, directory))
    return outcome_of(directory, lambda: build(directory))


def build(
    directory: Path, *, lora: LoRA | None = None, activation_checkpointing: bool = False
) -> BuiltModels:
    """The models of a run with sequences of up to `POSITIONS` tokens."""
    settings = ModelSettings(
        policy=str(directory),
        reference=None,
        route="auto",
        dtype=None,
        quantization=None,
        lora=lora,
        dropout=False,
        activation_checkpointing=activation_checkpointing,
        activation_offloading=False,
        reference_cache=None,
        follow=None,
        offload_reference=False,
        trust_remote_code=False,
    )
    built = build_models(
        settings,
        precision="32-true",
        longest=POSITIONS,
        device=torch.device("cpu"),
        reference_keys=lambda: None,
    )
    check_positions(built.policy.causal_lm, str(directory), POSITIONS)
    return built


def outcome_of(directory: Path, build: Any) -> Outcome:
    name = saved_class(directory).__name__
    try:
        built = build()
    except KTOError as error:
        return Outcome(outcome="refused", reason=_one_line(error, directory), model_class=name)
    return Outcome(
        outcome=built.policy.route,
        reason=explain_obstacles(built.obstacles),
        model_class=name,
        unused=built.unused,
    )


def _one_line(error: Exception, directory: Path) -> str:
    kind = "" if isinstance(error, KTOError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".replace(str(directory), "DIRECTORY").split())
    text = re.sub(r" \(got .*?\)", "", text)  # log-probs
    return textwrap.shorten(text, _LONGEST_REASON, placeholder=" …")


def saved_class(directory: Path) -> Any:
    """The class that a directory was saved from, not by way of our loading."""
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def reopened(directory: Path) -> PreTrainedModel:
    """A model whose files have all of its weights and no more."""
    model, found = saved_class(directory).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: names for kind, names in found.items() if "keys" in kind and names}
    assert not wrong, wrong
    return model.eval()
