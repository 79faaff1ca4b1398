"""Capped scores and attention sinks on a GPU: FlexAttention (arXiv:2412.05496) in a run's segments.

A sink takes the log-sum-exp of the scores. FlexAttention's backward knows the gradient of it, that
of `varlen_attn` does not.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kto_lightning.models.packed_run import PackedRun
from kto_lightning.models.row_indices import to_device

try:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
except ImportError:  # a build of torch without it
    flex_attention = None

_BLOCK_SIZE = 128
"""Queries and keys of a block; a block of which no query sees a key is skipped."""
_HEAD_SIZES = range(16, 257)
"""Smaller ones the kernel does not take, and larger ones do not fit a GPU's shared memory."""
_failures: list[str] = []
"""Why it cannot be compiled on this machine."""


def can_use_flex(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether `attend_flex` takes these. Runs within one block are too small for a kernel that is
    compiled for them."""
    return (
        flex_attention is not None
        and not _failures
        and query.is_cuda
        and query.shape[2] > _BLOCK_SIZE
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in _HEAD_SIZES
        and value.shape[-1] in _HEAD_SIZES
        and dropout == 0.0
    )


def attend_flex(
    query: Float[Tensor, "1 heads tokens head_size"],
    key: Float[Tensor, "1 kv_heads kv_tokens head_size"],
    value: Float[Tensor, "1 kv_heads kv_tokens value_size"],
    run: PackedRun,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "1 tokens heads value_size"] | None:
    """Attention in all segments with one kernel.

    Returns:
        None where the kernel cannot be compiled on this machine, which is warned of once.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if window not in run.block_masks:
        run.block_masks[window] = _block_mask(run, window, query.device)
    score = _score_function(scaling, softcap, query.device)
    try:
        attended, lse = _compiled()(query, key, value, score, run.block_masks[window])
    except _compile_errors() as error:
        _failures.append(str(error).strip().partition("\n")[0])
        warnings.warn(
            "FlexAttention cannot be compiled on this machine, so that attention with capped "
            f"scores or sinks runs one sequence at a time, which is slower: {_failures[-1]}",
            stacklevel=2,
        )
        return None
    if sinks is not None:
        # exp(lse) / (exp(lse) + exp(sink)): the share of the keys in a softmax with a sink.
        share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
        attended = (attended * share[..., None]).to(value.dtype)
    return attended.transpose(1, 2).contiguous()


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc  # slow to import, and imported where anything was compiled

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """`_attend` for lengths as symbols: one compilation is for runs of any length.

    A whole graph or an error: what is not compiled makes a table of all scores.
    """
    return torch.compile(_attend, dynamic=True, fullgraph=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, score: Callable[..., Tensor], block_mask: Any
) -> tuple[Tensor, Tensor | None]:
    assert flex_attention is not None
    attended, auxiliary = flex_attention(
        query,
        key,
        value,
        score_mod=score,
        block_mask=block_mask,
        scale=1.0,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return attended, auxiliary.lse


@lru_cache(maxsize=16)
def _score_function(
    scaling: float, softcap: float | None, device: torch.device
) -> Callable[..., Tensor]:
    """From the product of a query and a key to its score.

    The factors are tensors. Numbers would become symbols like the lengths, which the compiler does
    not take in a score.
    """
    if softcap is None:
        factor = torch.full((), scaling, dtype=torch.float32, device=device)
        return lambda product, batch, head, query, key: product * factor
    inner = torch.full((), scaling / softcap, dtype=torch.float32, device=device)
    outer = torch.full((), softcap, dtype=torch.float32, device=device)
    return lambda product, batch, head, query, key: torch.tanh(product * inner) * outer


def _block_mask(run: PackedRun, window: int | None, device: torch.device) -> Any:
    first, last = run.visible_keys(window)
    num_keys = sum(run.kv_lengths)
    partial, full = visible_blocks(first, last, num_keys)
    first_key, last_key = _indices_on(first, device), _indices_on(last, device)
    return BlockMask.from_kv_blocks(
        *_block_table(partial, device),
        *_block_table(full, device),
        BLOCK_SIZE=_BLOCK_SIZE,
        mask_mod=lambda batch, head, query, key: (
            (first_key[query] <= key) & (key <= last_key[query])
        ),
        seq_lengths=(len(first), num_keys),
    )


def visible_blocks(
    first: np.ndarray, last: np.ndarray, num_keys: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of queries and keys of which some pairs can be visible, and of which all are.

    Args:
        first: the first key that each query sees.
        last: the last one.
        num_keys: of the whole run.

    Returns:
        two tables `[blocks of queries, blocks of keys]`, bool; no block is in both.
    """
    starts = np.arange(0, len(first), _BLOCK_SIZE)
    key_starts = np.arange(0, num_keys, _BLOCK_SIZE)
    key_ends = key_starts + _BLOCK_SIZE - 1

    def of_block(extreme: np.ufunc, keys: np.ndarray) -> np.ndarray:
        return extreme.reduceat(keys, starts)[:, None]

    some = (of_block(np.minimum, first) <= key_ends) & (of_block(np.maximum, last) >= key_starts)
    full = (of_block(np.maximum, first) <= key_starts) & (of_block(np.minimum, last) >= key_ends)
    return some & ~full, full


def _block_table(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and the indices of all, these first."""
    counts, indices = blocks.sum(1), np.argsort(~blocks, axis=1, kind="stable")
    return _indices_on(counts, device)[None, None], _indices_on(indices, device)[None, None]


def _indices_on(indices: np.ndarray, device: torch.device) -> Tensor:
    return to_device(indices.astype(np.int32), device)
