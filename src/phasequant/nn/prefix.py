r"""A prefix: tokens that stand before every sequence, of which only keys and values remain, in 16 bits.

    attention of a user's token over   [ K_p ; K ],  [ V_p ; V ]         K_p, V_p (K, P, H), the same for every sequence

Each attention module holds its K_p (after RoPE) and V_p; the attention function puts them before the keys and values
that it is given, visible to every token (also past a sliding window: a prefix is there to be seen by all). A KV grid
rounds what comes after; the prefix stays as it is, only mapped where keys are.

To everything else the prefix is not there: caches, masks, batches and what `generate` counts are the user's tokens
alone. Only their positions begin at P: a hook on the decoder adds P to the given position ids, or makes them where
none are given (from the attention mask where it pads). So prefill in one piece or in several, padded or not, with a
cache or without, every token sees the same prefix at the same distance.

Costs a token: attention over P keys more; prefill without padding also SDPA's causal fast path, since its mask is
written out (T × (P + T) bits a block). Memory: 2·P·K·H numbers a block, once, whatever the batch.

Sources: QFeP (arXiv 2405.14428) and PrefixQuant (arXiv 2410.05265) for 16-bit prefix states; the rest is ours.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.stream import home_of, visiting

PREFIX = "kv_prefix"  # the attribute of an attention module
LENGTH = "prefix_length"  # the attribute of a decoder
NAME = "phasequant"  # of the attention function (nn.attention)

States = Sequence[tuple[Float[Tensor, "K P H"], Float[Tensor, "K P H"]]]
"""Keys and values of the prefix, by block."""


class PrefixStates(nn.Module):
    """Keys (after RoPE) and values of the prefix in one attention module."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Float[Tensor, "K P H"], values: Float[Tensor, "K P H"]) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.value_map: Any = None  # of a block whose values are being mapped (learning): (P, K·H) → the same

    def states(self, like: Float[Tensor, "B K T H"], quantizer: Any) -> tuple[Tensor, Tensor]:
        """(B, K, P, H) keys and values, mapped as `quantizer` (or nothing) maps what comes after, in the type and
        place of `like`."""
        wide = torch.promote_types(like.dtype, torch.float32)
        keys, values = self.keys.to(wide)[None], self.values.to(wide)
        if quantizer is not None:
            keys = quantizer.rotate_keys(keys)
        if self.value_map is not None:
            flat = self.value_map(values.transpose(0, 1).flatten(1))
            values = flat.unflatten(1, (len(values), -1)).transpose(0, 1)
        batch = len(like)
        return tuple(x.to(like).expand(batch, -1, -1, -1) for x in (keys, values[None]))  # type: ignore[return-value]


def before(
    prefix: PrefixStates,
    quantizer: Any,
    query: Float[Tensor, "B N T H"],
    keys: Float[Tensor, "B K S H"],
    values: Float[Tensor, "B K S H"],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the prefix before them."""
    first, second = prefix.states(keys, quantizer)
    queries, given, more = query.shape[2], keys.shape[2], first.shape[2]
    if mask is None and queries > 1:
        mask = torch.ones(queries, given, dtype=torch.bool, device=query.device).tril(given - queries)[None, None]
    if mask is not None:
        visible = torch.ones if mask.dtype == torch.bool else torch.zeros
        seen = visible(*mask.shape[:-1], more, dtype=mask.dtype, device=mask.device)
        mask = torch.cat((seen, mask), -1)
    return torch.cat((first, keys), 2), torch.cat((second, values), 2), mask


def _offset(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Positions of the user's tokens begin after the prefix."""
    length = getattr(decoder, LENGTH)
    if decoder.config._attn_implementation != NAME:  # type: ignore[union-attr]
        raise PhaseQuantError(
            f"attention '{decoder.config._attn_implementation}' does not see this model's prefix of "  # type: ignore[union-attr]
            f"{length} tokens: leave attn_implementation alone"
        )
    if args:
        kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
    ids = kwargs.get("input_ids")
    given: Tensor = ids if isinstance(ids, Tensor) else kwargs["inputs_embeds"]
    tokens, positions, mask = given.shape[1], kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    elif positions is None:
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = torch.arange(past, past + tokens, device=given.device)[None]
    kwargs["position_ids"] = positions + length
    return (), kwargs


def prefix_length(model: PreTrainedModel, model_map: ModelMap) -> int:
    """Tokens of the model's prefix; 0 where it has none."""
    return int(getattr(model.get_submodule(model_map.family.decoder), LENGTH, 0))


def _attentions(model: PreTrainedModel, model_map: ModelMap) -> Iterator[nn.Module]:
    for block in model_map.blocks:
        yield model.get_submodule(f"{model_map.block_name(block)}.{model_map.family.attention}")


def attach_prefix(model: PreTrainedModel, model_map: ModelMap, states: States) -> None:
    """Give a model its prefix (another one than before, if it had one), and switch to our attention."""
    for attention, (keys, values) in zip(_attentions(model, model_map), states, strict=True):
        device = next((parameter.device for parameter in attention.parameters()), keys.device)
        if device.type == "meta":  # of a streamed block, whose prefix stays in memory; or all is being laid out
            device = keys.device
        setattr(attention, PREFIX, PrefixStates(keys.to(device), values.to(device)))
    decoder = model.get_submodule(model_map.family.decoder)
    if not hasattr(decoder, LENGTH):
        decoder.register_forward_pre_hook(_offset, with_kwargs=True)
    setattr(decoder, LENGTH, states[0][0].shape[1])
    model.config._attn_implementation = NAME
    decoder.config._attn_implementation = NAME


@contextmanager
def without_prefix(model: PreTrainedModel, model_map: ModelMap) -> Iterator[None]:
    """The model as it is without its prefix, for a while."""
    decoder = model.get_submodule(model_map.family.decoder)
    kept = [(a, getattr(a, PREFIX)) for a in _attentions(model, model_map) if hasattr(a, PREFIX)]
    length = getattr(decoder, LENGTH, 0)
    try:
        for attention, _ in kept:
            delattr(attention, PREFIX)
        if kept:
            setattr(decoder, LENGTH, 0)
        yield
    finally:
        for attention, states in kept:
            setattr(attention, PREFIX, states)
        if kept:
            setattr(decoder, LENGTH, length)


@torch.no_grad()
def prefix_states(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokens: Sequence[int],
    stored: torch.dtype,
    device: torch.device | None = None,
) -> list[tuple[Float[Tensor, "K P H"], Float[Tensor, "K P H"]]]:
    """What the blocks of `model`, as it is now but for a prefix, hold of `tokens`: keys after RoPE, values. Rounded to
    `stored`, which is what a checkpoint keeps. The blocks visit `device`, one at a time."""
    decoder = model.get_submodule(model_map.family.decoder)
    cache = DynamicCache()
    with without_prefix(model, model_map), visiting(model, model_map, device):
        home = home_of(model)
        ids = torch.tensor([list(tokens)], device=home)
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    return [(layer.keys[0].to(home, stored), layer.values[0].to(home, stored)) for layer in cache.layers]
