r"""Integer products on a CPU by oneDNN: unsigned activations, signed weights, laid out for the matrix units once.

    y[t,o] = s_x[t] · ( s_w[o] · Σ_i (u[t,i] - o_x)·q_w[o,i] )         u = q_x + o_x  (`cpu_rounding`)

The inner bracket is one call (`onednn.qlinear_pointwise`): int32 sums, o_x·Σ_i q_w subtracted, times s_w in fp32. The
reference's integers and the reference's roundings, so the same bits as long as the sums fit fp32 exactly. Rows go
through in portions whose outputs are scaled and rounded to the type of x while they are in the cache. Linears that read
the same tensor round it once: the codes of the last input are kept as long as that tensor lives unchanged.

Twice the rate of bfloat16's product with AMX; with VNNI alone, where bfloat16 has no units, many times. CPUs with
neither add pairs of products in 16 bits, which saturates: there only grids are taken whose pairs fit (4-bit weights, or
4-bit activations), and whether a CPU does is tried, not looked up.

A single row is a call's overhead and one pass over the weights. Where the overhead counts, linears of up to 4 million
weights, it goes to `torch._int_mm`, which has half of either, and reads the codes as they were before oneDNN laid them
out; its int32 sums are shifted and scaled here, in the same order.

Memory, beside the codes that are stored: a byte a weight, two for such small linears.
"""

import weakref
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.kernels.cpu_rounding import offset, round_rows
from phasequant.kernels.int8_cpu import one_scale_a_row
from phasequant.kernels.reference import add_rest
from phasequant.numerics import QuantSpec, unpack

PORTION, LEAST_ROWS = 2**19, 256  # outputs that a core takes at once: 2 MiB of fp32; fewer rows slow the product
SMALL = 2**22  # weights
INT16 = 2**15 - 1


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes in oneDNN's own layout, s_w (O,); of small ones `rows`, q_w (I, O) and o_x·Σ_i q_w; `tensors`, the rest."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    tensors: LinearTensors
    rows: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    """The last input and its codes. `of` is dead when that tensor is."""

    of: weakref.ref[Tensor]
    version: int
    spec: QuantSpec
    codes: Tensor
    scale: Tensor


