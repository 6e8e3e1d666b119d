r"""Attention whose scores are capped, as Gemma 2's are, or that has sinks, as gpt-oss' has.

    softmax( cap·tanh(q·kᵀ·s / cap) + mask )·v            sinks: one more score a head in the softmax, with no value

Transformers' SDPA leaves both out without a word, so here they are written out; at N·T·S numbers of scores a sequence
in memory, as in Transformers' eager attention, whose numbers these are (softmax in at least fp32). A model whose config
names a cap is given our attention function when it is opened, in 16 bits too: what quantization is measured against
must be the model itself.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from phasequant.arch import ModelMap


def capped_attention(
    query: Float[Tensor, "B N T H"],
    key: Float[Tensor, "B K S H"],
    value: Float[Tensor, "B K S H"],
    mask: Tensor | None,
    *,
    scale: float,
    cap: float | None = None,
    sinks: Float[Tensor, " N"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "B N T H"]:
    """`mask`: True or 0 where a key is seen; None: those up to the query, as SDPA's `is_causal` has it."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        own = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, own), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    shares = torch.softmax(scores, -1, dtype=wide).to(query.dtype)
    return shares[..., : key.shape[-2]] @ value


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' SDPA, or `capped_attention` where the model calls for a cap or has sinks (`s_aux`)."""
    cap, sinks = options.get("softcap"), options.get("s_aux")
    if cap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    causal = options.get("is_causal")
    found = capped_attention(
        query,
        key,
        value,
        attention_mask,
        cap=cap,
        sinks=sinks,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
    )
    return found.transpose(1, 2).contiguous(), None


def is_capped(model: PreTrainedModel, model_map: ModelMap) -> bool:
    """Whether a model's attention scores are capped."""
    name = model_map.family.softcap
    return name is not None and getattr(model.config, name, None) is not None


def logits_of(model: PreTrainedModel, model_map: ModelMap, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
    """What a model makes of the residual after its last block: final norm, head, and the cap of logits where it has
    one."""
    norm, head = (model.get_submodule(name) for name in (model_map.family.final_norm, model_map.family.head))
    return capped_logits(model, model_map, head(norm(hidden[None]))[0])


def capped_logits(
    model: PreTrainedModel, model_map: ModelMap, logits: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    """What the head gives, divided where the model divides it, and capped where it caps it."""
    divisor, cap = (
        None if name is None else getattr(model.config, name, None)
        for name in (model_map.family.logit_divisor, model_map.family.logit_softcap)
    )
    logits = logits if divisor is None else logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap
