"""Static grids: their ranges are what calibration says, and every kernel reads them as the reference does."""

from dataclasses import replace

import pytest
import torch

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.kernels import LinearSpec, LinearTensors
from phasequant.kernels.int8_cpu import Int8Cpu
from phasequant.kernels.reference import Reference
from phasequant.nn import quant_linears
from phasequant.numerics import QuantSpec, fake_quantize, grid, pack, quantize, round_to_codes, static_grid
from phasequant.observe.ranges import Reached, chosen_range
from phasequant.pipeline import calibration_tokens
from phasequant.recipe import Recipe

TENSOR = QuantSpec(8, True, "tensor", static=True)
COLUMN = QuantSpec(8, True, "column", static=True)
CPU = torch.device("cpu")


def values(seed=0, rows=64, columns=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 5, columns)


def reached_by(x, columns=None):
    found = Reached(columns, histogram=True)
    for part in x.split(10):
        found.add(part)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "column"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_grid_over_its_own_values_is_the_dynamic_one(granularity, symmetric, bits):
    x = values()
    spec = QuantSpec(bits, symmetric, granularity, clip=0.9, static=True)
    span = reached_by(x, x.shape[1] if granularity == "column" else None).range()
    assert torch.equal(fake_quantize(x, spec, span), fake_quantize(x, spec.dynamic))
    for got, wanted in zip(static_grid(span, spec), grid(x, spec.dynamic), strict=True):
        assert torch.equal(got, wanted.flatten())


def test_a_column_is_rounded_on_its_own_scale():
    x = values()
    rounded = fake_quantize(x, COLUMN.dynamic)
    for i in range(x.shape[1]):
        assert torch.equal(rounded[:, i], fake_quantize(x[None, :, i], QuantSpec(8))[0])


def test_static_values_beyond_the_range_are_clamped():
    rounded = fake_quantize(torch.tensor([[5.0, -9.0, 0.5]]), TENSOR, torch.tensor([[-1.0], [1.0]]))
    assert torch.allclose(rounded, torch.tensor([[1.0, -128 / 127, 0.5]]), atol=1 / 127)


def test_a_static_grid_without_a_range_is_an_error():
    with pytest.raises(PhaseQuantError, match="has a calibrated range, and none was given"):
        quantize(values(), TENSOR)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("columns", [None, 32])
def test_percentiles_are_those_of_all_values_to_two_percent(percent, columns):
    x = values(rows=997)
    found = reached_by(x, columns).percentile(percent)
    wanted = (
        x.abs().reshape(-1, 1 if columns is None else columns).quantile(percent / 100, dim=0, interpolation="higher")
    )
    assert ((found / wanted - 1).abs() < 0.023).all()
    assert (found >= wanted * 0.999).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_least_error_is_near_that_of_trying_all(bits):
    x = values(rows=512)
    x[3, 7] = 400.0  # a spike: the best range lies far below it at 4 bits
    spec = QuantSpec(bits, True, "tensor", static=True)
    found = chosen_range(reached_by(x), spec, "mse", 0.0)

    def error(most):
        return float((fake_quantize(x, spec, torch.tensor([[-most], [most]])) - x).square().sum())

    tried = {most: error(most) for most in torch.logspace(0, 2.7, 200).tolist()}
    assert error(float(found[1])) <= min(tried.values()) * 1.1
    assert chosen_range(reached_by(x), spec, "absmax", 0.0)[1] == 400.0


def test_ranges_are_of_zero_and_of_what_is_there():
    found = reached_by(torch.zeros(4, 8))
    assert torch.equal(found.range(), torch.zeros(2, 1))
    assert torch.equal(fake_quantize(torch.zeros(2, 8), TENSOR, found.range()), torch.zeros(2, 8))


