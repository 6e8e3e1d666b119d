"""The attention function and the cache of models with a quantized KV or a prefix: registered with Transformers.

Transformers calls `past_key_values.update(k, v, layer)` after RoPE and hands its result to the attention function. With
our cache that result is packed; without a cache the function rounds k and v itself, to the same numbers. Attention
then is Transformers' own SDPA over the dequantized states (`softcap` has the exception; on a GPU one kernel
dequantizes), or, of one new token a row on a GPU, Triton's over the codes as they are (`kernels.gpu.attention`).
`attended` tells which was.

`attach` gives a model its `KVQuantizer`s and sees to it that `generate` caches in packed layers: a fresh default cache
is refitted before its first token. A cache that cannot be (static, or already filled in 16 bits) is said so once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from phasequant.arch import ModelMap
from phasequant.console import warn
from phasequant.errors import PhaseQuantError
from phasequant.nn.kv import KVQuantizer, PackedLayer, PackedStates
from phasequant.nn.prefix import NAME, PREFIX, PrefixStates, before
from phasequant.nn.softcap import attend

ATTENTION = NAME
SLOT = "kv_quantizer"  # the attribute of an attention module
SDPA, TRITON = "sdpa over dequantized", "triton kv4 decode"


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    *,
    rotated: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the prefix, if there is one, and keys and values that went through the KV grid, if there is one.
    query (B,N,T,H); key, value (B,K,T,H) or packed. `rotated`: the query was mapped as the keys are (R3)."""
    quantizer = getattr(module, SLOT, None)
    prefix = getattr(module, PREFIX, None)
    if quantizer is not None and quantizer.enabled:
        query = query if rotated else quantizer.rotate_queries(query)
        if isinstance(key, PackedStates):
            quantizer.attended, _ = attention_kernel(quantizer, query, key, attention_mask, **options)
            if quantizer.attended == TRITON:
                return _decode(quantizer, prefix, query, key, value, attention_mask, **options)
            attention_mask = _within(key, query.shape[2], attention_mask)
        else:
            key, value = quantizer.encode(key, value)
        key, value = (_dequantized(quantizer, states, query.dtype) for states in (key, value))
    else:
        quantizer = None
    if prefix is not None:
        key, value, attention_mask = before(prefix, quantizer, query, key, value, attention_mask)
    return attend(module, query, key, value, attention_mask, **options)


def attention_kernel(
    quantizer: KVQuantizer, query: Tensor, key: PackedStates, mask: Tensor | None, **options: Any
) -> tuple[str, str]:
    """What computes attention over a packed cache, and why."""
    if query.shape[2] != 1:
        return SDPA, "more than one new token a row"
    if query.requires_grad or options.get("dropout"):
        return SDPA, "a step of training"
    if options.get("position_bias") is not None:
        return SDPA, "scores with a bias"
    if options.get("s_aux") is not None:
        return SDPA, "a sink a head"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] != key.length):
        return SDPA, "a mask of numbers, or one a head"
    ok, reason = quantizer.by_triton(query.dtype, query.device)
    return (TRITON if ok else SDPA), reason


def _dequantized(quantizer: Any, states: Any, dtype: torch.dtype) -> Tensor:
    """What attention reads; `quantizer` may be one that stands in (sensitivities, learning)."""
    if not isinstance(states, PackedStates) or states.scale.requires_grad:
        return quantizer.decode(states, dtype)
    if not quantizer.by_triton(dtype, states.codes.device)[0]:
        return quantizer.decode(states, dtype)
    from phasequant.kernels.gpu.kv import read_kv

    return read_kv(*states.parts, quantizer.d_head, dtype, states.length)


