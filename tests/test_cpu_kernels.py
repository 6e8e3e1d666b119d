"""The CPU's kernels against the reference: equal, bit for bit, on whatever may come; and what they decline."""

import os
import re
import subprocess
import sys

import pytest
import torch

from phasequant.kernels import LinearSpec
from phasequant.kernels.cpu_onednn import OneDnn, _tried
from phasequant.kernels.cpu_rounding import offset, round_rows
from phasequant.kernels.int8_cpu import Int8Cpu
from phasequant.kernels.reference import Reference
from phasequant.nn import OnlineMap, QuantLinear
from phasequant.numerics import LinearMap, QuantSpec, grid, quantize, round_to_codes

CPU = torch.device("cpu")
KERNELS = [OneDnn(), Int8Cpu()]
WEIGHTS = [
    QuantSpec(4, granularity="channel"),
    QuantSpec(3, granularity="channel"),
    QuantSpec(8, granularity="channel"),
]
GRIDS = [
    QuantSpec(4, clip=0.9),
    QuantSpec(8),
    QuantSpec(5),
    QuantSpec(2, clip=0.7),
    QuantSpec(8, granularity="tensor"),
    QuantSpec(4, rows_by="absmax", above=3.0),
    QuantSpec(4, rows_by="gsr", above=0.4, clip=0.8),
]
STATIC = [QuantSpec(8, granularity="tensor", static=True), QuantSpec(4, granularity="tensor", static=True, clip=0.9)]
ROWS = [1, 2, 3, 64, 257, 513]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(weights, grid_of, width=96, out=33, bias=True, rank=0, rounded=False):
    generator = torch.Generator().manual_seed(width + out)
    linear = QuantLinear.dense(
        torch.randn(out, width, generator=generator), torch.randn(out, generator=generator) if bias else None
    )
    linear.set_codes(*quantize(linear.weight_dense, weights), weights)
    linear.input_spec = grid_of
    if grid_of.static:
        linear.set_range(torch.tensor([[-2.5], [3.0]]))
    if rank:
        parts = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        linear.set_branch(*parts, rounded=rounded)
    return linear


