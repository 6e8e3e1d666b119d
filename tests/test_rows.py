"""Per-token precision: the rule, the exact kernels, plans, checkpoints, counting."""

from dataclasses import replace

import pytest
import torch
from conftest import NEW, where

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.kernels import KERNELS, LinearSpec, choose
from phasequant.nn import QuantLinear, row_share
from phasequant.numerics import QuantSpec, fake_quantize, quantize, row_measure, straight_through, wide_rows
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe

NARROW = QuantSpec(4, clip=0.8)


def mixed(by: str = "absmax", above: float = 3.0, **changes) -> QuantSpec:
    return replace(NARROW, rows_by=by, above=above, **changes)


@pytest.mark.parametrize("by", ["absmax", "gsr"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_above_the_threshold_read_eight_bits_and_the_others_four(by, symmetric):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    x[7] *= 5
    x[9, 3] = 12.0
    spec = mixed(by, float(row_measure(x, mixed(by)).median()), symmetric=symmetric)
    rows = wide_rows(x, spec)
    assert 0 < rows.sum() < len(x) and rows[9]
    found = fake_quantize(x, spec)
    assert torch.equal(found[rows], fake_quantize(x[rows], replace(NARROW, bits=8, clip=1.0, symmetric=symmetric)))
    assert torch.equal(found[~rows], fake_quantize(x[~rows], replace(NARROW, symmetric=symmetric)))
    codes, scale, zero = quantize(x, spec)
    back = (codes.float() - zero) * scale
    assert torch.equal(back, found)
    top = codes[~rows].float()
    assert top.min() >= spec.lowest and top.max() <= spec.highest
    assert codes[rows].float().max() > spec.highest


def test_the_rules_are_what_they_say():
    x = torch.tensor([[1.0, -3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert row_measure(x, mixed("absmax")).tolist() == [3.0, 0.0]
    expected = 3.0 / (7 * x[0].std(correction=0))
    assert row_measure(x, mixed("gsr"))[0] == pytest.approx(float(expected)) and row_measure(x, mixed("gsr"))[1] == 0


def test_gradients_pass_through_either_grid():
    x = torch.randn(6, 16, requires_grad=True)
    spec = mixed("absmax", float(x.detach().abs().amax(-1).median()))
    ratio = torch.tensor(0.8, requires_grad=True)
    y = straight_through(x, spec, ratio)
    assert torch.allclose(y, fake_quantize(x.detach(), spec))
    y.square().sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all() and ratio.grad != 0


def linear(spec: QuantSpec) -> QuantLinear:
    made = QuantLinear.dense(torch.randn(24, 32, generator=torch.Generator().manual_seed(1)), None)
    weights = QuantSpec(4, granularity="channel")
    made.set_codes(*quantize(made.weight_dense, weights), weights)
    made.input_spec = spec
    return made


def test_kernels_give_the_same_numbers_and_rows_are_counted():
    x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(2))
    spec = mixed("absmax", float(x.abs().amax(-1).median()))
    made = linear(spec)
    names = []
    for kernel in KERNELS:
        if kernel.can_run(made.spec, x.device)[0]:
            names.append(kernel.linear(x, made.tensors, made.spec))
    assert len(names) >= 2 and all(torch.equal(names[0], other) for other in names[1:])
    made(x)
    assert made.rows_read() == (int(wide_rows(x, spec).sum()), 60)
    model = torch.nn.Sequential(made)
    assert row_share(model, forget=True) == pytest.approx(float(wide_rows(x, spec).float().mean()))
    assert row_share(model) is None


def test_a_kernel_is_asked_about_the_wide_rows():
    """Sums of 8-bit rows must fit what the kernel sums in, not only those of 4-bit ones."""
    weights = QuantSpec(8, granularity="channel")
    width = 2**24 // (128 * 128) + 1
    assert choose(LinearSpec(width, 8, weights, NARROW), torch.device("cpu")).name == "cpu-int8"
    assert choose(LinearSpec(width, 8, weights, mixed()), torch.device("cpu")).name == "reference"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_by": "gsr"}, {"above": 1.0}, {"rows_by": "size", "above": 1.0}, {"rows_by": "gsr", "above": -1.0},
        {"rows_by": "gsr", "above": 1.0, "bits": 8}, {"rows_by": "gsr", "above": 1.0, "granularity": "tensor"},
    ],
)  # fmt: skip
def test_grids_that_cannot_be_mixed(changes):
    with pytest.raises(PhaseQuantError):
        replace(NARROW, **changes)


def recipe(text, share: float = 0.1, by: str = "absmax", **parts) -> Recipe:
    return Recipe.from_dict(
        {
            "transform": {"method": "quarot"}, "weights": {"bits": 4}, "kv": {"bits": 4},
            "activations": {"bits": 4, "token_policy": by, "token_share": share, "clip": 0.9},
            "calibration": {"text": str(text), "sequences": 4, "seqlen": 64}, **parts,
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama-one", "llama-odd", "qwen3", *NEW])
def test_a_checkpoint_keeps_the_rows(name, tiny, text_file, tmp_path):
    source = tiny(name)
    run = phasequant.quantize(source, recipe(text_file), overrides=where(name))
    assert len(run.plan.rows.above) == len(run.plan.activations)
    run.save(tmp_path / "out")
    here = phasequant.evaluate(run, text=text_file, chunks=2, seqlen=64)
    there = phasequant.evaluate(tmp_path / "out", text=text_file, chunks=2, seqlen=64)
    assert here["ppl"] == there["ppl"] and here["row_share"] == there["row_share"]
    assert 0.02 < here["row_share"] < 0.3


def test_the_share_on_the_calibration_text_is_what_was_asked(tiny, text_file):
    source = tiny("llama")
    run = phasequant.quantize(source, recipe(text_file, 0.25, weights={"bits": 16}, kv={"bits": 16}))
    tokens = next(iter(source.cuts.values()))
    row_share(run.model, forget=True)
    run.model(tokens)
    assert row_share(run.model) == pytest.approx(0.25, abs=0.05)  # inputs of later blocks are rounded now


def test_raised_groups_have_no_rows_of_their_own(tiny, text_file):
    run = phasequant.quantize(tiny("llama"), recipe(text_file), overrides=["policy.name=paper"])
    assert run.plan.raised and not set(run.plan.raised) & set(run.plan.rows.above)
    for place in run.plan.raised:
        assert not run.plan.spec(*place).mixed


def test_plans_with_rows_are_json(tiny, text_file, tmp_path):
    run = phasequant.quantize(tiny("llama"), recipe(text_file))
    again = PrecisionPlan.from_json(run.plan.to_json(), run.map)
    assert again.activations == run.plan.activations and again.rows == run.plan.rows
    (tmp_path / "plan.json").write_text(run.plan.to_json())
    given = phasequant.quantize(tiny("llama"), recipe(text_file), plan=tmp_path / "plan.json")
    assert given.plan.rows == run.plan.rows
    values = run.plan.to_dict()
    for rows, message in (
        ({"by": "size", "share": 0.1, "above": {"0.o": 1.0}}, "unknown rows_by"),
        ({"by": "gsr", "share": 2, "above": {}}, "share is a fraction"),
        ({"by": "gsr"}, "an object of by, share and above"),
        ({"by": "gsr", "share": 0.1, "above": {"9.o": 1.0}}, "does not have"),
    ):
        with pytest.raises(PhaseQuantError, match=message):
            PrecisionPlan.from_dict({**values, "rows": rows}, run.map)


@pytest.mark.parametrize(
    "activations", [{"bits": 8}, {"bits": 16}, {"format": "nvfp4", "bits": 4}, {"bits": 4, "granularity": "tensor"}]
)
def test_recipes_in_which_single_rows_cannot_be_raised(activations):
    with pytest.raises(PhaseQuantError, match="token_policy"):
        Recipe.from_dict({"activations": {"token_policy": "gsr", **activations}})
