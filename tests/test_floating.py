"""E2M1, E4M3 and E8M0 against compressed-tensors, bit for bit; FP4 models through the pipeline."""

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear
from phasequant.numerics import QuantSpec, dequantize, fake_quantize, pack, quantize, store_scales, unpack
from phasequant.numerics.floating import VALUES, round_e2m1
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.weight import gptq, round_to_nearest

NVFP4, MXFP4, FP8 = (QuantSpec.floating(kind) for kind in ("nvfp4", "mxfp4", "fp8"))


def edge_cases():
    """Random at many scales, ties, saturation, denormals, zeros of both signs, whole groups of zeros, one value a
    group, powers of two and their neighbours."""
    torch.manual_seed(0)
    rows = [torch.randn(64, 128) * 10.0**e for e in (-30, -10, -4, -2, 0, 2, 4, 10, 30)]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.0])
    ties = torch.cat([ties, -ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    grid = ties.repeat(13)[:512].reshape(4, 128)
    rows += [grid, grid * 2.0**-140, grid * 2.0**-126, grid * 2.0**100]
    powers = 2.0 ** torch.arange(-64, 64).float()
    rows += [torch.stack([powers, -powers, powers * 1.75, torch.nextafter(powers * 1.75, powers * 0)])]
    zeros = torch.zeros(3, 128)
    zeros[1] = -0.0
    zeros[2, 5] = 3.0
    return [*rows, zeros]


def theirs(x, kind):
    """compressed-tensors' bytes, stored scales, second scale and values."""
    if kind == "nvfp4":
        args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
                                scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn)  # fmt: skip
        compressor = NVFP4PackedCompressor
    else:
        args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True,
                                scale_dtype=torch.uint8, zp_dtype=torch.uint8)  # fmt: skip
        compressor = MXFP4PackedCompressor
    groups = x.unflatten(-1, (-1, args.group_size))
    second = generate_gparam(x.min(), x.max()) if kind == "nvfp4" else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=second)
    state = {"weight": x, "weight_scale": scale}
    if second is not None:
        state["weight_global_scale"] = second
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packed = compressor.compress(state, scheme)
    return packed["weight_packed"], packed["weight_scale"], second


@pytest.mark.parametrize("case", range(len(edge_cases())))
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_bytes_are_compressed_tensors(kind, case):
    x = edge_cases()[case]
    spec = QuantSpec.floating(kind)
    peak = x.abs().amax()
    codes, scale, _ = quantize(x, spec, peak=peak)
    stored, second = store_scales(scale, spec, peak)
    packed, their_scale, their_second = theirs(x, kind)
    assert torch.equal(stored, their_scale.view(torch.uint8))
    if kind == "nvfp4":
        assert torch.equal(second, their_second)
    # the sign of a value that rounds to zero is kept by both; a group of zeros is all that may differ, by nothing
    assert torch.equal(pack(codes, spec), packed)
    assert torch.equal(unpack(packed, x.shape[1], spec), codes)


def test_e2m1_rounds_to_the_nearest_and_ties_to_even():
    table = torch.tensor(VALUES)
    x = torch.cat([torch.linspace(-8, 8, 40001), (table[1:] + table[:-1]) / 2])
    codes, values = round_e2m1(x)
    both = torch.cat([table, -table])
    nearest = both[(x[:, None] - both).abs().argmin(1)]
    assert torch.equal((x.clamp(-6, 6) - values).abs(), (x.clamp(-6, 6) - nearest).abs())
    ties = round_e2m1((table[1:] + table[:-1]) / 2)[0]
    assert (ties % 2 == 0).all()
    assert torch.equal(both[codes.long()], values)


@pytest.mark.parametrize("spec", [NVFP4, MXFP4, FP8], ids=str)
def test_rounding_twice_is_rounding_once(spec):
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    once = fake_quantize(x, spec)
    torch.testing.assert_close(fake_quantize(once, spec), once, rtol=0.13 if spec == NVFP4 else 0, atol=0.05)
    error = float((once - x).square().mean() / x.square().mean())
    assert error < (1e-3 if spec == FP8 else 0.02)
    codes, scale, zero = quantize(x, spec)
    assert torch.equal(dequantize(codes, scale, zero, spec), once)


@pytest.mark.parametrize("spec", [QuantSpec.floating("nvfp4", "mse"), QuantSpec.floating("mxfp4", "mse")], ids=str)
def test_gptq_on_fp4(spec):
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    x = torch.randn(1000, 256) @ torch.randn(256, 256)
    hessian = x.T @ x
    made, told = gptq(weight, hessian, spec)
    nearest = round_to_nearest(weight, spec)
    assert torch.equal(made.scale, nearest.scale) and told.rung == "gptq"

    def error(codes):
        left = weight - codes.values(spec)
        return float(((left @ hessian) * left).sum())

    assert error(made) < 0.6 * error(nearest)
    linear = QuantLinear.dense(weight, None)
    linear.set_codes(*made[:3], spec, made.peak)
    assert torch.equal(linear.dense_weight(), made.values(spec))
    assert linear.weight_scale.dtype == torch.uint8 and linear.weight_packed.shape == (48, 128)


def fp4(kind, text_file, **parts):
    base = Recipe.load("quarot").with_(
        weights={"method": "gptq", "format": kind, "sequences": 4, "seqlen": 64},
        activations={"format": kind},
        calibration={"text": str(text_file), "sequences": 4, "seqlen": 64},
    )
    return base.with_(**parts)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_models_save_and_load(kind, tiny, ids, text_file, tmp_path):
    recipe = fp4(kind, text_file, policy={"name": "budget", "a8_share": 0.3}, rotation={"where": "online", "block": 16})
    run = phasequant.quantize(tiny("llama-fp4"), recipe)
    raised = {spec.kind for spec in run.plan.activations.values()}
    assert raised == {kind, "fp8"}
    made = run.model(ids, use_cache=False).logits
    run.save(tmp_path / "out")
    loaded = phasequant.load(tmp_path / "out")
    assert torch.equal(loaded(ids, use_cache=False).logits, made)
    half = phasequant.load(tmp_path / "out", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(half.get_submodule(name).dense_weight(), run.model.get_submodule(name).dense_weight())
    again = PrecisionPlan.from_json(run.plan.to_json(), run.map)
    assert again.activations == run.plan.activations and again.weights == run.plan.weights


def test_raised_groups_may_be_int8(tiny, text_file):
    recipe = fp4("mxfp4", text_file, policy={"name": "paper", "format": "int"})
    run = phasequant.quantize(tiny("llama-fp4"), recipe)
    assert run.plan.spec(0, "o") == QuantSpec(8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights.format=nvfp4", "weights.bits=8"], "4 bits, symmetric"),
        (["weights.format=nvfp5"], "nvfp4"),
        (["activations.format=fp8"], "8 bits, symmetric"),
        (["activations.format=mxfp4", "policy.name=paper", "policy.bits=6"], "policy.format=fp8 is 8 bits"),
        (["rotation.block=16"], "rotation.where=online"),
        (["activations.format=nvfp4", "activations.clip=learned"], "nothing can be learned through nvfp4"),
    ],
)
def test_what_does_not_fit_is_told(overrides, message):
    with pytest.raises(PhaseQuantError, match=message):
        Recipe.load("quarot", overrides)


def test_a_block_that_does_not_divide_is_told(tiny, text_file):
    with pytest.raises(PhaseQuantError, match=r"rotation.block 32 does not do for the model's width, 48"):
        phasequant.quantize(tiny("llama"), Recipe.load("quarot-online", ["rotation.block=32"]))
