r"""FRTQ's flattened rotations: uniform preconditioning, then DFRot's refinement; no gradients.

The grid-to-std ratio of a token, ρ = max|x| / (7·std), sets its rounding error (NMSE = ρ²/12): 0.247 for uniformly
spread values, the floor, 0.46 and more for Gaussian ones, which is all that a Hadamard makes. Preconditioning pulls
every token's values to the uniform ones:

    repeat 30 times   Z = A·R      B_ij = ‖z_i‖/‖u‖ · u_rank(z_ij),  u equispaced in [-1, 1]      R ← Procrustes(A, B)
    then DFRot's alternation (`dfrot`), massive tokens times α

B is each token's own values in their order, moved to equal distances; `rotation.target: sign` takes ±‖z‖/√D instead.
Applied to R1 (or, online, after every norm), to R2 of every kv head (over v's outputs, a head a row), to the mixing M
of heads (over o's inputs), and to R4 where `rotation.down: learned`. R3 stays a Hadamard. 1 × 2048 tokens suffice.

    folded   R1, R2: free          online   M, R3, R4, as in QuaRot, at the same cost: only their entries differ

Source: FRTQ (OpenReview mUB2N8L0vD), of which abstract and reviews could be read; the uniform target is our reading of
"equalize per-row magnitudes" (a review). FRTQ's weight half, the tuned SVD, belongs to `weight/`.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.console import progress
from phasequant.numerics import LinearMap, procrustes_step
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.dfrot import GRID, Refine, Samples, alternate, fit_down, fit_readers, sample
from phasequant.transform.quarot import fixed_rotations


def uniform_target(z: Float[Tensor, "T n"]) -> Float[Tensor, "T n"]:
    """Each row's values moved to equal distances in their own order, its norm kept."""
    n = z.shape[-1]
    spread = torch.linspace(-1.0, 1.0, n, dtype=z.dtype, device=z.device)
    spread = spread / spread.norm()
    ordered = torch.empty_like(z).scatter_(-1, z.argsort(-1), spread.expand_as(z))
    return ordered * z.norm(dim=-1, keepdim=True)


def sign_target(z: Float[Tensor, "T n"]) -> Float[Tensor, "T n"]:
    """Each row's signs, its norm kept."""
    return torch.where(z >= 0, 1.0, -1.0) * z.norm(dim=-1, keepdim=True) / z.shape[-1] ** 0.5


TARGETS = {"uniform": uniform_target, "sign": sign_target}


def precondition(
    rows: Float[Tensor, "T n"], rotation: LinearMap, steps: int, target: str = "uniform", span: int | None = None
) -> LinearMap:
    """Pull every row (or every `span` neighbours of it) to `target`."""
    pull = TARGETS[target]
    for _ in range(steps):
        z = rotation.apply(rows)
        goal = pull(z) if span is None else pull(z.unflatten(-1, (-1, span)).flatten(0, -2)).reshape(z.shape)
        rotation = procrustes_step(rows, goal, rotation)
    return rotation


def _unweighted(rows: Float[Tensor, "T n"]) -> Float[Tensor, "T n"]:
    """Rows at one norm: preconditioning treats all tokens alike."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-20)


def _inner(task: Task, samples: Samples, start: Transform) -> Transform:
    """R2 by kv head and the mixing of heads."""
    part, shape = task.rotation, task.map.shape
    by_head = replace(GRID, granularity="group", group_size=shape.d_head)

    def change(index: int, block: BlockTransform) -> BlockTransform:
        value, heads = block.value, block.heads
        if value is not None:
            own = value.matrix().unflatten(0, (shape.kv_heads, -1)).unflatten(-1, (shape.kv_heads, -1))
            own = torch.stack([own[k, :, k] for k in range(shape.kv_heads)])
            value = LinearMap.dense(own, value.kind)
            rows = _unweighted(samples.values[index])
            value = precondition(rows, value, part.preconditioning, part.target, shape.d_head)
            value = alternate(rows, value, part.iterations, by_head)
        if heads is not None:
            rows = _unweighted(samples.heads[index])
            seen = rows if value is None else value.for_heads(shape.kv_heads, shape.heads).apply(rows)
            heads = precondition(seen, heads, part.preconditioning, part.target)
            heads = alternate(seen, heads, part.iterations)
        tick()
        return replace(block, value=value, heads=heads)

    with progress("frtq: rotations of values and heads", shape.blocks) as tick:
        return start.changed(change)


def frtq(task: Task) -> Transform:
    """FRTQ's rotations of a model."""
    part = task.rotation
    start = fixed_rotations(task.map, task.seed, part.where, "frtq", part.heads, part.online)
    down = part.down == "learned" and part.online
    samples = sample(task, values=True, down=down)

    def refine(rows: Tensor, rotation: LinearMap) -> LinearMap:
        rotation = precondition(_unweighted(rows), rotation, part.preconditioning, part.target)
        return alternate(rows, rotation, part.iterations)

    made: Refine = refine
    found = fit_readers(task, samples, start, made)
    found = _inner(task, samples, found)
    return fit_down(task, samples, found, made) if down else found
