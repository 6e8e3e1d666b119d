r"""WUSH: the best block-diagonal transform in closed form, from second moments (arXiv 2512.00956).

For a block of B channels with Σ_x = E[xxᵀ] and Σ_w = Σ_o w_o·w_oᵀ/O over all weights that read them (columns here):

    Σ_x = U_cᵀ·U_c  (Cholesky, 1 % damping)        U_c·Σ_w·U_cᵀ = V·S²·Vᵀ        T = H·S^{1/2}·Vᵀ·U_c^{-T}
    T·Σ_x·Tᵀ = H·S·Hᵀ = T^{-T}·Σ_w·T^{-1}

so activations and weights come to the same second moments, spread by a Hadamard H: CAT's optimal alignment
(arXiv 2603.04359) at the price of a Cholesky and an eigendecomposition. Eigenvalues get 1 % of their mean added.

    online    T before qkv, gate_up and down: B multiply-adds a channel and token (B = `transform.block`, 128 or the
              largest divisor of the width below it)
    folded    the map of v by kv head, its inverse in o (where v is a linear of its own): T for o costs nothing; M and
              R3 as in QuaRot, online

Works alone, and as a start for `flat` (`learning.start: wush`), which then learns block-diagonal maps.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.console import note
from phasequant.numerics import LinearMap, hadamard, random_orthogonal
from phasequant.numerics.hadamard import is_order
from phasequant.stream import BlockStream, Step
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.gather import SecondMoments, gather, group_weight
from phasequant.transform.quarot import fixed_rotations

DAMPING = 0.01
SMALLEST = 8


def block_order(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, one with a Hadamard matrix where there is one not half as large."""
    divisors = [d for d in range(1, min(n, most) + 1) if n % d == 0]
    best = divisors[-1]
    spread = [d for d in divisors if is_order(d) and 2 * d >= best]
    return spread[-1] if spread else best


def aligning(
    moments_x: Float[Tensor, "m B B"], moments_w: Float[Tensor, "m B B"], seed: int = 0
) -> Float[Tensor, "m B B"]:
    """Tᵀ of every block, for rows: x → x·Tᵀ."""
    order = moments_x.shape[-1]
    eye = torch.eye(order, dtype=moments_x.dtype, device=moments_x.device)

    def damped(moments: Tensor) -> Tensor:
        mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return moments + (DAMPING * mean + torch.finfo(moments.dtype).tiny) * eye + 1e-12 * eye

    lower = torch.linalg.cholesky(damped(moments_x))  # = U_cᵀ
    squares, v = torch.linalg.eigh(lower.transpose(-1, -2) @ moments_w @ lower)
    s = squares.clamp(min=0).sqrt()
    s = s + DAMPING * s.mean(-1, keepdim=True) + 1e-12
    spread = hadamard(order) if is_order(order) else random_orthogonal(order, seed)
    # Tᵀ = U_c^{-1}·V·S^{1/2}·Hᵀ
    inner = torch.linalg.solve_triangular(lower.transpose(-1, -2), v * s.sqrt()[:, None], upper=True)
    found: Tensor = inner @ spread.T.to(inner)
    return found


def _weight_moments(weight: Float[Tensor, "O I"], size: int) -> Float[Tensor, "m B B"]:
    parts = weight.double().unflatten(-1, (-1, size)).transpose(0, 1)
    return parts.transpose(-1, -2) @ parts / len(weight)


def block_orders(task: Task) -> dict[str, int]:
    """Group → order of the blocks of its map."""
    orders = {g.name: block_order(task.map.width_in(g.name), task.part.block) for g in task.map.groups}
    orders["o"] = task.map.shape.d_head
    for group, order in orders.items():
        if order < SMALLEST < task.map.width_in(group):
            note(f"wush: {group} is {task.map.width_in(group)} wide, and its largest block up to "
                 f"{task.part.block} is {order}: little is spread there")  # fmt: skip
    return orders


def align_block(step: Step, task: Task, start: BlockTransform, orders: dict[str, int]) -> BlockTransform:
    """One block's maps from its own inputs; runs the step."""
    shape = task.map.shape
    moments = {group.name: SecondMoments(orders[group.name]) for group in task.map.groups}
    with gather(step.block, task.map, inputs=moments):
        step.drain()
    maps: dict[str, LinearMap] = {}
    for group in task.map.groups:
        x = moments[group.name].mean
        w = _weight_moments(group_weight(step.block, group.linears), orders[group.name]).to(x.device)
        if group.name == "o" and task.map.family.value is None:
            continue
        if group.name == "o":  # query heads of one kv head share its map
            x, w = (z.unflatten(0, (shape.kv_heads, -1)).mean(1) for z in (x, w))
        found = aligning(x, w, task.seed).cpu()
        maps["value" if group.name == "o" else group.name] = LinearMap.dense(found, "wush")
    return start.with_maps(maps)


def wush(task: Task) -> Transform:
    """WUSH's transform of a model."""
    assert task.tokens is not None
    base = fixed_rotations(task.map, task.seed, "online", "wush")
    orders = block_orders(task)
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    blocks = [align_block(step, task, base.block(step.index), orders) for step in stream.steps("wush")]
    return replace(base, blocks=tuple(blocks))