def tensors(seed, spec, x):
    weight = values(seed, 48, x.shape[1])
    grid_of = QuantSpec(4, True, "channel")
    codes, scale, zero = quantize(weight, grid_of)
    columns = x.shape[1] if spec.granularity == "column" else None
    return LinearTensors(
        None, pack(codes, grid_of), scale, zero, torch.randn(48), input_range=reached_by(x / 2, columns).range()
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_equals_the_reference_on_static_grids(bits):
    x, spec = values(), QuantSpec(bits, True, "tensor", static=True)
    weights, asked = tensors(1, spec, x), LinearSpec(32, 48, QuantSpec(4, True, "channel"), spec)
    assert Int8Cpu().can_run(asked, CPU)[0]
    assert torch.equal(Int8Cpu().linear(x, weights, asked), Reference().linear(x, weights, asked))
    # and the range is what it reads, not what passes: a larger row beside it changes nothing
    alone = Reference().linear(x[:1], weights, asked)
    assert torch.equal(Reference().linear(torch.cat((x[:1], 100 * x[1:2])), weights, asked)[:1], alone)


def test_columns_go_to_the_reference():
    x = values()
    weights, asked = tensors(1, COLUMN, x), LinearSpec(32, 48, QuantSpec(4, True, "channel"), COLUMN)
    assert not Int8Cpu().can_run(asked, CPU)[0]
    codes = round_to_codes(x, *static_grid(weights.input_range, COLUMN), COLUMN)
    assert codes.unique().numel() > 100
    plain = Reference().linear(x, weights, LinearSpec(32, 48, QuantSpec(4, True, "channel"), None))
    assert (
        float((Reference().linear(x / 2, weights, asked) * 2 - plain).abs().max()) < 0.05 * float(plain.abs().max()) + 5
    )


@pytest.mark.parametrize("calibrate", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_quantized_model_reads_its_ranges(granularity, calibrate, tiny, ids, text_file, tmp_path):
    recipe = Recipe.from_dict(
        {
            "weights": {"bits": 8},
            "activations": {"bits": 8, "granularity": granularity, "scales": "static", "calibrate": calibrate},
            "calibration": {"text": str(text_file), "sequences": 4, "seqlen": 32},
        }
    )
    source = tiny("llama")
    seen, _ = calibration_tokens(source, recipe)  # what the ranges are of; other text reaches further
    with torch.no_grad():
        exact = source.model(seen).logits
    run = phasequant.quantize(source, recipe)
    for _, linear in quant_linears(run.model):
        assert linear.input_spec.static and linear.input_range.shape == (
            2,
            1 if granularity == "tensor" else linear.in_features,
        )
        assert (linear.input_range[0] <= linear.input_range[1]).all()
    ranges = [m.input_range for n, m in quant_linears(run.model) if n.endswith(("gate_proj", "up_proj"))]
    assert torch.equal(ranges[0], ranges[1])  # one input, one grid
    with torch.no_grad():
        made = run.model(ids).logits
        one = run.model(ids[:1]).logits
        assert torch.equal(made[:1], one)  # nothing in a batch depends on what else is in it
        found = run.model(seen).logits
    assert float((found - exact).norm() / exact.norm()) < 0.06
    run.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(phasequant.load(tmp_path / "out")(ids).logits, made)


def test_raised_groups_and_other_plans_have_ranges_too(tiny, ids, text_file):
    recipe = Recipe.from_dict(
        {
            "weights": {"bits": 4},
            "activations": {"bits": 4, "granularity": "tensor", "scales": "static"},
            "policy": {"name": "paper"},
            "exclude": {"method": "qfem", "alpha": 2.0},
            "calibration": {"text": str(text_file), "sequences": 4, "seqlen": 32},
        }
    )
    run = phasequant.quantize(tiny("llama"), recipe)
    plain = replace(run.plan, raised={})
    with torch.no_grad(), run.reading(plain) as model:
        low = model(ids).logits
    assert torch.isfinite(low).all() and not torch.equal(low, run.model(ids).logits)


def test_mistakes_in_static_recipes():
    for values_, message in (
        ({"scales": "static"}, "needs activations.granularity=tensor or channel"),
        ({"granularity": "channel"}, "needs activations.scales=static"),
    ):
        with pytest.raises(PhaseQuantError, match=message):
            Recipe.from_dict({"activations": {"bits": 8, **values_}})
    with pytest.raises(PhaseQuantError, match="static scales are per tensor or column, not per token"):
        QuantSpec(8, True, "token", static=True)
