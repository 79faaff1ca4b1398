"""What DeepSpeed has spread over the ranks, whole and back again, so that a checkpoint is like one
of any other strategy: weights of stage 3, and an optimizer's state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kto_lightning.ranks import whole_shape

Groups = Sequence[Sequence[nn.Parameter]]
"""The weights of an optimizer's groups, in whose place DeepSpeed puts the parts it steps on."""


@contextmanager
def gathered(value: Tensor, *, changed: bool = False) -> Iterator[None]:
    """Have a weight whole within the block, if it is one of stage 3. Every rank must call it.

    Args:
        value: a weight, or whatever else a model's state holds.
        changed: whether every rank gets its part of what the first makes of it.
    """
    if not hasattr(value, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([value], modifier_rank=0 if changed else None):
        yield


def whole_state(engine: Any, optimizer: Optimizer, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state as it is on one device, gathered tensor by tensor.

    Args:
        engine: DeepSpeed's, which steps this optimizer.
        optimizer: whose groups hold parts.
        groups: the weights that these are parts of.
        keep: whether this rank needs the result; the others get an empty one.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(engine)
    of_parts = next(iter(optimizer.state.values()), {})  # by now all have the same keys
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(chain(*groups) if of_parts else ()):
        state[index] = {}
        for key, value in of_parts.items():
            if not _is_by_weight(value):
                state[index][key] = _copied(value)
                continue
            whole: Any = safe_get_full_optimizer_state(parameter, key)
            if keep:
                state[index][key] = whole.reshape(whole_shape(parameter)).cpu()
    if not keep:
        return {}
    numbered, first = [], 0
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        numbered.append({**group, "params": list(range(first, first + len(parameters)))})
        first += len(parameters)
    return {"state": state, "param_groups": numbered}


def restore_state(
    engine: Any, optimizer: Optimizer, groups: Groups, saved: Mapping[str, Any]
) -> None:
    """Take this rank's part of an optimizer's state.

    Args:
        engine: DeepSpeed's, which steps this optimizer and has not done so yet.
        optimizer: whose groups hold parts.
        groups: the weights that these are parts of.
        saved: as `whole_state`, and `Optimizer.state_dict` on one device, give it.
    """
    for group, then in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in then.items() if key != "params"})
    if not saved["state"]:
        return
    for part in _parts(engine):  # what the first step would make
        optimizer.state[part] = {
            key: torch.zeros_like(part) if _is_by_weight(value) else _copied(value)
            for key, value in saved["state"][0].items()
        }
    _link(engine)
    for index, parameter in enumerate(chain(*groups)):
        for key, value in saved["state"][index].items():
            if _is_by_weight(value):
                _set_part(parameter, key, value.to(parameter.device))


def _parts(engine: Any) -> list[Tensor]:
    """What the optimizer steps on, on this rank."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _link(engine: Any) -> None:
    """Let weights know of their states. DeepSpeed does so after the first group's first step, when
    those of other groups are not there yet, and never again."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: nn.Parameter, key: str, whole: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    part: Any = getattr(parameter, "ds_tensor", None)
    if part is None:
        safe_set_full_optimizer_state(parameter, whole, key)
        return
    # The last parts are filled up with zeros, so that all have one size.
    rank, size = torch.distributed.get_rank(), part.numel()
    filled = nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size()))
    safe_set_local_optimizer_state(parameter, filled[rank * size : (rank + 1) * size], key)


def _is_by_weight(value: Any) -> bool:
    """Whether a part of an optimizer's state has a number for each weight."""
    return isinstance(value, Tensor) and value.ndim > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
