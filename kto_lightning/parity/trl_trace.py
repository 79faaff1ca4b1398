"""The trace of TRL's `KTOTrainer`, the other side of the comparison.

TRL runs every time; none of its numbers is stored. They are taken where they are computed
(`_compute_loss`, the gradient norm), because TRL rounds what it logs. Columns are named as in our
`metrics.csv`.

Behaviour of TRL 1.16 that matters for the comparison, and how `trl_trace` handles it:

- Mismatched completions: after tokenizing and dropping, completions rotate by one inside
  consecutive blocks of `per_device_train_batch_size` (our `pairing: rotate`). With `num_proc` each
  worker rotates its own shard, so blocks move: `dataset_num_proc` is None.
- The sampler is sequential; ours is too with `shuffle: false`. An epoch's last, smaller batch
  is kept (`dataloader_drop_last` False) and its loss divided by its own size.
- Tokens: the completion starts where prompt and prompt+completion differ; plain text gets an EOS.
  Matched and mismatched sequences are truncated at `max_length` on the right, after the rotation,
  and examples whose prompt alone fills `max_length` are dropped before it.
- `logps/*` and `rewards/*` are means over a class; a class that is absent has no value (NaN here).
  z0 (`kl`) is clamped; the mean before the clamp is recomputed from the log-probs.
- Precision: bf16 autocast and gradient checkpointing are TRL's defaults. Both are off: float32.
- Dropout, LoRA's too, is set to 0 in policy and reference (`disable_dropout`), as is our default.
  Router noise (Phi-3.5-MoE, Mixtral) is left on; here it is off, as is ours.
- AdamW is `adamw_torch_fused` with betas (0.9, 0.999), eps 1e-8 and 0 weight decay; decay skips
  biases, `nn.LayerNorm` and whatever is called a norm, but not embeddings, nor other vectors
  (gpt-oss's sinks, Mamba's D and `norm_f`). SGD has no momentum.
- The loss is 1 − σ(u), in float32 a multiple of 6e-8: where a whole batch's loss falls below 1e-2,
  its own rounding is more than 1e-5 of it.
- The gradient norm is over the trainable parameters, before clipping; `max_grad_norm` (default
  1.0!) 0 clips nothing and the norm is still computed. One process and no accumulation:
  accelerate scales nothing, `average_tokens_across_devices` has no effect.
- transformers' "constant" schedule ignores warm-up; with warm-up it is "constant_with_warmup". The
  warm-up lasts ceil(ratio × steps) steps and its first step has a learning rate of 0.
- A Mixture of Experts: the router's load-balancing loss over the matched sequences, padding masked
  out, is added to the loss with the config's `router_aux_loss_coef`, whatever the config's
  `output_router_logits` says. It fails where the config has no `num_experts`; it gets one.
- The reference of a `PeftModel` is a frozen copy of its adapter ("ref"), not the bare base model.
- Classes are selected by `index_select`; class weights multiply the losses, not the rewards.
- The model is loaded as float32 whatever its config says; soft-capped attention (Gemma-2) makes
  transformers choose its eager attention.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from kto_lightning.models.tokenizer import load_tokenizer
from kto_lightning.parity.trace import Inputs, Settings, Trace, trained_weights

_TRL_NAMES = {
    "kl": "train/z0",
    "rewards/chosen": "train/reward/desirable",
    "rewards/rejected": "train/reward/undesirable",
    "rewards/margins": "train/reward/margin",
    "logps/chosen": "train/logps/desirable",
    "logps/rejected": "train/logps/undesirable",
}


class _RecordingTrainer(KTOTrainer):
    """`KTOTrainer` that records the numbers of each step, not rounded and not averaged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.columns: dict[str, list[float]] = defaultdict(list)
        self._mismatched: list[Tensor | None] = []
        super().__init__(*args, **kwargs)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        # Called for the policy, then for the reference.
        logps = super()._compute_kl_logps(model, batch)
        self._mismatched.append(logps)
        return logps

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        _disable_router_noise(model)
        self._mismatched.clear()
        self._metrics["train"].clear()
        loss = super()._compute_loss(model, inputs, return_outputs)
        metrics = self._metrics["train"]
        self.columns["train/loss"].append(loss.item())
        for theirs, ours in _TRL_NAMES.items():
            self.columns[ours].append(metrics[theirs][-1] if metrics.get(theirs) else math.nan)
        policy, reference = self._mismatched
        raw, size = math.nan, 0.0
        if policy is not None and reference is not None:
            raw, size = (policy - reference).mean().item(), policy.abs().mean().item()
        self.columns["train/z0_raw"].append(raw)
        self.columns["mismatched_logps"].append(size)
        self.columns["train/tokens"].append(float(inputs["attention_mask"].sum()))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
        self.columns["train/grad_norm"].append(float(cast(Tensor, norm)))
        self.columns["train/lr"].append(groups[0]["lr"])
        return norm


