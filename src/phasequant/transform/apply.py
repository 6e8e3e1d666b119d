r"""Putting a `Transform` into a model: maps folded in fp64, linears replaced by `QuantLinear`s.

For a reader of a norm with gain γ (`norms`), new gain g (γ·c, or c where gains are folded), residual rotation R1 and
online T:

    n(x)·diag(γ)·Wᵀ  =  [ n(xR1)·diag(g)·T ] · W'ᵀ,      W' = W·diag(γ)·R1·diag(1/g)·T^{-T}   (R1 only with folded γ)

g is rounded to the type it will be stored in before W' is computed, so that storing it changes nothing. Where gains or
a residual rotation are folded, tied embeddings are untied first: the head absorbs the final norm's gain and must not
drag the embedding along; `tie_word_embeddings` is set to False in the config, and so saved. Otherwise they stay tied.
All factors of one weight are multiplied in fp64 and rounded once, to fp32 (or kept, for fp64 models). Embedding and
head stay in the model's type.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.console import progress
from phasequant.nn import OnlineMap, QuantLinear, replace_module
from phasequant.numerics import LinearMap
from phasequant.stream import home_of, lazy_of, resident
from phasequant.transform.contract import BlockTransform, Transform, check_folding, check_places
from phasequant.transform.norms import WORK, gain_of, scale_bias, set_gain, stored_gain

ROWS = 4096  # of embeddings and head at once
Dense = tuple[Tensor, Tensor | None]


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


def _weight_in(weight: Tensor, gain: Tensor | None, rotation: LinearMap | None) -> Tensor:
    """W·diag(γ)·R: what a reader of the rotated, gain-free input holds."""
    if gain is not None:
        weight = weight * gain.to(weight)
    return weight if rotation is None else rotation.apply(weight)


def _by_rows(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change a module's large matrix in place, in fp64, some rows at a time; a lazy one when it is made."""
    lazy = lazy_of(module)
    if lazy is not None:
        lazy.change(change)
        return
    for rows in module.get_parameter("weight").data.split(ROWS):
        rows.copy_(change(rows.to(WORK)))


def _write(dense: Dense, out: LinearMap, rows: slice = slice(None)) -> Dense:
    """A writer whose output, or its last `rows`, goes through `out`: y·T."""
    weight, bias = dense
    kept = slice(0, rows.start or 0)
    changed = torch.cat((weight[kept], out.apply(weight[rows].T).T))
    return changed, None if bias is None else torch.cat((bias[kept], out.apply(bias[rows])))