def adversarial(rows, width):
    """Nothing, everything alike, one spike, powers of two (ties), the smallest and the largest numbers."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    spike = x.clone()
    spike[:, width // 2] = 1e4
    ties = torch.exp2(torch.randint(-9, 3, (rows, width), generator=torch.Generator().manual_seed(rows)).float())
    smallest = x * 1e-44
    smallest[0] = 190 * 2.0**-149  # a scale that fp32 rounds from 1.5 to 1 of its least: codes beyond the grid
    return {
        "random": x,
        "zeros": torch.cat((torch.zeros(1, width), x[1:])),
        "alike": torch.full((rows, width), -0.3),
        "spike": spike,
        "ties": ties * x.sign(),
        "halves": torch.arange(rows * width).reshape(rows, width).remainder(255).sub(127).float() / 2,
        "smallest": smallest,
        "largest": x * 1e37,
    }


def same(kernel, linear, x):
    asked = LinearSpec(*(getattr(linear.spec, n) for n in linear.spec.__slots__[:-1]), dtype=x.dtype)
    ok, reason = kernel.can_run(asked, CPU)
    assert ok, reason
    found = kernel.linear(x, kernel.prepare(linear.tensors, asked), asked)
    expected = Reference().linear(x, linear.tensors, asked)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_codes_are_the_grids(spec, dtype):
    for rows, width in ((1, 96), (3, 577), (700, 577)):
        for name, x in adversarial(rows, width).items():
            x = x.to(dtype)
            if not torch.isfinite(x).all():
                continue
            codes, found = round_rows(x, spec)
            scale, zero = grid(x.float(), spec)
            expected = round_to_codes(x.float(), scale, zero, spec)
            assert torch.equal(found.flatten(), scale.flatten()), name
            assert torch.equal(codes.to(torch.int16) - offset(spec), expected.to(torch.int16)), name


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("spec", [*GRIDS, *STATIC], ids=str)
def test_equal_to_the_reference(kernel, weights, spec):
    for width in (96, 97):
        linear = make(weights, spec, width)
        for rows in ROWS:
            for x in adversarial(rows, width).values():
                same(kernel, linear, x)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_any_type_and_shape(kernel, dtype):
    for bias in (True, False):
        linear = make(WEIGHTS[0], QuantSpec(4, clip=0.9), bias=bias)
        for shape in ((96,), (1, 1, 96), (2, 3, 96), (0, 96), (4097, 96)):
            same(kernel, linear, torch.randn(shape).to(dtype))
    same(kernel, make(WEIGHTS[0], QuantSpec(8), out=1), torch.randn(5, 192).to(dtype)[:, ::2])  # not contiguous


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("rounded", [False, True])
def test_with_a_branch(kernel, rounded):
    for rows in (1, 300):
        same(kernel, make(WEIGHTS[0], QuantSpec(4), rank=5, rounded=rounded), torch.randn(rows, 96).bfloat16())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("weights, width", [(WEIGHTS[0], 2**14), (WEIGHTS[2], 2**10)], ids=["w4", "w8"])
def test_the_largest_sums_that_fp32_holds(kernel, weights, width):
    """Before the shift of unsigned codes is subtracted they are twice as large."""
    linear = make(weights, QuantSpec(8), width, 9)
    codes = torch.randint(weights.lowest, weights.highest + 1, (9, width), dtype=torch.int8)
    codes[:4] = torch.tensor([weights.lowest, weights.highest, weights.highest, weights.lowest], dtype=torch.int8)[
        :, None
    ]
    codes[2, 0] = codes[3, 0] = 1  # odd sums
    linear.set_codes(codes, torch.rand(9, 1), torch.zeros(9, 1), weights)
    x = torch.randint(-127, 128, (5, width)).float()
    x[:2] = torch.tensor([127.0, -127.0])[:, None]
    same(kernel, linear, x)
    same(kernel, linear, x[:1])
    asked = LinearSpec(width + 1, 9, weights, QuantSpec(8))
    assert not kernel.can_run(asked, CPU)[0]


def test_readers_of_one_tensor_share_its_codes():
    kernel, first, second = OneDnn(), make(WEIGHTS[0], QuantSpec(8)), make(WEIGHTS[0], QuantSpec(8), out=20)
    x = torch.randn(4, 96)

    def run(linear, x):
        return kernel.linear(x, kernel.prepare(linear.tensors, linear.spec), linear.spec)

    run(first, x)
    kept = kernel._last
    assert torch.equal(run(second, x), Reference().linear(x, second.tensors, second.spec)) and kernel._last is kept
    for change in (lambda: x.mul_(2), lambda: x[1:].neg_()):  # written to, also through a view
        change()
        assert torch.equal(run(second, x), Reference().linear(x, second.tensors, second.spec))
        assert kernel._last is not kept
    second.input_spec = QuantSpec(4)
    assert torch.equal(run(second, x), Reference().linear(x, second.tensors, second.spec))
    for _ in range(5):  # memory that is given out again
        x = torch.randn(4, 96)
        assert torch.equal(run(first, x), Reference().linear(x, first.tensors, first.spec))
        del x
    with torch.inference_mode():
        x = torch.randn(4, 96)
        for _ in range(2):
            x.mul_(3)
            assert torch.equal(run(first, x), Reference().linear(x, first.tensors, first.spec))


def test_static_ranges_are_each_linears_own():
    kernel, x = OneDnn(), torch.randn(4, 96)
    for high in (1.0, 4.0):
        linear = make(WEIGHTS[0], STATIC[0])
        linear.set_range(torch.tensor([[-1.0], [high]]))
        found = kernel.linear(x, kernel.prepare(linear.tensors, linear.spec), linear.spec)
        assert torch.equal(found, Reference().linear(x, linear.tensors, linear.spec))


def test_no_gradient_passes():
    linear = make(WEIGHTS[0], QuantSpec(8))
    x = torch.randn(4, 96, requires_grad=True)
    assert linear.kernel(CPU, x.dtype).name == "cpu-int8" and not linear(x).requires_grad


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_refusals(kernel):
    weights, spec = WEIGHTS[0], QuantSpec(8)
    for asked, reason in (
        (LinearSpec(64, 8, None, spec), "integer weights"),
        (LinearSpec(64, 8, QuantSpec(4, False, "channel"), spec), "symmetric"),
        (LinearSpec(64, 8, QuantSpec(4, True, "group", 16), spec), "one scale a row"),
        (LinearSpec(64, 8, weights, QuantSpec(8, granularity="column", static=True)), "one scale a row"),
        (LinearSpec(2**16, 8, weights, spec), "2\\^24"),
    ):
        ok, found = kernel.can_run(asked, CPU)
        assert not ok and re.search(reason, found)
    assert "CPU" in kernel.can_run(LinearSpec(64, 8, weights, spec), torch.device("cuda"))[1]
    assert OneDnn().can_run(LinearSpec(64, 8, weights, spec, dtype=torch.float64), CPU)[0] is False


OLDER = """
import torch
from test_cpu_kernels import *
for kernel in KERNELS:
    eight = LinearSpec(96, 33, WEIGHTS[2], QuantSpec(8))
    print(kernel.name, kernel.can_run(eight, CPU)[0])
    for weights, spec in ((WEIGHTS[0], QuantSpec(8)), (WEIGHTS[0], GRIDS[5]), (WEIGHTS[2], QuantSpec(4, clip=0.9))):
        linear = make(weights, spec)
        if kernel.can_run(linear.spec, CPU)[0]:
            print(kernel.name, weights.bits, spec.bits)
            for rows in (1, 2, 300):
                for x in adversarial(rows, 96).values():
                    same(kernel, linear, x)
    same(kernel, make(WEIGHTS[0], QuantSpec(8), 2**14, 9), torch.full((3, 2**14), 0.7))
