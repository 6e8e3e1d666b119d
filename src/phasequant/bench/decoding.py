"""Attention of one new token a row: our kernel over a 4-bit cache against flash attention over a bfloat16 one.

Both read full caches of random states, cold. The bfloat16 side is torch's flash kernel with grouped heads. Bytes are
those of keys and values alone; `roofline` is the time a copy of the 4-bit cache's bytes would take.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from phasequant.arch import Shape
from phasequant.bench.timing import ceilings, copies_for, name_of, time_calls
from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec

MOST_BYTES = 2**36  # of bfloat16 keys and values: loads above it are left out


def _flash(batch: int, context: int, shape: Shape, device: torch.device) -> Callable[[], object]:
    q = torch.randn(batch, shape.heads, 1, shape.d_head, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, shape.kv_heads, context, shape.d_head, device=device, dtype=torch.bfloat16)
            for _ in range(2))  # fmt: skip

    def run() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=shape.heads != shape.kv_heads)

    return run


def _packed(batch: int, context: int, shape: Shape, spec: QuantSpec, device: torch.device) -> Callable[[], object]:
    from phasequant.kernels.gpu.attention import decode_attention

    groups = spec.groups(shape.d_head)

    def states() -> Any:
        where = (batch, shape.kv_heads, context)
        codes = torch.randint(0, 256, (*where, shape.d_head // 2), dtype=torch.uint8, device=device)
        scale = torch.full((*where, groups), 0.3, dtype=torch.float16, device=device)
        return codes, scale, torch.full((*where, groups), 8, dtype=torch.uint8, device=device)

    q = torch.randn(batch, shape.heads, shape.d_head, device=device, dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    return partial(decode_attention, q, states(), states(), lengths, scale=shape.d_head**-0.5)


@torch.no_grad()
def time_attention(
    shape: Shape, batches: Sequence[int], contexts: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Microseconds a layer for every batch and context that fits."""
    if device.type != "cuda":
        raise PhaseQuantError("the 4-bit decode attention is a GPU's kernel: there is no CUDA device to time it on")
    spec = QuantSpec(4, False, "group", min(64, shape.d_head))
    packed = 2 * (shape.d_head // 2 + 3 * spec.groups(shape.d_head))
    top = ceilings(device)["bytes"]
    found = []
    for context in contexts:
        for batch in batches:
            tokens = batch * context * shape.kv_heads
            nbytes = 4 * shape.d_head * tokens
            if nbytes > MOST_BYTES:
                continue
            copies = copies_for(nbytes // 4)
            sides = {
                "bf16": [_flash(batch, context, shape, device) for _ in range(max(2, copies // 4))],
                "kv4": [_packed(batch, context, shape, spec, device) for _ in range(copies)],
            }
            times = time_calls(sides, device)
            found.append(
                {"batch": batch, "context": context, **times, "ratio": times["bf16"] / times["kv4"],
                 "bytes_ratio": 4 * shape.d_head / packed, "roofline": 1e6 * packed * tokens / top}
            )  # fmt: skip
            del sides
            torch.cuda.empty_cache()
    return {"device": name_of(device), "attention": found}
