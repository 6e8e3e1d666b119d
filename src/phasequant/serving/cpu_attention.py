"""Attention of a served model on a CPU: torch's SDPA, sequence by sequence, in the calls that Transformers makes.

Four bits amplify: another order of floating-point sums in attention or in a norm, of 1e-7, moves values over the edge
of a 4-bit code, and the logits of a 135 M model then differ by whole nats (LOG.md). So on a CPU, where vLLM is a way to
check and to try rather than to serve many, the sums are Transformers' own, and the tokens are too. Norms, RoPE and acts
are torch's as well (`config`). PHASEQUANT_VLLM_ATTENTION=vllm takes vLLM's kernels: faster for many sequences at once,
right to the same rounding errors, but other tokens where codes lie on an edge.

Keys and values stand in vLLM's own paged cache, (blocks, K, size, H) each, where its block tables say.
"""

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from vllm.model_executor.layers.attention.attention import get_attention_context

from phasequant.errors import PhaseQuantError
from phasequant.nn.softcap import attend

CHOICE = "PHASEQUANT_VLLM_ATTENTION"


class _Like(torch.nn.Module):
    """What Transformers' SDPA asks of the attention module it computes for."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.training = groups, True, False


def chosen(device: torch.device) -> bool:
    """Whether this attention is used."""
    given = os.environ.get(CHOICE, "torch")
    if given not in ("torch", "vllm"):
        raise PhaseQuantError(f"{CHOICE} is torch or vllm, not '{given}'")
    return device.type == "cpu" and given == "torch"


def _paged(cache: Tensor, d_head: int) -> tuple[Tensor, Tensor]:
    """Keys and values, (blocks, K, size, H) each: how the halves of a block's memory are used is ours alone."""
    blocks, kv_heads, size, _ = cache.shape
    keys, values = cache.view(blocks, kv_heads, 2 * size, d_head).chunk(2, 2)
    return keys, values


def _mask(first: int, queries: int, keys: int, prefix: int, window: int | None) -> Tensor | None:
    """None where SDPA's own causal path (or a single query) sees the same."""
    narrow = window is not None and keys - prefix > window
    if not narrow and (queries == 1 or (first == 0 and prefix == 0)):
        return None
    at = torch.arange(first, first + queries)[:, None]
    key = torch.arange(keys)[None]
    seen = key <= at
    if narrow:
        assert window is not None
        seen &= (key > at - window) | (key < prefix)
    return seen[None, None]


def attend_by_sequence(
    layer: Any,
    query: Float[Tensor, "T N H"],
    key: Float[Tensor, "T K H"],
    value: Float[Tensor, "T K H"],
    prefix: int,
) -> Float[Tensor, "T NH"]:
    """Write keys and values to the cache, attend over it; `prefix`: first tokens of every sequence, seen by all, whose
    own outputs nothing reads."""
    told, _, cache, slots = get_attention_context(layer.layer_name)
    out = torch.zeros_like(query)
    if told is None:
        return out.flatten(1)
    keys, values = _paged(cache, layer.head_size)
    size = keys.shape[2]
    kept = slots[: told.num_actual_tokens]
    keys[kept // size, :, kept % size] = key[: len(kept)]
    values[kept // size, :, kept % size] = value[: len(kept)]
    window = layer.sliding_window
    like = _Like(query.shape[1] // key.shape[1])
    starts, lengths = told.query_start_loc.tolist(), told.seq_lens.tolist()
    for request, length in enumerate(lengths):
        begin, end = starts[request], starts[request + 1]
        first = length - (end - begin)
        skip = max(0, prefix - first)
        begin, first = begin + skip, first + skip
        if end <= begin:
            continue
        pages = told.block_table[request, : -(-length // size)].long()
        seen, read = (t[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for t in (keys, values))
        asked = query[begin:end].transpose(0, 1)[None]
        mask = _mask(first, end - begin, length, prefix, window)
        cap = layer.impl.logits_soft_cap or None
        found, _ = attend(like, asked, seen, read, mask, scaling=layer.impl.scale, softcap=cap)
        out[begin:end] = found[0]
    return out.flatten(1)
