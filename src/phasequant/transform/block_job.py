"""One block's maps, scales and clips, learned from its inputs and its 16-bit outputs: a job of its own.

On CUDA one step is captured as a graph and replayed (but for mixtures of experts): at these sizes launching would cost
more than computing. See `blockwise` for what is learned, at which rates.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.nn.attention import ATTENTION
from phasequant.numerics import QuantSpec
from phasequant.optim import Zeta
from phasequant.recipe import LearningPart
from phasequant.surroundings import measured
from phasequant.transform.contract import BlockTransform
from phasequant.transform.learned import LearnedBlock

FLOOR = 1e-3  # of the learning rate, at the end of the cosine
MATRIX_LR = {"adamw": 5e-3, "zeta": 5e-3}


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
        routed = job.map.shape.experts > 0  # how many rows an expert has differs from step to step
        if job.device.type == "cuda" and isinstance(optimizer, torch.optim.AdamW) and not routed:
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
    if "weights" in job.clips and job.weights is not None and learning.clip_start == "searched":
        learned.search_clips(job.weights)
    attention = job.block.get_submodule(job.map.family.attention)
    attention.config._attn_implementation = ATTENTION  # type: ignore[union-attr]
    _bring(job)
    batch = min(learning.batch, len(job.inputs))
    rounds = len(job.inputs) // batch
    total = learning.epochs * rounds
    with measured(device) as cost, _tensor_cores():
        start = {name: p.detach().clone() for name, p in learned.named_parameters() if p.requires_grad}
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
    if not math.isfinite(after):
        raise PhaseQuantError(
            f"block {job.index}: the loss is {after} after learning ({before:.3g} before): lower learning.lr "
            f"(now {learning.lr or 'the default'}) or learning.clip_lr (now {learning.clip_lr})"
        )
    if after > before:
        warn(f"block {job.index}: learning raised its loss, {before:.3g} → {after:.3g}: its start is kept", own=True)
        learned.load_state_dict(start, strict=False)
        after = before
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
