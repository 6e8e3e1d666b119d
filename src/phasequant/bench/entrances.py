"""What stands before a product, fused, against copying the bytes that it must move.

Cold inputs. `copy`: an elementwise kernel of torch's over as many bytes (half read, half written) as the entrance reads
of x and writes of codes; matrices and weights of norms are not counted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phasequant.arch import ModelMap
from phasequant.bench.timing import copies_for, name_of, time_calls
from phasequant.errors import PhaseQuantError
from phasequant.numerics import LinearMap, QuantSpec, random_orthogonal, spreading_rotation
from phasequant.numerics.hadamard import factors

GRID = QuantSpec(4, clip=0.9)
BLOCK = 128


def _maps(width: int, device: torch.device) -> dict[str, Any]:
    """Hadamard, a general Kronecker pair, a matrix a block: those that fit the kernels."""
    from phasequant.kernels.gpu.entrance_map import map_fits, map_tiles

    a, b = factors(width) or (1, width)
    found = {
        "hadamard": spreading_rotation(width),
        "kronecker": LinearMap.kronecker(random_orthogonal(a, 0), random_orthogonal(b, 1)),
    }
    if width % BLOCK == 0:
        blocks = [random_orthogonal(BLOCK, i % 4) for i in range(width // BLOCK)]
        found["own blocks"] = LinearMap.dense(torch.stack(blocks))
    kind = torch.bfloat16
    return {name: map_tiles(m, kind, device) for name, m in found.items() if map_fits(m, kind, device)[0]}


def _calls(name: str, x: Tensor, linear_map: Any, down: Tensor | None) -> Callable[[], object]:
    from phasequant.kernels.gpu.entrance import gated_round, norm_round, round_rows

    if name == "gate":
        gate, up = x.chunk(2, -1)
        return partial(gated_round, gate, up, "silu", GRID, linear_map=linear_map, down=down)
    if name == "plain":
        return partial(round_rows, x, GRID, linear_map=linear_map, down=down)
    weight = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    residual = torch.randn_like(x) if name == "add, norm" else None
    return partial(norm_round, x, weight, 1e-5, GRID, residual=residual, linear_map=linear_map, down=down)


@torch.no_grad()
def time_entrances(model_map: ModelMap, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Every entrance of the model's shape, with each kind of map: microseconds, beside the copy of its bytes."""
    if device.type != "cuda":
        raise PhaseQuantError("fused entrances are a GPU's kernels: there is no CUDA device to time them on")
    shape = model_map.shape
    places = [
        ("plain", shape.heads * shape.d_head, 3),
        ("norm", shape.d_model, 3),
        ("add, norm", shape.d_model, 7),
        ("gate", shape.d_ffn, 5),
    ]  # bytes a value: 16-bit in, codes out, the sum with the residual in and out
    found = []
    for name, width, each in places:
        maps = {"": None, **_maps(width, device)}
        for count in rows:
            copies = copies_for(count * width * each)
            wide = 2 * width if name == "gate" else width
            inputs = [torch.randn(count, wide, device=device, dtype=torch.bfloat16) for _ in range(copies)]
            halves = [
                torch.zeros(count * width * each // 4, dtype=torch.int16, device=device) for _ in range(2 * copies)
            ]
            sides: dict[str, Any] = {
                "copy": [partial(torch.neg, a, out=b) for a, b in zip(halves[::2], halves[1::2], strict=True)]
            }
            for label, tiles in maps.items():
                sides[label or "no map"] = [_calls(name, x, tiles, None) for x in inputs]
            down = torch.randn(32, width, device=device, dtype=torch.bfloat16)
            sides["rank 32"] = [_calls(name, x, None, down) for x in inputs]
            times = time_calls(sides, device)
            found.append({"entrance": name, "width": width, "rows": count, "microseconds": times})
    return {"device": name_of(device), "entrances": found}
