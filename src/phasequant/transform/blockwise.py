r"""Block-wise learning: each decoder block, rounded, is taught to give what the 16-bit block gives.

    min over maps, scales, clips of   Σ_t w_t · ‖ block_Q(x_t) - block(x_t) ‖²        x from the 16-bit model

Inputs and targets are the 16-bit model's, so no block knows of another's errors and every block is a job of its own:
`learn_block` needs its weights, its inputs, its grids and a seed, and nothing else. Jobs may run in any order, on any
number of processes, and each finished one is kept on disk under a hash of all it depends on: an interrupted run goes on
where it was, and a plan that raises some blocks learns only those anew.

    w_t = 1             loss: mse      FlatQuant's. One token of 25,000 outweighs all others
    w_t = 1/‖y_t‖²      loss: token    every token's error relative to its own size, which is how the next norm reads it

Source: FlatQuant (arXiv 2410.09426), `train_utils.py`: AdamW, lr 5e-3 for maps and scales, 5e-2 for clips, cosine to a
thousandth over all steps, 15 epochs of 128 × 2048 tokens, 4 a step, loss divided by itself (so that no block's scale
matters to the step). On CUDA one step is captured as a graph and replayed: at these sizes launching would cost more
than computing. Memory: one block's activations of a batch, and the inputs and targets of all sequences in host memory.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import GROUPS, ModelMap
from phasequant.console import note
from phasequant.nn.attention import ATTENTION
from phasequant.numerics import LinearMap, QuantSpec
from phasequant.optim import Zeta
from phasequant.recipe import LearningPart
from phasequant.stream import BlockStream
from phasequant.surroundings import measured
from phasequant.transform.apply import transform_block
from phasequant.transform.contract import MAPS, BlockTransform, Task, Transform
from phasequant.transform.files import read_block, write_block
from phasequant.transform.learned import LearnedBlock

FLOOR = 1e-3  # of the learning rate, at the end of the cosine
MATRIX_LR = {"adamw": 5e-3, "zeta": 5e-3}
VERSION = 2  # of what a kept block means


@dataclass
class Job:
    """One block to be learned. `inputs`, `targets`: (sequences, T, D), in host memory."""

    index: int
    block: nn.Module
    arguments: dict[str, Any]
    inputs: Tensor
    targets: Tensor
    map: ModelMap
    start: BlockTransform
    grids: dict[str, QuantSpec | None]
    weights: QuantSpec | None
    kv: QuantSpec | None
    clips: frozenset[str]
    maps: frozenset[str]
    scales: bool
    learning: LearningPart
    seed: int
    device: torch.device


def _weighted(error: Tensor, target: Tensor, loss: str) -> Tensor:
    squares = (error - target).float().square()
    if loss != "token":
        return squares.mean()
    return (squares.sum(-1) / target.float().square().sum(-1).clamp(min=1e-12)).mean()


def _optimizer(learned: LearnedBlock, learning: LearningPart, device: torch.device) -> torch.optim.Optimizer:
    clips = [p for name, p in learned.named_parameters() if p.requires_grad and name.endswith("logit")]
    rest = [p for name, p in learned.named_parameters() if p.requires_grad and not name.endswith("logit")]
    kind = "adamw" if learning.optimizer == "auto" else learning.optimizer
    lr = learning.lr or MATRIX_LR[kind]
    groups = [{"params": rest, "lr": lr}, {"params": clips, "lr": learning.clip_lr}]
    groups = [group for group in groups if group["params"]]
    if kind == "zeta":
        return Zeta(groups, weight_decay=0.0)
    options: dict[str, Any] = {"weight_decay": 0.0}
    if device.type == "cuda":
        options["capturable"] = True
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return torch.optim.AdamW(groups, **options)


class _Step:
    """One step on a batch. On CUDA, captured once and replayed; the batch and the rates are written into place."""

    def __init__(self, learned: LearnedBlock, optimizer: torch.optim.Optimizer, job: Job, batch: int) -> None:
        self.learned, self.optimizer, self.job = learned, optimizer, job
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.graph: torch.cuda.CUDAGraph | None = None
        if job.device.type == "cuda" and isinstance(optimizer, torch.optim.AdamW):
            self._capture(batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return _weighted(self.learned(x, **self.job.arguments), y, self.job.learning.loss)

    def _run(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        loss = self.loss(x, y)
        (loss / loss.detach()).backward()
        self.optimizer.step()
        return loss.detach()

    def _capture(self, batch: int) -> None:
        device = self.job.device
        self.x = torch.zeros(batch, *self.job.inputs.shape[1:], device=device)
        self.y = torch.zeros_like(self.x)
        self.x.copy_(self.job.inputs[:batch])
        self.y.copy_(self.job.targets[:batch])
        kept = copy.deepcopy(self.learned.state_dict())
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run(self.x, self.y)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self.out = self._run(self.x, self.y)
            self.graph = graph
        except RuntimeError as error:
            note(f"block {self.job.index}: steps run one by one, they could not be captured ({error})")
            torch.cuda.synchronize(device)
        with torch.no_grad():  # warming up must leave no trace
            self.learned.load_state_dict(kept)
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def __call__(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if self.graph is None:
            return self._run(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.out


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """fp32 products in TF32 while learning, where a device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def learn_block(job: Job) -> BlockTransform:
    """The whole of one job: the block's maps, scales and clips. Depends on nothing but the job."""
    learning, device = job.learning, job.device
    torch.manual_seed(job.seed + job.index)
    learned = LearnedBlock(
        job.block, job.map, job.start, job.grids, job.weights, job.kv,
        clips=job.clips, maps=job.maps, scales=job.scales,
    ).to(device)  # fmt: skip
    attention = job.block.get_submodule(job.map.family.attention)
    attention.config._attn_implementation = ATTENTION  # type: ignore[union-attr]
    _bring(job)
    batch = min(learning.batch, len(job.inputs))
    rounds = len(job.inputs) // batch
    total = learning.epochs * rounds
    with measured(device) as cost, _tensor_cores():
        before = _mean_loss(learned, job, batch)
        if total and any(p.requires_grad for p in learned.parameters()):
            optimizer = _optimizer(learned, learning, device)
            step = _Step(learned, optimizer, job, batch)
            generator = torch.Generator().manual_seed(job.seed + job.index)
            done = 0
            for _ in range(learning.epochs):
                order = torch.randperm(len(job.inputs), generator=generator)
                for at in range(rounds):
                    chosen = order[at * batch : (at + 1) * batch].to(job.inputs.device)
                    factor = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done / total))
                    x, y = job.inputs[chosen].to(device), job.targets[chosen].to(device)
                    step(x, y, factor)
                    done += 1
        after = _mean_loss(learned, job, batch)
    return learned.result(
        job.start, loss_before=before, loss_after=after, seconds=cost.seconds, peak_bytes=float(cost.peak_bytes)
    )


