"""Which models a run has, and how they are loaded and run: their settings, with their checks."""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from kto_lightning.errors import ConfigError, check_one_of
from kto_lightning.models.following import Follow
from kto_lightning.models.in_memory import causal_lm_of
from kto_lightning.models.loading import vocabulary_size
from kto_lightning.models.lora import LoRA
from kto_lightning.models.model_files import is_adapter
from kto_lightning.models.quantization import Quantization, check_quantization
from kto_lightning.models.routes.choose import (
    ROUTE_SETTINGS,
    RouteSetting,
)
from kto_lightning.models.sharding import Shard
from kto_lightning.models.tokenizer import end_token_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, slots=True)
class ModelSettings:
    """The models of a run, and how to load and run them; names as `KTOModule`'s arguments.

    Raises:
        ConfigError: if two of these contradict each other.
    """

    policy: str
    """A directory, a hub id or an adapter directory; of a model in memory, `object_name`."""
    reference: str | None
    """Likewise; None: the policy before training."""
    dtype: str | None
    """Of a frozen base's weights, a key of `DTYPES`; None: float32 (bfloat16 with
    `quantization`)."""
    quantization: Quantization | None
    """Of a frozen base's weights; None: `dtype` applies."""
    lora: LoRA | None
    dropout: bool
    route: RouteSetting
    """How the models run, see `routes/runner.py`; auto: the fastest way that is exact."""
    activation_checkpointing: bool
    activation_offloading: bool
    reference_cache: str | None
    """A directory; None: no log-probs are cached."""
    follow: Follow | None
    """How the reference follows the policy; None: it is frozen."""
    offload_reference: bool
    """Keep a second model in host memory except while it scores."""
    trust_remote_code: bool
    adapter_base: str | None = None
    """The base of adapter directories; None: the one that their `adapter_config.json` names."""
    objects: dict[str, nn.Module] = field(default_factory=dict)
    """Models in memory, as `policy` or `reference`."""
    shard: Shard | None = None
    """The strategy's: shards a policy over all ranks; None: nothing is sharded."""
    rounds_weights: bool = False
    """The strategy's: whether mixed precision rounds the weights, where autocast rounds the inputs
    of products."""

    def __post_init__(self) -> None:
        check_one_of("--model.route", self.route, ROUTE_SETTINGS)
        if self.dtype is not None:
            check_one_of("--model.dtype", self.dtype, DTYPES)
        frozen_base = self.lora is not None or self._trains_given_adapter()
        if self.adapter_base is not None and not any(
            name is not None and is_adapter(name) for name in (self.policy, self.reference)
        ):
            raise ConfigError(
                "--model.adapter_base is for adapter directories, and neither --model.policy nor "
                "--model.reference is one. Remove it."
            )
        if self.dtype == "bfloat16" and not frozen_base:
            raise ConfigError(
                "--model.dtype bfloat16 is for a frozen base: updates of a small learning rate are "
                "rounded away in bfloat16 weights. Add --model.lora, or keep the weights in "
                "float32 and compute in bfloat16 with --trainer.precision bf16-mixed."
            )
        check_quantization(self.quantization, frozen_base=frozen_base)
        if self.follow is not None and frozen_base:
            raise ConfigError(
                "--model.follow is for full fine-tuning: with an adapter the reference is its "
                "frozen base, which cannot follow. Remove --model.follow, or train all weights."
            )
        if self.follow is not None and self.reference_cache is not None:
            raise ConfigError(
                "--model.reference_cache keeps the log-probs of a frozen reference, and with "
                "--model.follow the reference changes. Remove one of the two."
            )
        if self.offload_reference and self.quantization is not None:
            raise ConfigError(
                "--model.offload_reference cannot move quantized weights. Remove it or "
                "--model.quantization."
            )
        if self.offload_reference and self.shard is not None:
            raise ConfigError(
                "--model.offload_reference moves a whole model, and under this strategy every "
                "device holds only its shard of the reference. Remove it, or use "
                "--trainer.strategy fsdp2_offload."
            )
        if self.offload_reference and frozen_base and self.reference is None:
            raise ConfigError(
                "--model.offload_reference has nothing to move: with an adapter the reference is "
                "the policy's own base, and there is no second model. Remove it."
            )

    def _trains_given_adapter(self) -> bool:
        if "policy" in self.objects:
            return isinstance(self.objects["policy"], PeftModel)
        return is_adapter(self.policy)

    @property
    def policy_files(self) -> str | None:
        """The directory or hub id behind the policy; None: a model in memory that has none."""
        if "policy" in self.objects:
            return causal_lm_of(self.objects["policy"]).name_or_path or None
        return self.policy

    def vocabulary_sizes(self) -> dict[str, int]:
        """The number of token ids of each model, by its name.

        Raises:
            ModelError: if there is no such model.
        """
        sizes: dict[str, int] = {}
        for role, name in (("policy", self.policy), ("reference", self.reference)):
            if name is None:
                continue
            if role in self.objects:
                config = causal_lm_of(self.objects[role]).config
                size = int(config.get_text_config().vocab_size)
            else:
                size = vocabulary_size(
                    name, trust_remote_code=self.trust_remote_code, given_base=self.adapter_base
                )
            sizes[name] = min(size, sizes.get(name, size))  # two in memory may have one name
        return sizes

    def end_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """The tokens at which the policy stops."""
        policy = self.objects.get("policy")
        generation = None if policy is None else causal_lm_of(policy).generation_config
        return end_token_ids(tokenizer, self.policy, self.adapter_base, generation)


def check_device(settings: ModelSettings, device: torch.device) -> None:
    """Refuse offloading to host memory where the run computes on the CPU anyway.

    Raises:
        ConfigError: with the option to remove.
    """
    for name in ("activation_offloading", "offload_reference"):
        if getattr(settings, name) and device.type == "cpu":
            raise ConfigError(
                f"--model.{name} moves data from a GPU to host memory, and this run trains on the "
                "CPU. Remove it; --model.activation_checkpointing true saves memory on a CPU too."
            )
