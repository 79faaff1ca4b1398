"""Loading once: rank 0 reads a model, and every rank gets its skeleton and its shards of it.

A rank holds its shards and one whole parameter at most; rank 0 the whole model until the last
parameter is sent, and its shards from then on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kto_lightning.distributed import from_first_rank, is_first_rank, on_all_ranks
from kto_lightning.models.config_checks import load_config, make_empty
from kto_lightning.models.loading import LoadedModel
from kto_lightning.models.policy import Policy
from kto_lightning.models.routes.runner import RouteName
from kto_lightning.models.skeleton import dump_skeleton, load_skeleton

_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' environment variable."""

ShardOf = Callable[[str, DTensor], DTensor]
"""Gives this rank's shard of a parameter, by its name and its empty shard. All ranks call it for
the same parameters in the same order."""

Shard = Callable[[Policy, ShardOf], None]
"""A strategy's: shards a policy, whose parameters are on the device `meta`, over all ranks in place
and gives them their values."""


class LoadedPolicy(NamedTuple):
    """A loaded model on its route."""

    policy: Policy
    obstacles: dict[RouteName, str]
    """Why it does not take each faster route."""
    loaded: LoadedModel
    """Whose model the policy wraps."""
    shard_of: ShardOf | None = None
    """Where the parameters are on the device `meta`: gives each rank its shards, once."""


def load_on_first_rank(
    load: Callable[[], LoadedPolicy], *, trust_remote_code: bool
) -> LoadedPolicy:
    """A policy that is loaded on rank 0 only, on every rank, with its parameters on `meta`.

    Args:
        load: called on rank 0.
        trust_remote_code: see `load_model`.

    Raises:
        OtherRankError: on a rank that has not failed itself, if another has.
    """
    values: dict[str, Tensor] = {}
    on_first: list[LoadedPolicy] = []

    def load_and_dump() -> tuple[str, bytes]:
        with _reading_in_turn():
            loaded = load()
        values.update(take_values(loaded.policy))
        on_first.append(loaded)
        return str(loaded.policy.causal_lm.name_or_path), dump_skeleton(tuple(loaded))

    name, skeleton = from_first_rank(load_and_dump)

    def restore() -> LoadedPolicy:
        # For what it changes in this process: constructors fill registries of transformers, choose
        # the kernels of a module's functions, and import the code that comes with a model.
        make_empty(
            name,
            load_config(name, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
        return LoadedPolicy(*load_skeleton(skeleton))

    loaded = on_all_ranks(on_first.pop if is_first_rank() else restore)
    return loaded._replace(shard_of=_scattered(values))


@contextmanager
def _reading_in_turn() -> Iterator[None]:
    """Let transformers read one tensor after the other: its threads read ahead, up to the whole
    file beside the model, where the file has another type than the model."""
    given = os.environ.get(_IN_TURN)
    os.environ[_IN_TURN] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[_IN_TURN]
        else:
            os.environ[_IN_TURN] = given


def take_values(policy: Policy) -> dict[str, Tensor]:
    """Move a policy's parameters to the device `meta`; returns their values, by name."""
    values: dict[str, Tensor] = {}

    def empty(name: str, parameter: nn.Parameter) -> Tensor:
        values[name] = parameter.detach()
        return torch.empty_like(parameter, device="meta", memory_format=torch.contiguous_format)

    _replace_parameters(policy, empty)
    return values


def fill_shards(policy: Policy, shard_of: ShardOf, *, on_host: bool) -> None:
    """Give a sharded policy on the device `meta` its values.

    Args:
        on_host: keep the shards in host memory, see FSDP2's `CPUOffloadPolicy`.
    """

    def fill(name: str, parameter: Any) -> Tensor:
        own = shard_of(name, parameter)
        return own.cpu() if on_host else own

    _replace_parameters(policy, fill)


def copy_shards(policy: Policy) -> ShardOf:
    """Gives copies of the shards of a policy that is sharded alike."""
    own: dict[str, Any] = dict(policy.named_parameters())
    return lambda name, parameter: own[name].detach().clone()


def _scattered(values: dict[str, Tensor]) -> ShardOf:
    """Sends every rank its shards of rank 0's values, which are freed one by one."""

    def shard_of(name: str, parameter: DTensor) -> DTensor:
        mesh = parameter.device_mesh
        if is_first_rank():
            whole = values.pop(name).to(mesh.device_type).contiguous()
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
        return distribute_tensor(whole, mesh, parameter.placements)

    return shard_of


def _replace_parameters(policy: Policy, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Replace every parameter; one that is tied is made once, and stays tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in policy.named_modules():
        own = list(module.named_parameters(prefix, recurse=False, remove_duplicate=False))
        for name, parameter in own:
            if parameter not in made:
                value = make(name, parameter)
                made[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name.rpartition(".")[2], made[parameter])