def _bring(job: Job) -> None:
    """Inputs and targets onto the device, where they take less than a quarter of its free memory."""
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(job.device)
        if job.inputs.nbytes + job.targets.nbytes < free // 4:
            job.inputs, job.targets = job.inputs.to(job.device), job.targets.to(job.device)


@torch.no_grad()
def _mean_loss(learned: LearnedBlock, job: Job, batch: int, most: int = 8) -> float:
    """Loss over the first few sequences, to say before and after."""
    losses = []
    for x, y in zip(job.inputs[:most].split(batch), job.targets[:most].split(batch), strict=True):
        x, y = x.to(job.device), y.to(job.device)
        losses.append(float(_weighted(learned(x, **job.arguments), y, job.learning.loss)) * len(x))
    return sum(losses) / min(most, len(job.inputs))


def _digest(hasher: Any, tensor: Tensor) -> None:
    hasher.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())


def _describe(job: Job) -> str:
    start = {name: (m.layout() if (m := getattr(job.start, name)) is not None else None) for name in MAPS}
    return json.dumps(
        {
            "version": VERSION,
            "block": job.index,
            "grids": {g: s and s.to_dict() for g, s in job.grids.items()},
            "weights": job.weights and job.weights.to_dict(),
            "kv": job.kv and job.kv.to_dict(),
            "clips": sorted(job.clips),
            "maps": sorted(job.maps),
            "scales": job.scales,
            "learning": job.learning.model_dump(),
            "start": start,
            "seed": job.seed,
            "device": job.device.type,
        },
        sort_keys=True,
    )