def _new_gain(
    norm: nn.Module, kind: str, scale: Tensor | None, folds: bool, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Give a norm its new gain g (and bias); what its readers' columns are multiplied by before R1, and divided by
    after."""
    old = gain_of(norm, kind)
    one = torch.ones_like(old)
    new = one if folds else old
    if scale is not None:
        new = stored_gain(new * scale.to(new), kind, stored)
    if folds or scale is not None:
        set_gain(norm, kind, new)
    if folds:
        return old, new
    if kind != "layer":  # nothing comes through a gain of 0
        return torch.where(new != 0, old / new.where(new != 0, 1.0), 0.0), one
    if scale is None:
        return one, one
    alive = (old != 0) & (new != 0)
    back = torch.where(alive, old / new.where(alive, 1.0), scale.to(old).reciprocal())
    scale_bias(norm, back.reciprocal())
    return back, one


def transform_block(
    block: nn.Module,
    maps: BlockTransform,
    model_map: ModelMap,
    *,
    residual: LinearMap | None = None,
    folds_norms: bool = False,
    stored: torch.dtype = torch.float32,
) -> None:
    """Change one block in place."""
    family, shape = model_map.family, model_map.shape
    check_places(maps, model_map)
    if folds_norms or residual is not None:
        check_folding(model_map)

    def read(name: str) -> Dense:
        """A linear in fp64, its outputs mapped for those who read them; one at a time, as they are large."""
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        own = linear.bias.detach().to(WORK) if linear.bias is not None else None
        dense: Dense = linear.weight.detach().to(WORK), own
        if maps.value is not None and name == family.value:
            dense = _write(dense, maps.value, model_map.value_rows)
        if "down" in maps.scales and name in family.ups:
            dense = _write(dense, LinearMap.scaling(maps.scales["down"]), model_map.up_rows)
        return dense

    gains: dict[str, tuple[Tensor, Tensor]] = {}
    for group in model_map.groups:
        scale = maps.scales.get(model_map.scale_of(group.name) or "")
        if group.norm is not None and group.norm not in gains:
            norm = block.get_submodule(group.norm)
            gains[group.norm] = _new_gain(norm, family.norm, scale, folds_norms, stored)
            for router in model_map.routers_behind(group.norm):
                _turn_router(block, router, gains[group.norm], residual)
        for name in group.linears:
            weight, bias = read(name)
            if group.norm is not None:
                before, after = gains[group.norm]
                weight = _weight_in(weight, before, residual) / after.to(weight)
            elif scale is not None:
                weight = weight / scale.to(weight)
            if group.name == "o" and maps.value is not None:
                weight = maps.value.for_heads(shape.kv_heads, shape.heads).inverse_transpose().apply(weight)
            online = maps.online(group.name)
            if online is not None:
                weight = online.inverse_transpose().apply(weight)
            if name in family.writers and residual is not None:
                weight, bias = _write((weight, bias), residual)
            _put(block, name, weight, bias, online)


def _turn_router(block: nn.Module, name: str, gains: tuple[Tensor, Tensor], residual: LinearMap | None) -> None:
    """A router behind a norm reads what the norm now gives; its weight stays where it is, in its own type."""
    weight = block.get_submodule(name).get_parameter("weight")
    before, after = gains
    weight.data.copy_(_weight_in(weight.detach().to(WORK), before, residual) / after)


def _put(block: nn.Module, name: str, weight: Tensor, bias: Tensor | None, online: LinearMap | None) -> None:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    kept = torch.promote_types(linear.weight.dtype, torch.float32)
    own = linear.weight.data
    module = QuantLinear.dense(
        own.copy_(weight) if own.dtype == kept and own.is_contiguous() else weight.to(kept).contiguous(),
        bias.to(kept) if bias is not None else None,
        None if online is None else OnlineMap.of(online, kept),
    )
    replace_module(block, name, module.to(linear.weight.device))


@torch.no_grad()
def apply(
    model: PreTrainedModel,
    model_map: ModelMap,
    transform: Transform,
    device: torch.device | None = None,
    stored: torch.dtype | None = None,
) -> None:
    """Change `model` in place; without quantization its logits stay what they were. Blocks visit `device`; gains are
    rounded to `stored` (default: the model's own type)."""
    family = model_map.family
    if transform.folds_norms or transform.residual is not None:
        untie(model, model_map)
    embeddings = model.get_submodule(family.embeddings)
    head = model.get_submodule(family.head)
    stored = stored or embeddings.weight.dtype
    if transform.folds_norms or transform.residual is not None:
        check_folding(model_map)
    if transform.residual is not None:
        _by_rows(embeddings, transform.residual.apply)
    with progress(f"transform ({transform.method})", model_map.shape.blocks) as tick:
        for index in model_map.blocks:
            block = model.get_submodule(model_map.block_name(index))
            change = partial(
                transform_block,
                maps=transform.block(index),
                model_map=model_map,
                residual=transform.residual,
                folds_norms=transform.folds_norms,
                stored=stored,
            )
            lazy = lazy_of(block)
            if lazy is not None:
                lazy.change(block, change)
            else:
                with resident(block, device or home_of(block)):
                    change(block)
            tick()
    gain = None
    if transform.folds_norms:
        norm = model.get_submodule(family.final_norm)
        gain = gain_of(norm, family.norm)
        set_gain(norm, family.norm, torch.ones_like(gain))
    if gain is not None or transform.residual is not None:
        _by_rows(head, lambda rows: _weight_in(rows, gain, transform.residual))
