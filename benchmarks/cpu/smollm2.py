"""Prefill and decode of SmolLM2-135M on a CPU: quantized against the same model in 16 bits under Transformers.

    OMP_NUM_THREADS=2 python benchmarks/cpu/smollm2.py [--prefill 512 2048] [--decode 32] [--repeats 5] [--keep FOLDER]

All candidates compute activations in bfloat16, but for `fp32`, which is how a CPU opens a model otherwise. They take
turns in one process; what is told is the median of the repeats, and how many times as fast as Transformers' bfloat16
that is. `runtime`: the same checkpoint in `phasequant.runtime`. Decode starts from 512 tokens. Before anything is
timed, the logits of 64 tokens must equal those of the reference, bit for bit.

On a shared machine `--clock cpu` counts the process's own seconds, which with one thread are the time it would take.
Older CPUs: `ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI` (int8 units, none for bfloat16: Ice Lake), `AVX512_CORE`, `AVX2`;
products then run as there, all else as here.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import phasequant
from phasequant.checkpoint import load
from phasequant.kernels import CHOICE
from phasequant.nn import QuantLinear
from phasequant.runtime import Runner
from phasequant.source import open_model

RECIPES = {
    "W4A4KV4 quarot": ("quarot",),
    "W4A8KV4 quarot": ("quarot-w4a8",),
    "W4A4 quarot": ("quarot", "kv.bits=16"),
    "W4A8 quarot": ("quarot-w4a8", "kv.bits=16"),
    "W4A4 no maps": ("rtn", "kv.bits=16"),
    "W4A8 no maps": ("rtn", "kv.bits=16", "activations.bits=8", "activations.clip=1.0"),
}
PROMPT = 512


def tensor_bytes(held: Any) -> int:
    """Of all tensors in what a kernel prepared."""
    if isinstance(held, Tensor):
        return held.numel() * held.element_size()
    if isinstance(held, tuple):
        return sum(map(tensor_bytes, held))
    return sum(tensor_bytes(getattr(held, f.name)) for f in fields(held)) if is_dataclass(held) else 0


def made(name: str, folder: Path) -> Path:
    """The checkpoint of a recipe, quantized where `folder` does not have it."""
    recipe, *sets = RECIPES[name]
    path = folder / name.replace(" ", "-")
    if not path.exists():
        phasequant.quantize("demo", recipe, overrides=sets, output=path)
    return path


def check(model: Any, ids: Tensor) -> None:
    """The chosen kernels' logits are the reference's."""
    found = model(ids).logits
    os.environ[CHOICE] = "reference"
    model.to(ids.device)  # leaves what was prepared behind
    expected = model(ids).logits
    del os.environ[CHOICE]
    model.to(ids.device)
    assert torch.equal(found, expected), "the kernels' logits are not the reference's"


class Plain:
    """A model under Transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> None:
        """Logits of the last token."""
        self.model(ids, logits_to_keep=1, use_cache=True)

    def decode(self, ids: Tensor, count: int, clock: Callable[[], float]) -> float:
        """Seconds a token."""
        cache = self.model(ids, logits_to_keep=1, use_cache=True).past_key_values
        begun = clock()
        for _ in range(count):
            self.model(ids[:, :1], past_key_values=cache, use_cache=True)
        return (clock() - begun) / count


class InRuntime:
    """A model in our runtime."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.runner = Runner.of(model, 1, capacity)

    def prefill(self, ids: Tensor) -> None:
        """Logits of the last token."""
        self.runner.prefill(ids)

    def decode(self, ids: Tensor, count: int, clock: Callable[[], float]) -> float:
        """Seconds a token."""
        self.runner.prefill(ids)
        begun = clock()
        for _ in range(count):
            self.runner.decode()
        return (clock() - begun) / count


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--decode", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--without", nargs="*", default=[], choices=["fp32", "runtime"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--keep", type=Path, help="folder of the checkpoints, for the next time")
    given = parser.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run(given, given.keep or Path(folder), clock)


def run(given: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> None:
    """All candidates, and the table."""
    capacity = max(*given.prefill, PROMPT) + given.decode + 1
    candidates: dict[str, Any] = {"bf16": Plain(open_model("demo", "cpu").model.to(torch.bfloat16))}
    if "fp32" not in given.without:
        candidates["fp32"] = Plain(open_model("demo", "cpu").model)
    kernels = dict.fromkeys(candidates, "16-bit")
    ids = torch.randint(1000, 40000, (1, max(*given.prefill, PROMPT)), generator=torch.Generator().manual_seed(0))
    for name in given.only:
        path = made(name, folder)
        plain = load(path, device="cpu", dtype=torch.bfloat16)
        check(plain, ids[:, :64])
        kernels[name] = ", ".join(phasequant.api.kernels_used(plain))
        candidates[name] = Plain(plain)
        if "runtime" not in given.without:
            again = load(path, device="cpu", dtype=torch.bfloat16, verify=False)
            candidates[f"{name}, runtime"] = InRuntime(again, capacity)
            kernels[f"{name}, runtime"] = kernels[name]
    if "runtime" not in given.without:
        candidates["bf16, runtime"] = InRuntime(open_model("demo", "cpu").model.to(torch.bfloat16), capacity)
        kernels["bf16, runtime"] = "16-bit"
    gc.collect()
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(given.repeats + 1):
        for name, candidate in candidates.items():
            for count in given.prefill:
                begun = clock()
                candidate.prefill(ids[:, :count])
                times.setdefault((name, f"prefill {count}"), []).append(clock() - begun)
            if given.decode:
                times.setdefault((name, "decode"), []).append(candidate.decode(ids[:, :PROMPT], given.decode, clock))
        if not turn:
            times.clear()  # warm by now
    columns = [*(f"prefill {count}" for count in given.prefill), *(["decode"] if given.decode else [])]
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, instructions: {isa}; {given.clock} time")
    print(f"| | kernel | {' | '.join(f'{c}, ms | ×' for c in columns)} | linears MiB | prepared MiB |")
    print(f"|---|---|{'---|' * (2 * len(columns) + 2)}")
    for name, candidate in candidates.items():
        cells = []
        for column in columns:
            own, base = median(times[name, column]), median(times["bf16", column])
            cells += [f"{1e3 * own:.1f}", f"{base / own:.2f}"]
        held = sizes(candidate)
        print(f"| {name} | {kernels[name]} | {' | '.join(cells)} | {held[0]:.0f} | {held[1]:.0f} |")


def sizes(candidate: Any) -> tuple[float, float]:
    """MiB of the linears of all blocks as stored, and of what their kernels prepared beside."""
    if isinstance(candidate, InRuntime):
        linears = [x for b in candidate.runner.decoder.blocks for x in (b.qkv, b.o, b.gate_up, b.down)]
        modules, weights = [x.module for x in linears], [x.weights for x in linears]
    else:
        layers = candidate.model.model.layers
        modules = [m for m in layers.modules() if isinstance(m, (torch.nn.Linear, QuantLinear))]
        weights = [m._kept.weights for m in modules if isinstance(m, QuantLinear)]
    stored = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
    prepared = sum(tensor_bytes(w) - tensor_bytes(getattr(w, "tensors", w)) for w in weights if w is not None)
    return stored / 2**20, prepared / 2**20


if __name__ == "__main__":
    main()
