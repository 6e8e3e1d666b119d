"""Products for a GPU give the reference's integers: Triton's in its interpreter here, all of them on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from phasequant.errors import PhaseQuantError
from phasequant.kernels import LinearSpec, LinearTensors, choose
from phasequant.kernels.gpu.product import product, split_columns
from phasequant.kernels.humming import Humming
from phasequant.kernels.reference import Reference
from phasequant.kernels.triton_int import TritonInt
from phasequant.numerics import QuantSpec, pack, quantize, weight_scale

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
W4, W8 = QuantSpec(4, True, "channel"), QuantSpec(8, True, "channel")
WEIGHTS = [W4, W8, QuantSpec(4, False, "channel"), QuantSpec(3, True, "channel"), QuantSpec(4, True, "group", 64),
           QuantSpec(4, False, "group", 64)]  # fmt: skip
A4, A8 = QuantSpec(4), QuantSpec(8)
INPUTS = [A4, A8, QuantSpec(6, clip=0.8), QuantSpec(4, rows_by="absmax", above=2.5)]
REFUSED = [(None, A4), (W4, None), (W4, QuantSpec.floating("nvfp4")), (W4, QuantSpec(4, False)),
           (W4, QuantSpec(8, True, "tensor", static=True)), (QuantSpec(4, True, "group", 32), A4),
           (W4, QuantSpec(4, rows_by="gsr", above=1.0)), (QuantSpec(8, False, "channel"), A4)]  # fmt: skip
ROWS = [1, 2, 17, 33]


def tensors(width, out, spec, *, bias=False, rank=0) -> LinearTensors:
    weight = torch.randn(out, width)
    codes, scale, zero = quantize(weight, spec)
    return LinearTensors(
        packed=pack(codes, spec).to(DEVICE), scale=weight_scale(scale, spec).to(DEVICE), zero=zero.to(DEVICE),
        bias=torch.randn(out, device=DEVICE) if bias else None,
        down=torch.randn(rank, width, device=DEVICE) / width**0.5 if rank else None,
        up=torch.randn(out, rank, device=DEVICE) if rank else None,
    )  # fmt: skip


@pytest.mark.parametrize("width,out", [(64, 64), (107, 54), (192, 33)])
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_every_sum_is_the_integer(spec, width, out):
    if spec.granularity == "group" and width % 64:
        width = 128
    held = tensors(width, out, spec)
    codes, _, zero = (t.to(DEVICE) for t in quantize(torch.randn(out, width), spec))
    packed = pack(codes, spec)
    for rows in ROWS:
        x = torch.randint(-128, 128, (rows, width), dtype=torch.int8, device=DEVICE)
        x[0] = 127 if rows % 2 else -128  # as far as sums go
        given = split_columns(x) if spec.bits <= 4 else x
        ones = torch.ones(rows, device=DEVICE)
        found = product(
            given, ones, packed, torch.ones_like(held.scale), torch.float32, w_zero=None if spec.symmetric else zero
        )
        span = width // zero.shape[1]
        centred = codes.double() - zero.double().repeat_interleave(span, 1)
        assert torch.equal(found.double(), x.double() @ centred.T)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_split_sums_change_nothing(split):
    held = tensors(1200, 70, W4, bias=True, rank=5)
    x = torch.randint(-8, 8, (9, 1200), dtype=torch.int8, device=DEVICE)
    scale, down = torch.rand(9, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    given = (split_columns(x), scale, held.packed, held.scale, torch.float32)
    assert torch.equal(product(*given, split=split), product(*given, split=1))
    rest = {"bias": held.bias, "down": down, "up": held.up}
    torch.testing.assert_close(product(*given, split=split, **rest), product(*given, split=1, **rest))


@pytest.mark.parametrize("rest", [{}, {"bias": True}, {"rank": 4}, {"bias": True, "rank": 4}], ids=str)
@pytest.mark.parametrize("input_spec", INPUTS, ids=str)
@pytest.mark.parametrize("weight_spec", WEIGHTS[:4], ids=str)
def test_triton_is_the_reference(weight_spec, input_spec, rest):
    width, out = 96, 40
    held = tensors(width, out, weight_spec, **rest)
    spec = LinearSpec(width, out, weight_spec, input_spec, rest.get("rank", 0), dtype=torch.float32)
    kernel = TritonInt()
    assert kernel.takes(spec)[0]
    for rows in (1, 5, 20):
        x = torch.randn(rows, width, device=DEVICE) * torch.rand(rows, 1, device=DEVICE).exp()
        want = Reference().linear(x, held, spec)
        found = kernel.linear(x, kernel.prepare(held, spec), spec)
        assert torch.equal(found, want) if not rest else torch.allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 96), (0, 96), (96,)], ids=str)
def test_any_leading_axes(shape):
    held = tensors(96, 40, W4)
    spec = LinearSpec(96, 40, W4, A4, dtype=torch.float32)
    x = torch.randn(shape, device=DEVICE)
    assert torch.equal(TritonInt().linear(x, held, spec), Reference().linear(x, held, spec))


def test_what_they_refuse():
    for kernel in (TritonInt(), Humming()):
        assert not kernel.can_run(LinearSpec(64, 64, W4, A4), torch.device("cpu"))[0]
        for weight, given in REFUSED:
            assert not kernel.takes(LinearSpec(64, 64, weight, given))[0], (kernel.name, weight, given)
    assert not Humming().takes(LinearSpec(96, 64, W4, A4))[0]
    assert not Humming().takes(LinearSpec(64, 64, W4, A4, dtype=torch.float32))[0]


def test_a_kernel_by_name(monkeypatch):
    monkeypatch.setenv("PHASEQUANT_KERNEL", "reference")
    assert choose(LinearSpec(64, 64, W4, A4), torch.device("cpu")).name == "reference"
    monkeypatch.setenv("PHASEQUANT_KERNEL", "humming-int8")
    with pytest.raises(PhaseQuantError, match="humming-int8: "):
        choose(LinearSpec(64, 64, W4, A4), torch.device("cpu"))


@pytest.mark.skipif(not GPU, reason="needs a CUDA device that is visible")
@pytest.mark.parametrize(
    "weight_spec,rest,dtype",
    [(W4, {}, torch.bfloat16), (W4, {"bias": True}, torch.bfloat16), (W4, {"rank": 16}, torch.float16),
     (W8, {}, torch.bfloat16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("input_spec", INPUTS, ids=str)
def test_humming_is_the_reference(weight_spec, input_spec, rest, dtype):
    pytest.importorskip("humming")
    for width, out in ((576, 960), (4096, 1024)):
        held = tensors(width, out, weight_spec, **rest)
        spec = LinearSpec(width, out, weight_spec, input_spec, rest.get("rank", 0), dtype=dtype)
        kernel = Humming()
        assert kernel.can_run(spec, DEVICE)[0]
        weights = kernel.prepare(held, spec)
        for rows in (1, 2, 15, 16, 64, 129, 4097):
            x = torch.randn(rows, width, device=DEVICE, dtype=dtype)
            want = Reference().linear(x.float(), held, spec)
            found = kernel.linear(x, weights, spec).float()
            unit = want.abs().clamp(min=want.abs().mean()) * (2**-7 if dtype == torch.bfloat16 else 2**-10)
            off = (found - want).abs() / unit  # parts of a long sum are added in 16 bits: units of their size
            if not rest:
                assert off.max() <= 4, (width, rows, off.max())
            assert (found - want).abs().max() <= 0.02 * want.abs().max()


def test_humming_refuses_long_scales(monkeypatch):
    held = tensors(64, 64, W4)
    long = LinearTensors(packed=held.packed, scale=held.scale * 1.0001, zero=held.zero)
    kernel = Humming()
    spec = LinearSpec(64, 64, W4, A4, dtype=torch.bfloat16)
    monkeypatch.setattr("phasequant.kernels.humming._layer", lambda *_: pytest.fail("laid out all the same"))
    with pytest.raises(PhaseQuantError, match="PHASEQUANT_KERNEL"):
        kernel.prepare(long, spec)
