"""Putting a `Transform` into a model: gains and rotations folded in fp64, linears replaced by `QuantLinear`s.

Tied embeddings are untied first, always: the head absorbs the final norm's gain and must not drag the embedding along;
`tie_word_embeddings` is set to False in the config, and so saved. All factors of one weight are multiplied in fp64 and
rounded once, to fp32 (or kept, for fp64 models). Embedding and head stay in the model's type.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import GroupNames, ModelMap
from phasequant.console import progress
from phasequant.nn import OnlineRotation, QuantLinear, replace_module
from phasequant.numerics import Rotation
from phasequant.stream import resident
from phasequant.transform.contract import Transform

WORK = torch.float64


def per_head(x: Float[Tensor, "*rows N*H"], rotation: Rotation) -> Float[Tensor, "*rows N*H"]:
    """Rotate each head's channels of the last axis."""
    return rotation.apply(x.unflatten(-1, (-1, rotation.size))).flatten(-2)


def across_heads(x: Float[Tensor, "*rows N*H"], rotation: Rotation) -> Float[Tensor, "*rows N*H"]:
    """Mix the heads: channel h of all heads together."""
    return rotation.apply(x.unflatten(-1, (rotation.size, -1)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def untie(model: PreTrainedModel, model_map: ModelMap) -> None:
    """Give the head weights of its own, and say so in the config."""
    head = model.get_submodule(model_map.family.head)
    embeddings = model.get_submodule(model_map.family.embeddings)
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    if getattr(model, "_tied_weights_keys", None):
        model._tied_weights_keys = None
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {}


def _weight_in(weight: Tensor, gain: Tensor | None, rotation: Rotation | None) -> Tensor:
    """W·diag(γ)·R: what a reader of the rotated, gain-free input holds."""
    if gain is not None:
        weight = weight * gain
    return weight if rotation is None else rotation.apply(weight)


def _weight_out(weight: Tensor, rotation: Rotation | None) -> Tensor:
    """Rᵀ·W: what a writer to the rotated output holds."""
    return weight if rotation is None else rotation.apply(weight.T).T


def _online(group: str, transform: Transform, model_map: ModelMap, dtype: torch.dtype) -> OnlineRotation | None:
    if group == "o" and transform.heads is not None:
        return OnlineRotation.of(transform.heads, tail=model_map.shape.d_head, dtype=dtype)
    if group == "down" and transform.down is not None:
        return OnlineRotation.of(transform.down, dtype=dtype)
    return None


def _transformed(
    linear: nn.Linear, name: str, group: str, gain: Tensor | None, transform: Transform, model_map: ModelMap
) -> QuantLinear:
    family = model_map.family
    weight = linear.weight.detach().to(WORK)
    bias = linear.bias.detach().to(WORK) if linear.bias is not None else None
    if name == family.value and transform.value is not None:
        weight = per_head(weight.T, transform.value).T
        bias = per_head(bias, transform.value) if bias is not None else None
    if group == "o":
        if transform.value is not None:
            weight = per_head(weight, transform.value)
        if transform.heads is not None:
            weight = across_heads(weight, transform.heads)
    if group == "down" and transform.down is not None:
        weight = transform.down.apply(weight)
    if model_map.group(group).norm is not None:
        weight = _weight_in(weight, gain, transform.residual)
    if name in family.writers:
        weight = _weight_out(weight, transform.residual)
        if bias is not None and transform.residual is not None:
            bias = transform.residual.apply(bias)
    kept = torch.promote_types(linear.weight.dtype, torch.float32)
    online = _online(group, transform, model_map, kept)
    module = QuantLinear.dense(weight.to(kept).contiguous(), bias.to(kept) if bias is not None else None, online)
    return module.to(linear.weight.device)


def _take_gain(norm: nn.Module) -> Tensor:
    """A norm's gain; the norm keeps ones."""
    weight = norm.get_parameter("weight")
    gain = weight.detach().to(WORK, copy=True)
    weight.data.fill_(1.0)
    return gain


def _transform_group(block: nn.Module, group: GroupNames, transform: Transform, model_map: ModelMap) -> None:
    gain = None
    if group.norm is not None and transform.folds_norms:
        gain = _take_gain(block.get_submodule(group.norm))
    for name in group.linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(block, name, _transformed(linear, name, group.name, gain, transform, model_map))


@torch.no_grad()
def apply(
    model: PreTrainedModel, model_map: ModelMap, transform: Transform, device: torch.device | None = None
) -> None:
    """Change `model` in place; without quantization its logits stay what they were. Blocks visit `device`."""
    family = model_map.family
    untie(model, model_map)
    embeddings = model.get_submodule(family.embeddings)
    head = model.get_submodule(family.head)
    if transform.residual is not None:
        rotated = transform.residual.apply(embeddings.weight.to(WORK))
        embeddings.weight.data = rotated.to(embeddings.weight.dtype)
    with progress(f"transform ({transform.method})", model_map.shape.blocks) as tick:
        for block in model_map.blocks:
            prefix = model_map.block_name(block)
            module = model.get_submodule(prefix)
            with resident(module, device or next(module.parameters()).device):
                for group in model_map.groups:
                    _transform_group(module, group, transform, model_map)
            tick()
    gain = _take_gain(model.get_submodule(family.final_norm)) if transform.folds_norms else None
    head.weight.data = _weight_in(head.weight.to(WORK), gain, transform.residual).to(head.weight.dtype)
