"""How long calls take: cold caches, both sides alike, medians.

On a GPU the calls of one side are captured into one CUDA graph and replayed: no launch from Python is timed. Each call
has weights and inputs of its own, more of them together than twice the L2 cache, so that every call finds it cold. On a
CPU calls are timed one by one. Sides take turns, so that what else the machine does meets all alike.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Calls = Sequence[Callable[[], object]]
"""The same work on different data."""
COLD = 2**27  # bytes that the calls of one side touch at least: twice the L2 cache of a Hopper GPU
MOST = 32  # calls a side


def copies_for(nbytes: int) -> int:
    """How many copies of work on so many bytes keep caches cold."""
    return max(2, min(MOST, -(-COLD // max(nbytes, 1))))


def time_calls(sides: Mapping[str, Calls], device: torch.device, repeats: int = 15) -> dict[str, float]:
    """Microseconds a call, the median of `repeats` rounds, of every side."""
    if device.type == "cuda":
        return _by_graphs(sides, repeats)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, calls in sides.items():
            call = calls[turn % len(calls)]
            begun = time.perf_counter()
            call()
            if turn:
                taken[name].append(1e6 * (time.perf_counter() - begun))
    return {name: median(times) for name, times in taken.items()}


def _by_graphs(sides: Mapping[str, Calls], repeats: int) -> dict[str, float]:
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in sides.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                taken[name].append(1e3 * start.elapsed_time(end) / len(sides[name]))
    return {name: median(times) for name, times in taken.items()}


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches, measured here: bytes a second (read and write, by the better of a copy and a kernel),
    operations a second of bfloat16 and of int8 products."""
    cuda = device.type == "cuda"
    size, side = (2**30, 8192) if cuda else (2**26, 1024)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    q = torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8)
    found = time_calls(
        {
            "copy": [lambda: target.copy_(source)] * 2,
            "kernel": [lambda: torch.neg(source, out=target)] * 2,
            "bf16": [lambda: a @ a.T] * 2,
            "int8": [lambda: torch._int_mm(q, q.T)] * 2,
        },
        device, 7,
    )  # fmt: skip
    operations = 2 * side**3
    return {
        "bytes": 2e6 * size / min(found["copy"], found["kernel"]),
        "bf16": 1e6 * operations / found["bf16"],
        "int8": 1e6 * operations / found["int8"],
    }


def name_of(device: torch.device) -> str:
    """The device, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