"""


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2"])
def test_on_older_cpus(instructions):
    """oneDNN as it computes without VNNI: pairs of products saturate at 16 bits, which the kernels know."""
    if _tried().missing or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("oneDNN has no such instructions here")
    ran = subprocess.run(
        [sys.executable, "-c", OLDER],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": os.path.dirname(__file__)},  # noqa: PTH120
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "cpu-int8 False",
        "cpu-int8 4 8",
        "cpu-int8 4 4",
        "cpu-int8 8 4",
        "cpu-int8-torch False",
        "cpu-int8-torch 4 8",
        "cpu-int8-torch 4 4",
    ]


def test_readers_of_one_tensor_share_its_map(monkeypatch):
    mapped = []
    forward = OnlineMap.forward
    monkeypatch.setattr(OnlineMap, "forward", lambda self, x: mapped.append(self) or forward(self, x))
    first, second = (make(WEIGHTS[0], QuantSpec(8)) for _ in range(2))
    rotation = LinearMap.kronecker(*(torch.linalg.qr(torch.randn(n, n))[0] for n in (8, 12)))
    for linear in (first, second):
        linear.online = OnlineMap.of(rotation)
    x = torch.randn(4, 96)

    def right(linear, runs):
        """One call, and whether the map ran."""
        mapped.clear()
        found = linear(x)
        assert len(mapped) == runs
        read = forward(linear.online, x.clone())
        assert torch.equal(found, Reference().linear(read, linear.tensors, linear.spec))

    right(first, 1)
    right(second, 0)
    x.add_(1)
    right(second, 1)
    right(first, 0)
    first.online.left.mul_(0.5)  # the map that was last run
    right(first, 1)
    right(second, 1)
    second.online.left.neg_()  # another than the last run
    second.online.left.neg_()
    right(first, 1)
    for _ in range(3):
        x = torch.randn(4, 96)
        right(first, 1)
    del x
    x = torch.randn(4, 96, requires_grad=True)
    right(first, 1)
    right(first, 1)