class OneDnn:
    """See the module's docstring."""

    name = "cpu-int8"

    def __init__(self) -> None:
        self._last: _Read | None = None

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Symmetric integer grids on a CPU, one scale a row, sums below 2^24."""
        ok, reason = one_scale_a_row(spec, device)
        if not ok or spec.weight is None or spec.input is None:
            return ok, reason
        if spec.dtype == torch.float64:
            return False, "scales in fp32, and the input has 64 bits"
        found = _tried()
        if found.missing:
            return False, f"this torch has no int8 product of oneDNN's: {found.missing}"
        if found.saturates and 2 * (2 * offset(spec.input) - 1) * spec.weight.reach > INT16:
            return False, "this CPU adds int8 products in 16 bits, where 8-bit weights times 8-bit activations overflow"
        return True, "exact int32 sums"

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> Packed:
        """Codes as oneDNN wants them."""
        assert spec.weight is not None and weights.packed is not None and weights.scale is not None
        assert spec.input is not None
        codes = unpack(weights.packed, spec.in_features, spec.weight).contiguous()
        rows = None
        if codes.numel() <= SMALL and _tried().single:
            rows = codes.T, offset(spec.input) * codes.sum(1, dtype=torch.int32)
        scale = weights.scale[:, 0].to(torch.float32).contiguous()
        zero = torch.zeros(len(scale), dtype=torch.int64)
        return Packed(_pack(codes), scale, zero, replace(weights, packed=None), rows)

    def linear(
        self, x: Float[Tensor, "*rows I"], weights: Packed | LinearTensors, spec: LinearSpec
    ) -> Float[Tensor, "*rows O"]:
        """The reference's numbers, bit for bit; no gradient."""
        assert spec.input is not None
        if isinstance(weights, LinearTensors):
            weights = self.prepare(weights, spec)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], spec.out_features)
        codes, scale = self._rounded(x, weights.tensors, spec)
        if spec.rank:
            y = _product(codes, weights, offset(spec.input)).mul_(scale).reshape(*x.shape[:-1], -1)
            return add_rest(y, x.detach().to(torch.float32), weights.tensors, spec).to(x.dtype)
        return self.product(codes, scale, weights, spec).to(x.dtype).reshape(*x.shape[:-1], -1)

    def product(
        self,
        codes: UInt8[Tensor, "T I"],
        scale: Float[Tensor, "S 1"],
        weights: Packed,
        spec: LinearSpec,
    ) -> Float[Tensor, "T O"]:
        """Codes and scales of `cpu_rounding` times the weights, with the bias; a low-rank branch is left out."""
        assert spec.input is not None
        shift, bias, dtype = offset(spec.input), weights.tensors.bias, spec.dtype or torch.float32
        bias = None if bias is None else bias.to(torch.float32)
        count = codes.shape[0]
        rows = max(LEAST_ROWS, PORTION // spec.out_features) * torch.get_num_threads()
        if count <= rows:
            if count == 1 and weights.rows is not None:
                q_w, shifted = weights.rows
                y = torch._int_mm(codes, q_w).sub_(shifted).to(torch.float32).mul_(weights.scale)
            else:
                y = _product(codes, weights, shift)
            y.mul_(scale)
            return (y if bias is None else y.add_(bias)).to(dtype)
        out = torch.empty(count, spec.out_features, dtype=dtype)
        for at in range(0, count, rows):
            part = slice(at, at + rows)
            y = _product(codes[part], weights, shift)
            s_x = scale if scale.shape[0] == 1 else scale[part]
            if dtype == y.dtype and bias is None:
                torch.mul(y, s_x, out=out[part])
            else:
                y.mul_(s_x)
                out[part].copy_(y if bias is None else y.add_(bias))
        return out

    def _rounded(self, x: Tensor, tensors: LinearTensors, spec: LinearSpec) -> tuple[Tensor, Tensor]:
        """Codes and scales of the input, or those of the reader before."""
        assert spec.input is not None
        flat = x.detach().reshape(-1, spec.in_features)
        if spec.input.static or x.is_inference():  # each linear has its own range; no version to tell a change by
            return round_rows(flat, spec.input, tensors.input_range if spec.input.static else None)
        last = self._last
        if last is not None and last.of() is x and last.version == x._version and last.spec == spec.input:
            return last.codes, last.scale
        codes, scale = round_rows(flat, spec.input)
        self._last = _Read(weakref.ref(x), x._version, spec.input, codes, scale)
        return codes, scale


def _pack(codes: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack.default(codes.contiguous(), None)


def _product(codes: UInt8[Tensor, "T I"], weights: Packed, shift: int) -> Float[Tensor, "T O"]:
    """s_w·Σ(u - shift)·q_w, fp32."""
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, shift, weights.codes, weights.scale, weights.zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Why oneDNN's product is missing ("": it is not), whether pairs saturate, whether `_int_mm` takes single rows."""

    missing: str
    saturates: bool = False
    single: bool = False


@cache
def _tried() -> _Found:
    """What there is here, by the extreme codes."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    codes = torch.tensor([0, 255], dtype=torch.uint8)[:, None].expand(2, 64).contiguous()
    exact = torch.tensor([-128.0, 127.0])[:, None] * 127 * 64
    one, none = torch.ones(32), torch.zeros(32, dtype=torch.int64)

    def product(rows: Tensor, weights: Tensor) -> Tensor:
        return _product(rows, Packed(_pack(weights), one, none, LinearTensors()), 128)

    try:
        if not torch.equal(product(codes, weight // 127), (exact / 127).expand(2, 32)):
            return _Found("it gives other integers")
        saturates = not all(torch.equal(product(u, weight), exact[: len(u)].expand(-1, 32)) for u in (codes, codes[:1]))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return _Found(str(error).strip().splitlines()[0])
    try:
        sums = torch._int_mm(codes[1:], weight.T // 127)
    except RuntimeError:  # before torch 2.12
        return _Found("", saturates)
    return _Found("", saturates, bool((sums == 255 * 64).all()))


__all__ = ["OneDnn", "Packed"]