def trl_trace(
    inputs: Inputs,
    settings: Settings,
    output_dir: Path,
    *,
    pad_to_multiple_of: int | None = None,
    micro_batch_size: int | None = None,
) -> Trace:
    """Train with TRL on the CPU in float32 and return every step's numbers.

    Args:
        pad_to_multiple_of: other padding, which changes only the rounding, to measure how far two
            runs of TRL differ.
        micro_batch_size: examples per micro-batch, with gradient accumulation; all columns except
            gradient norm and learning rate then have a value for each. None: one micro-batch.
    """
    config = _config(settings, output_dir, pad_to_multiple_of)
    if micro_batch_size is not None:
        config.per_device_train_batch_size = micro_batch_size
        config.gradient_accumulation_steps = settings.batch_size // micro_batch_size
    model = inputs.load()
    _name_experts(model.config.get_text_config())
    trainer = _RecordingTrainer(
        model=model,
        ref_model=inputs.load_reference(),
        args=config,
        train_dataset=_dataset(Path(inputs.train)),
        processing_class=load_tokenizer(
            inputs.adapter or inputs.model, chat_template=inputs.chat_template
        ),
    )
    reference: Any = trainer.ref_model
    if reference is not None:
        _name_experts(reference.config.get_text_config())
    trainer.train()
    return Trace(columns=dict(trainer.columns), weights=trained_weights(trainer.model))


def _disable_router_noise(model: torch.nn.Module) -> None:
    for module in model.modules():
        if any("jitter" in name for name in vars(module)):
            module.training = False


def _name_experts(config: Any) -> None:
    """Give a config the `num_experts` that TRL reads; some call it `num_local_experts` (Granite 4,
    Phi-3.5-MoE). Without experts (dense Granite 4) there is no load-balancing loss to compute."""
    if not hasattr(config, "output_router_logits") or hasattr(config, "num_experts"):
        return
    config.num_experts = getattr(config, "num_local_experts", 0)
    if not config.num_experts:
        config.router_aux_loss_coef = 0.0


def _config(settings: Settings, output_dir: Path, pad_to_multiple_of: int | None) -> KTOConfig:
    return KTOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps,
        loss_type=settings.loss,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        learning_rate=settings.learning_rate,
        optim="adamw_torch_fused" if settings.optimizer == "adamw" else "sgd",
        lr_scheduler_type=_schedule_name(settings),
        warmup_steps=math.ceil(settings.warmup_ratio * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip_norm or 0.0,
        max_length=settings.max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        dataset_num_proc=None,
        dataloader_drop_last=False,
        dataloader_pin_memory=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def _dataset(train_jsonl: Path) -> Dataset:
    with train_jsonl.open(encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


def _schedule_name(settings: Settings) -> str:
    if settings.lr_schedule == "constant" and settings.warmup_ratio > 0:
        return "constant_with_warmup"
    return settings.lr_schedule