def _key(job: Job, task: Task, past: Any) -> str:
    """Names a job by all that its result depends on: `past` has seen tokens, embeddings and all blocks up to this, and
    what makes the block's start of its inputs is in the recipe's part."""
    hasher = past.copy()
    hasher.update(_describe(job).encode())
    hasher.update(task.part.model_dump_json().encode())
    for name in MAPS:
        found: LinearMap | None = getattr(job.start, name)
        for tensor in found.tensors().values() if found is not None else ():
            _digest(hasher, tensor)
    for scale in job.start.scales.values():
        _digest(hasher, scale)
    return hasher.hexdigest()[:32]


def learn_blocks(
    task: Task,
    start: Transform,
    *,
    maps: frozenset[str] = frozenset(),
    scales: bool = False,
    clips: frozenset[str] | None = None,
    begin: Any = None,
) -> Transform:
    """`start` with every block's `maps`, `scales` and `clips` learned. `begin(step, arguments…)` may give a block's
    start from its own inputs: (block, inputs, index) → `BlockTransform`."""
    assert task.tokens is not None
    clips = task.learned_clips if clips is None else clips
    past = hashlib.sha256()
    _digest(past, task.tokens)
    _digest(past, task.model.get_submodule(task.map.family.embeddings).weight)
    residual = start.residual
    past.update(f"{torch.__version__} {start.folds_norms} {residual and residual.layout()}".encode())
    for tensor in residual.tensors().values() if residual is not None else ():
        _digest(past, tensor)
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    found: list[BlockTransform] = []
    kept = 0
    for step in stream.steps(f"learn ({start.method})"):
        for tensor in step.block.state_dict().values():
            _digest(past, tensor)
        inputs = torch.stack(stream.hidden).float()
        step.drain()
        assert step.outputs is not None
        targets = torch.stack(step.outputs).float()
        base = copy.deepcopy(step.block).float()
        if residual is not None:
            folded = residual
            transform_block(base, BlockTransform(), task.map, residual=folded, folds_norms=start.folds_norms,
                            stored=torch.float32)  # fmt: skip
            base.to(task.device)
            inputs = torch.stack([folded.apply(x.double()).float() for x in inputs])
            targets = torch.stack([folded.apply(y.double()).float() for y in targets])
        job = Job(
            index=step.index,
            block=base,
            arguments=_as_fp32(stream.arguments[step.index]),
            inputs=inputs,
            targets=targets,
            map=task.map,
            start=start.block(step.index),
            grids={group: task.activations.get((step.index, group)) for group in GROUPS},
            weights=task.weights,
            kv=task.kv,
            clips=clips,
            maps=maps,
            scales=scales,
            learning=task.learning,
            seed=task.seed,
            device=task.device,
        )
        path = None if task.kept is None else task.kept / f"{_key(job, task, past)}.safetensors"
        ready = read_block(path) if path is not None else None
        if ready is None:
            if begin is not None:
                job.start = begin(step, job.start)
            ready = learn_block(job)
            if path is not None:
                write_block(path, ready)
        else:
            kept += 1
        found.append(ready)
    if kept:
        note(f"{kept} of {len(found)} blocks were learned in an earlier run and taken from {task.kept}")
    return Transform(start.method, start.folds_norms, residual, tuple(found))


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
