r"""DFRot: rotations refined by alternating Procrustes, massive tokens weighted up (arXiv 2412.00648).

A randomized Hadamard treats all tokens alike; the few massive ones, nearly one-hot, come out with all channels at the
same two magnitudes, which a uniform grid resolves badly or well depending on the rotation alone. Over the norms'
outputs A of all blocks (one sequence of 2048 tokens suffices), rows of massive tokens times α = 100:

    repeat   Z = A·R        B = Q_4(Z), symmetric by token        R ← argmin_R ‖A·R - B‖²  (Procrustes)

B is where the grid would like Z to be; each turn lowers the rounding error. A token is massive where rounding it
*un-rotated* costs next to nothing: ‖a - Q(a)‖ < τ·√D with ‖a‖ = √D (the paper's 8.5 at D = 4096 is τ = 0.13; a fixed
8.5 would call every token of a narrower model massive).

    rotation.where   folded   R1 from all 2L norms together, gains in the weights: free at inference
                     online   a rotation of two small factors after each norm's gain, each from its own outputs, by the
                              same rule (Procrustes factor by factor): 2·D·(a + b) multiply-adds a token and block
    everything else (R2, M, R3, R4) as in QuaRot

No gradients; one SVD of D × D a turn. At most `rotation.iterations` turns; it stops when a turn gains less than 1e-4.
The sample is capped at 16,384 tokens (1,024 for what belongs to one block), the massive ones always among them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phasequant.console import note, progress
from phasequant.numerics import LinearMap, QuantSpec, fake_quantize, procrustes_step
from phasequant.recipe import RotationPart
from phasequant.stream import BlockStream
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.gather import Sample, gather
from phasequant.transform.quarot import fixed_rotations

GRID = QuantSpec(4, True, "token")
TOKENS = 16_384
SITE_TOKENS = 1024  # for a rotation of one place in one block
LEAST_GAIN = 1e-4

Target = Callable[[Float[Tensor, "T n"]], Float[Tensor, "T n"]]


def massive_tokens(rows: Float[Tensor, "T n"], tail_error: float) -> Bool[Tensor, " T"]:
    """Tokens that 4 bits round at next to no cost before any rotation; rows have norm √n."""
    return (rows - fake_quantize(rows, GRID)).norm(dim=-1) < tail_error * rows.shape[-1] ** 0.5


def rounding_error(rows: Float[Tensor, "T n"], rotation: LinearMap, grid: QuantSpec = GRID) -> float:
    """‖A·R - Q(A·R)‖² / ‖A‖²."""
    z = rotation.apply(rows)
    return float((z - fake_quantize(z, grid)).square().sum() / rows.square().sum().clamp(min=1e-20))


def alternate(rows: Float[Tensor, "T n"], rotation: LinearMap, iterations: int, grid: QuantSpec = GRID) -> LinearMap:
    """The refinement: target = the rounded values, until a turn gains too little."""
    best, least = rotation, rounding_error(rows, rotation, grid)
    for _ in range(iterations):
        z = best.apply(rows)
        turned = procrustes_step(rows, fake_quantize(z, grid), best)
        error = rounding_error(rows, turned, grid)
        if error > least * (1 - LEAST_GAIN):
            return turned if error < least else best
        best, least = turned, error
    return best


def weighted(rows: Float[Tensor, "T n"], part: RotationPart) -> tuple[Float[Tensor, "T n"], int]:
    """Rows with the massive ones times α, and how many those are."""
    massive = massive_tokens(rows, part.tail_error)
    return torch.where(massive[:, None], rows * part.tail_weight, rows), int(massive.sum())


@dataclass
class Samples:
    """What rotations are fitted to: unit outputs of each norm, its outputs with gain, values, inputs of o and down."""

    norms: dict[tuple[int, str], Tensor]
    gained: dict[tuple[int, str], Tensor]
    values: dict[int, Tensor]
    heads: dict[int, Tensor]
    down: dict[int, Tensor]


def sample(task: Task, *, values: bool, down: bool) -> Samples:
    """One sweep of the 16-bit model."""
    assert task.tokens is not None
    found = Samples({}, {}, {}, {}, {})
    online = task.rotation.where == "online"
    sequences, blocks = task.tokens.shape[0], task.map.shape.blocks
    shared = max(TOKENS // (2 * blocks * sequences), 64)
    own = max(SITE_TOKENS // sequences, 16)
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    readers = [g.name for g in task.map.groups if g.norm is not None]
    for step in stream.steps(f"sample ({task.part.method})"):
        norms = {name: Sample(TOKENS, shared) for name in readers} if not online else {}
        inputs = {name: Sample(SITE_TOKENS, own) for name in readers} if online else {}
        if values:
            inputs["o"] = Sample(SITE_TOKENS, own)
        if down:
            inputs["down"] = Sample(SITE_TOKENS, own)
        v = Sample(SITE_TOKENS, own) if values and task.map.family.value is not None else None
        with gather(step.block, task.map, inputs=inputs, norms=norms, values=v):
            step.drain()
        found.norms |= {(step.index, name): s.rows for name, s in norms.items()}
        found.gained |= {(step.index, name): inputs[name].rows for name in readers if online}
        if v is not None:
            found.values[step.index] = v.rows
        if values:
            found.heads[step.index] = inputs["o"].rows
        if down:
            found.down[step.index] = inputs["down"].rows
    return found


Refine = Callable[[Float[Tensor, "T n"], LinearMap], LinearMap]


def fit_readers(task: Task, samples: Samples, start: Transform, refine: Refine) -> Transform:
    """R1, or the rotations after each norm, refined from `start`'s."""
    part = task.rotation
    if start.residual is not None:
        rows, count = weighted(torch.cat(list(samples.norms.values())), part)
        note(f"{task.part.method}: {count} of {len(rows)} sampled tokens are massive")
        dense = LinearMap.dense(start.residual.matrix(), start.residual.kind)
        before = rounding_error(rows, dense)
        rotation = refine(rows, dense)
        note(f"{task.part.method}: R1's weighted rounding error {before:.5f} → {rounding_error(rows, rotation):.5f}")
        return replace(start, residual=rotation)

    made: dict[tuple[int, str], LinearMap] = {}
    with progress(f"{task.part.method}: rotations after norms", len(samples.gained)) as tick:
        for (index, group), rows in samples.gained.items():
            unit = rows * (rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True).clamp(min=1e-20))
            online = start.block(index).online(group)
            assert online is not None
            made[index, group] = refine(weighted(unit, part)[0], online)
            tick()

    def change(index: int, block: BlockTransform) -> BlockTransform:
        return block.with_maps({group: rotation for (at, group), rotation in made.items() if at == index})

    return start.changed(change)


def fit_down(task: Task, samples: Samples, start: Transform, refine: Refine) -> Transform:
    """R4 of every block, refined."""

    def change(index: int, block: BlockTransform) -> BlockTransform:
        if block.down is None:
            return block
        rows = samples.down[index]
        unit = rows * (rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True).clamp(min=1e-20))
        return replace(block, down=refine(unit, block.down))

    return start.changed(change)


def dfrot(task: Task) -> Transform:
    """DFRot's rotations of a model."""
    part = task.rotation
    start = fixed_rotations(task.map, task.seed, part.where, "dfrot", part.heads, part.online)
    down = part.down == "learned" and part.online
    samples = sample(task, values=False, down=down)

    def refine(rows: Tensor, rotation: LinearMap) -> LinearMap:
        return alternate(rows, rotation, part.iterations)

    made = fit_readers(task, samples, start, refine)
    return fit_down(task, samples, made, refine) if down else made
