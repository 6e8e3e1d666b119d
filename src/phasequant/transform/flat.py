r"""FlatQuant: Kronecker maps, head maps, scales and clips, learned block by block (arXiv 2410.09426).

    qkv, gate_up, down   x·diag(c)·(A ⊗ B)    online: n·(a + b) multiply-adds a token, n = a·b as square as can be;
                                               c folded into the norm's gain and bias, or into up's rows, where
                                               there is one; linears behind one norm share one c
    o                    y·(M ⊗ I_H)           online: N·(N·H)
    value                V by kv head          folded into v, its inverse into o; the V cache is rounded in it (where
                                               v is a linear of its own)
    keys, queries        k·P, q·P^{-T}         online, (N + K)·H², where the KV cache is quantized

with A, B, M, P any invertible matrices; weights hold the inverse. Learned with `blockwise`: every block alone, its
output in 4 bits against its output in 16, on the 16-bit model's inputs, with the bits that the plan gives it.

Sizes: any width. n = a·b with the squarest factors; where the larger of them exceeds 512 (a large prime in n) the next
rung is taken, and said: one dense matrix up to n = 512, blocks of the largest divisor up to 512, and below blocks of
16 scales alone.

Where it begins (`learning.start`): Hadamard factors (default), random orthogonal ones (FlatQuant's), or WUSH's closed
form, whose block-diagonal maps are then what is learned. Other than in FlatQuant the factors themselves are the
parameters, not their singular value decomposition under a Cayley map: one small inverse a step instead of four solves.
Scales begin at w_max^0.7 / x_max^0.3 (`transform.alpha` is the 0.3).
"""

from dataclasses import replace

import torch
from torch import Tensor

from phasequant.console import note
from phasequant.numerics import LinearMap, hadamard, random_orthogonal, spreading_mix, spreading_rotation
from phasequant.numerics.hadamard import is_order
from phasequant.stream import Step
from phasequant.transform.blockwise import learn_blocks
from phasequant.transform.contract import MAPS, BlockTransform, Task, Transform
from phasequant.transform.gather import Largest, gather, group_weight
from phasequant.transform.quarot import fixed_rotations
from phasequant.transform.wush import align_block, block_orders, wush

MAPPED = ("qkv", "gate_up", "down")
ALPHA = 0.3
LARGEST_FACTOR = 512
SMALLEST_BLOCK = 16


def squarest(n: int) -> tuple[int, int]:
    """(a, b), a ≤ b, n = a·b with the least a + b."""
    a = next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)
    return a, n // a


def _factor(order: int, start: str, seed: int) -> Tensor:
    if start == "random" or not is_order(order):
        return random_orthogonal(order, seed)
    return hadamard(order)


def kronecker_start(n: int, start: str, seed: int) -> LinearMap | None:
    """The map of width n before it is learned; None on the last rung."""
    a, b = squarest(n)
    if b <= LARGEST_FACTOR and a > 1:
        return LinearMap.kronecker(_factor(a, start, seed), _factor(b, start, seed + 1))
    if n <= LARGEST_FACTOR:
        return LinearMap.dense(_factor(n, start, seed))
    block = max(d for d in range(1, LARGEST_FACTOR + 1) if n % d == 0)
    if block < SMALLEST_BLOCK:
        return None
    left = torch.stack([_factor(block, start, seed + i) for i in range(n // block)])
    return LinearMap.dense(left, "block-diagonal")


def _begin(task: Task) -> Transform:
    shape, learning = task.map.shape, task.learning
    base = fixed_rotations(task.map, task.seed, "online", "flat")
    maps = {group: kronecker_start(task.map.width_in(group), learning.start, task.seed) for group in MAPPED}
    for group, found in maps.items():
        if found is None or found.kind != "kronecker":
            note(f"flat: {group} is {task.map.width_in(group)} wide, which has no two factors up to "
                 f"{LARGEST_FACTOR}: taken is {found or 'no map, scales alone'}")  # fmt: skip
    block = base.block(0).with_maps(maps)
    if block.value is not None:
        if learning.start == "random":
            heads = torch.stack([random_orthogonal(shape.d_head, task.seed + i) for i in range(shape.kv_heads)])
        else:
            one = spreading_rotation(shape.d_head, task.seed).matrix()
            heads = one.expand(shape.kv_heads, -1, -1)
        block = replace(block, value=LinearMap.dense(heads))
    block = replace(
        block,
        heads=spreading_mix(shape.heads, shape.d_head, task.seed) if shape.heads > 1 else None,
        qk=LinearMap.dense(spreading_rotation(shape.d_head, task.seed).matrix()) if task.kv is not None else block.qk,
    )
    return Transform.alike("flat", task.map, block)


def _start_scales(step: Step, task: Task) -> dict[str, Tensor]:
    """c = w_max^{1-α} / x_max^α of every group that can carry scales; geometric mean 1."""
    alpha = ALPHA if task.part.alpha is None else task.part.alpha
    peaks = {group: Largest() for group in task.map.scaled}
    with gather(step.block, task.map, inputs=peaks):
        for _ in step.probe():
            pass
    found = {}
    for group in task.map.groups:
        if group.name in peaks:
            x_max = peaks[group.name].value
            assert x_max is not None
            w_max = group_weight(step.block, task.map.sharing(group.name)).abs().amax(0)
            c = w_max.clamp(min=1e-5).pow(1 - alpha) / x_max.clamp(min=1e-5).pow(alpha)
            c = torch.where((x_max > 0) & (w_max > 0), c, 1.0).log()
            found[group.name] = (c - c.mean()).exp().to("cpu", torch.float64)
    return found


def flat_draft(task: Task) -> Transform:
    """What stands in for `flat` while its plan is made: WUSH's closed form where learning begins there."""
    return wush(task) if task.learning.start == "wush" else flat(task)


def flat(task: Task) -> Transform:
    """FlatQuant's transform of a model."""
    learning = task.learning
    start = _begin(task)
    orders = block_orders(task) if learning.start == "wush" else {}

    def begin(step: Step, block: BlockTransform) -> BlockTransform:
        if learning.start == "wush":
            block = align_block(step, task, block, orders)
        if learning.scales and learning.start != "wush":
            block = replace(block, scales=_start_scales(step, task))
        return block

    wanted = set(MAPPED)
    wanted |= {"value", "heads"} if learning.values else set()
    wanted |= {"qk"} if learning.keys else set()
    made = learn_blocks(task, start, maps=frozenset(wanted) & frozenset(MAPS), scales=learning.scales, begin=begin)
    return replace(made, method="flat" if learning.start != "wush" else "flat+wush")
