r"""Block-wise learning: each decoder block, rounded, is taught to give what the 16-bit block gives.

    min over maps, scales, clips of   Σ_t w_t · ‖ block_Q(x_t) - block(x_t) ‖²        x from the 16-bit model

Inputs and targets are the 16-bit model's, so no block knows of another's errors and every block is a job of its own:
`learn_block` needs its weights, its inputs, its grids and a seed, and nothing else. Jobs may run in any order, on any
number of processes (under torchrun each rank learns every N-th block, and all pass all inputs through), and each
finished one is kept on disk under a hash of all it depends on: an interrupted run goes on where it was, and a plan that
raises some blocks learns only those anew.

    w_t = 1             loss: mse      FlatQuant's. One token of 25,000 outweighs all others
    w_t = 1/‖y_t‖²      loss: token    every token's error relative to its own size, which is how the next norm reads it

Source: FlatQuant (arXiv 2410.09426), `train_utils.py`: AdamW, lr 5e-3 for maps and scales, 5e-2 for clips, cosine to a
thousandth over all steps, 15 epochs of 128 × 2048 tokens, 4 a step, loss divided by itself (so that no block's scale
matters to the step). Memory: one block's activations of a batch, and the inputs and targets of all sequences in host
memory. One job is `block_job`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import GROUPS
from phasequant.numerics import multiplies_bfloat16
from phasequant.ranks import agreed, world
from phasequant.stream import BlockStream, Step
from phasequant.transform.apply import transform_block
from phasequant.transform.block_job import Job, learn_block
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.kept import KeptBlocks

Begin = Callable[[Step, BlockTransform], BlockTransform]


def learn_blocks(
    task: Task,
    start: Transform,
    *,
    maps: frozenset[str] = frozenset(),
    scales: bool = False,
    clips: frozenset[str] | None = None,
    begin: Begin | None = None,
) -> Transform:
    """`start` with every block's `maps`, `scales` and `clips` learned. `begin(step, block)` may better a block's start
    from its own inputs, which `step.probe()` gives."""
    assert task.tokens is not None
    clips = task.learned_clips if clips is None else clips
    kept = KeptBlocks(task, start)
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    found: list[tuple[int, BlockTransform | None]] = []
    for step in stream.steps(f"learn ({start.method})"):
        kept.see(step.block)
        grids = {group: task.activations.get((step.index, group)) for group in GROUPS}
        asked = {
            "grids": {group: spec and spec.to_dict() for group, spec in grids.items()},
            "weights": task.weights and task.weights.to_dict(),
            "kv": task.kv and task.kv.to_dict(),
            "clips": sorted(clips),
            "maps": sorted(maps),
            "scales": scales,
            "bfloat16": multiplies_bfloat16(task.device),
        }
        ready = kept.read(start.block(step.index), asked)
        owner = step.index % world().size
        if ready is None and owner == world().rank:
            base, inputs, targets = _residual_basis(task, start, step, stream)
            job = Job(
                index=step.index,
                block=base,
                arguments=_as_fp32(stream.arguments[step.index]),
                inputs=inputs,
                targets=targets,
                map=task.map,
                start=start.block(step.index) if begin is None else begin(step, start.block(step.index)),
                grids=grids,
                weights=task.weights,
                kv=task.kv,
                clips=clips,
                maps=maps,
                scales=scales,
                learning=task.learning,
                seed=task.seed,
                device=task.device,
            )
            ready = learn_block(job)
            kept.write(ready)
        found.append((owner, ready))
    kept.tell()
    blocks = tuple(block for owner, ready in found if (block := agreed(ready, owner)) is not None)
    return Transform(start.method, start.folds_norms, start.residual, blocks)


def _residual_basis(
    task: Task, start: Transform, step: Step, stream: BlockStream
) -> tuple[nn.Module, Float[Tensor, "S T D"], Float[Tensor, "S T D"]]:
    """A copy of the block, its inputs and its 16-bit outputs, fp32, in the basis of the residual's rotation."""
    inputs = torch.stack(stream.hidden).float()
    step.drain()
    assert step.outputs is not None
    targets = torch.stack(step.outputs).float()
    block = copy.deepcopy(step.block).float()
    residual = start.residual
    if residual is not None:
        transform_block(block, BlockTransform(), task.map, residual=residual, folds_norms=start.folds_norms,
                        stored=torch.float32)  # fmt: skip
        block.to(task.device)
        inputs = torch.stack([residual.apply(x.double()).float() for x in inputs])
        targets = torch.stack([residual.apply(y.double()).float() for y in targets])
    return block, inputs, targets


def _as_fp32(value: Any) -> Any:
    """Floating-point tensors of a block's arguments (rotary angles, a mask) in the type that blocks are learned in."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as_fp32(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_as_fp32(item) for item in value)
    return value


def learn_clips(task: Task, start: Transform) -> Transform:
    """Any transform, its clips learned by block."""
    return learn_blocks(task, start)