def _decode(
    quantizer: KVQuantizer,
    prefix: PrefixStates | None,
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from phasequant.kernels.gpu.attention import decode_attention

    scale, first = options.get("scaling"), None
    if prefix is not None:
        keys, values = prefix.states(query, quantizer)
        first = keys[0], values[0]
    out = decode_attention(
        query[:, :, 0],
        key.parts,
        value.parts,
        key.lengths,
        first,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        mask=None if mask is None else mask[:, 0, 0],
        window=None if mask is None else options.get("sliding_window"),  # without a mask all tokens are near enough
        softcap=options.get("softcap"),
    )
    return out[:, None], None


def _within(key: PackedStates, tokens: int, mask: Tensor | None) -> Tensor | None:
    """The mask of the last `tokens` of rows that have their own lengths."""
    if key.lengths is None:
        return mask
    slots, steps = (torch.arange(n, device=key.lengths.device) for n in (key.length, tokens))
    ends = key.lengths[:, None] - tokens + 1 + steps
    seen = (slots < ends[..., None])[:, None]
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def attended(model: nn.Module) -> set[str]:
    """What computed the last attention over packed caches, in all layers."""
    return {quantizer.attended for quantizer in quantizers(model) if quantizer.attended is not None}


AttentionInterface.register(ATTENTION, quantized_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class PackedCache(Cache):
    """A Transformers cache whose layers hold codes. `nbytes` is what it really takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(layers=packed_layers(model))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def quantizers(model: nn.Module) -> list[KVQuantizer]:
    """The KV grids of a model, by layer; empty where its KV is 16-bit."""
    return [module for module in model.modules() if isinstance(module, KVQuantizer)]


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    """A fresh packed layer for every attention module."""
    return [PackedLayer(quantizer) for quantizer in quantizers(model)]


@cache
def _warn_once(kind: str) -> None:
    warn(
        f"a {kind} holds keys and values in 16 bits (what attention reads is still rounded to the model's KV grid): "
        "leave the cache to generate() for packed memory"
    )


def _refit_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each forward: make the cache a packed one while it is still empty."""
    if not all(quantizer.enabled for quantizer in quantizers(model)):
        return args, kwargs
    if model.config._attn_implementation != ATTENTION:
        raise PhaseQuantError(
            f"attention '{model.config._attn_implementation}' would read a 16-bit KV cache, and this model promises "
            f"{quantizers(model)[0].layout.keys.bits} bits: leave attn_implementation alone"
        )
    if len(args) > 1:  # by name: the cache stands at another position in every family's forward
        kwargs |= dict(zip(signature(model.forward).parameters, args, strict=False))
        args = ()
    given = kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = model.config.use_cache
    if given is None and use_cache:
        kwargs["past_key_values"] = PackedCache(model)
    elif isinstance(given, DynamicCache) and not any(layer.get_seq_length() for layer in given.layers):
        given.layers = packed_layers(model)
        given.layer_class_to_replicate = None
    elif given is not None and not all(isinstance(layer, PackedLayer) for layer in given.layers):
        _warn_once(type(given).__name__)
    return args, kwargs


@contextmanager
def kv_in_16_bits(model: nn.Module) -> Iterator[None]:
    """Let a model keep its keys and values in 16 bits, for a while: to measure what its KV grid costs."""
    found = quantizers(model)
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in found:
            quantizer.enabled = True


def switch_attention(model: PreTrainedModel, model_map: ModelMap) -> None:
    """Have a model use our attention function."""
    model.config._attn_implementation = ATTENTION
    decoder = model.get_submodule(model_map.family.decoder)
    decoder.config._attn_implementation = ATTENTION


def attach(model: PreTrainedModel, model_map: ModelMap, make: Callable[[int], KVQuantizer]) -> None:
    """Give every block's attention the `KVQuantizer` that `make(block)` returns, and switch to our attention."""
    for block in model_map.blocks:
        attention = model.get_submodule(f"{model_map.block_name(block)}.{model_map.family.attention}")
        setattr(attention, SLOT, make(block))
    switch_attention(model, model_map)
    model.register_forward_pre_hook(_refit_cache, with_kwargs=True)


def kv_bytes_per_token(model: PreTrainedModel, model_map: ModelMap) -> int:
    """Bytes a cached token takes over all layers; a 16-bit KV counts two bytes a number."""
    found = quantizers(model)
    shape = model_map.shape
    if found:
        return sum(quantizer.bytes_per_token(shape.kv_heads) for quantizer in found)
    return shape.blocks * 2 * shape.kv_heads * shape.d_head * torch.finfo(torch.float16).bits // 8
