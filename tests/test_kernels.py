"""The reference against plain arithmetic, and every kernel against the reference: equal, not close."""

import copy
import pickle

import pytest
import torch

from phasequant.errors import PhaseQuantError
from phasequant.kernels import KERNELS, LinearSpec, choose
from phasequant.kernels.reference import Reference
from phasequant.nn import QuantLinear
from phasequant.numerics import QuantSpec, fake_quantize, quantize

WEIGHTS = [
    QuantSpec(4, True, "channel"),
    QuantSpec(4, False, "channel"),
    QuantSpec(3, True, "group", 16),
    QuantSpec(8, True, "channel"),
]
INPUTS = [QuantSpec(4), QuantSpec(4, clip=0.8), QuantSpec(8), QuantSpec(4, False), QuantSpec(8, True, "tensor"), None]


def make(weight_spec, input_spec, width=48, out=20, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    linear = QuantLinear.dense(weight, torch.randn(out, generator=generator) if bias else None)
    linear.set_codes(*quantize(weight, weight_spec), weight_spec)
    linear.input_spec = input_spec
    return linear


@pytest.mark.parametrize("weight_spec", WEIGHTS, ids=str)
@pytest.mark.parametrize("input_spec", INPUTS, ids=str)
def test_reference_is_the_product_of_the_rounded(weight_spec, input_spec):
    linear = make(weight_spec, input_spec)
    x = torch.randn(3, 7, 48)
    seen = x if input_spec is None else fake_quantize(x.double(), input_spec)
    expected = seen.double() @ linear.dense_weight().double().T + linear.bias.double()
    y = Reference().linear(x, linear.tensors, linear.spec)
    assert y.shape == (3, 7, 20)
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("weight_spec", WEIGHTS, ids=str)
@pytest.mark.parametrize("input_spec", [s for s in INPUTS if s is not None], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 65])
def test_kernels_equal_the_reference(kernel, weight_spec, input_spec, rows):
    linear = make(weight_spec, input_spec, width=96, out=33, seed=rows)
    ok, reason = kernel.can_run(linear.spec, torch.device("cpu"))
    if not ok:
        assert reason  # a refusal says why
        return
    cases = [torch.randn(rows, 96), torch.zeros(rows, 96), torch.full((rows, 96), 1e4)]
    cases.append(torch.where(torch.rand(rows, 96) < 0.02, 1e5, torch.randn(rows, 96)))
    for x in cases:
        expected = Reference().linear(x, linear.tensors, linear.spec)
        assert torch.equal(kernel.linear(x, kernel.prepare(linear.tensors, linear.spec), linear.spec), expected)


def test_sums_beyond_fp32_stay_exact():
    """8-bit inputs on 8-bit weights of a wide layer exceed 2^24: the reference switches to fp64, int8 declines."""
    spec = QuantSpec(8)
    width = 4096
    linear = make(QuantSpec(8, True, "channel"), spec, width=width, out=3, bias=False)
    linear.set_codes(torch.full((3, width), 127, dtype=torch.int8), torch.ones(3, 1), torch.zeros(3, 1), QuantSpec(8))
    x = torch.ones(1, width)
    x[0, -1] = 1 / 127
    y = Reference().linear(x, linear.tensors, linear.spec)
    exact = (127 * 127 * (width - 1) + 127) / 127
    assert y[0, 0].item() == pytest.approx(exact, rel=1e-7)
    assert choose(linear.spec, torch.device("cpu")).name == "reference"


def test_choice_is_told_and_refusals_give_reasons():
    spec = LinearSpec(48, 20, QuantSpec(4, False, "channel"), QuantSpec(4))
    assert choose(spec, torch.device("cpu")).name == "reference"
    with pytest.raises(PhaseQuantError, match="symmetric grids"):
        choose(spec, torch.device("cpu"), "cpu-int8")
    with pytest.raises(PhaseQuantError, match=r"cpu-int8, .*reference"):
        choose(spec, torch.device("cpu"), "marlin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_has_the_inputs_type(dtype):
    linear = make(QuantSpec(4, True, "channel"), QuantSpec(4))
    assert linear(torch.randn(2, 48, dtype=dtype)).dtype == dtype


def test_a_16_bit_side_is_just_that():
    weight = torch.randn(20, 48)
    linear = QuantLinear.dense(weight, None)
    x = torch.randn(5, 48)
    assert torch.equal(linear(x), x @ weight.T)
    linear.input_spec = QuantSpec(4)
    assert torch.allclose(linear(x), fake_quantize(x, QuantSpec(4)) @ weight.T)


def _changes():
    def codes(linear):
        linear.set_codes(*quantize(torch.randn(20, 48), QuantSpec(4, True, "channel")), linear.weight_spec)

    def other(linear):
        there = make(QuantSpec(4, True, "channel"), QuantSpec(4), seed=5)
        linear.load_state_dict(there.state_dict())

    return {
        "codes": codes,
        "loading": other,
        "packed": lambda linear: linear.weight_packed.bitwise_xor_(1),
        "scale": lambda linear: linear.weight_scale.mul_(1.5),
        "bias": lambda linear: linear.bias.add_(1),
        "bias.data": lambda linear: setattr(linear.bias, "data", linear.bias.data + 1),
        "grid": lambda linear: setattr(linear, "input_spec", QuantSpec(8)),
        "branch": lambda linear: linear.set_branch(torch.randn(2, 48), torch.randn(20, 2), rounded=False),
        "move": lambda linear: linear.to(torch.float64),
    }


@pytest.mark.parametrize("change", _changes().values(), ids=_changes())
def test_prepared_weights_follow_every_change(change):
    linear = make(QuantSpec(4, True, "channel"), QuantSpec(4))
    x = torch.randn(5, 48)
    linear(x)
    kept = linear._kept
    linear(x)
    assert linear._kept is kept and kept.kernel.name != "reference"
    for _ in range(2):  # memory that is freed may be handed out again
        change(linear)
        assert torch.equal(linear(x), Reference().linear(x, linear.tensors, linear.spec))
    assert linear._kept is not kept


def test_prepared_weights_stay_where_they_are():
    linear = make(QuantSpec(4, True, "channel"), QuantSpec(4))
    plain = set(linear.state_dict())
    linear(torch.randn(5, 48))
    assert set(linear.state_dict()) == plain
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert copied._kept is None and linear._kept is not None
        x = torch.randn(3, 48)
        assert torch.equal(copied(x), linear(x))
    linear.to("cpu")
    assert linear._kept is None


def test_tensors_without_a_version_are_prepared_anew():
    with torch.inference_mode():
        linear = make(QuantSpec(4, True, "channel"), QuantSpec(4))
        x = torch.randn(5, 48)
        linear(x)
        assert linear._kept is None
        linear.weight_scale.mul_(2)
        assert torch.equal(linear(x), Reference().linear(x, linear.tensors, linear.spec))
