"""Grids against the formulas by hand, packing as an identity, Hadamard matrices as orthogonal."""

import pytest
import torch

from phasequant.errors import PhaseQuantError
from phasequant.numerics import (
    QuantSpec,
    dequantize,
    fake_quantize,
    grid,
    hadamard,
    pack,
    packed_width,
    quantize,
    spreading_rotation,
    unpack,
)
from phasequant.numerics.hadamard import factors, is_order, table_orders

SPECS = [
    QuantSpec(bits, symmetric, granularity, size, clip)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for granularity, size in (("token", None), ("tensor", None), ("group", 8))
    for clip in (1.0, 0.8)
]


def test_symmetric_by_hand():
    x = torch.tensor([[0.7, -1.4, 0.1, 0.0]])
    codes, scale, zero = quantize(x, QuantSpec(4))
    assert scale.item() == pytest.approx(0.2) and zero.item() == 0
    # 0.7/0.2 = 3.5 rounds to even; 0.1/0.2 = 0.5 too
    assert codes.tolist() == [[4, -7, 0, 0]] or codes.tolist() == [[3, -7, 0, 0]]
    codes, scale, _ = quantize(x, QuantSpec(4, clip=0.5))
    assert scale.item() == pytest.approx(0.1) and codes[0, 1].item() == -8  # clipped to the lowest code


def test_asymmetric_by_hand():
    x = torch.tensor([[-1.0, 2.0, 0.0, 0.5]])
    codes, scale, zero = quantize(x, QuantSpec(4, symmetric=False))
    assert scale.item() == pytest.approx(0.2) and zero.item() == 5
    assert codes.tolist() == [[0, 15, 5, 7]]
    positive = torch.tensor([[3.0, 6.0]])
    _, scale, zero = quantize(positive, QuantSpec(4, symmetric=False))
    assert zero.item() == 0 and scale.item() == pytest.approx(0.4)  # zero is always inside the range


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_stay_on_the_grid_and_errors_within_half_a_step(spec):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes, scale, zero = quantize(x, spec)
    assert codes.min() >= spec.lowest and codes.max() <= spec.highest
    back = dequantize(codes, scale, zero, spec)
    assert torch.equal(back, fake_quantize(x, spec))
    step = scale.repeat_interleave(16 // scale.shape[-1], -1) if spec.granularity == "group" else scale
    inside = (x / step + (zero if spec.granularity != "group" else zero.repeat_interleave(8, -1))).round()
    inside = (inside >= spec.lowest) & (inside <= spec.highest)
    assert ((back - x).abs() <= step / 2 + 1e-12)[inside].all()
    if spec.clip == 1.0 and spec.symmetric:
        assert inside.all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", [8, 16, 24])
def test_pack_and_unpack_is_identity(spec, width):
    generator = torch.Generator().manual_seed(width)
    dtype = torch.int8 if spec.symmetric else torch.uint8
    codes = torch.randint(spec.lowest, spec.highest + 1, (3, width), generator=generator).to(dtype)
    packed = pack(codes, spec)
    assert packed.dtype == torch.uint8 and packed.shape == (3, packed_width(width, spec))
    assert torch.equal(unpack(packed, width, spec), codes)


@pytest.mark.parametrize("width", [1, 7, 107])
def test_odd_widths_pack(width):
    codes = torch.randint(-8, 8, (2, width)).to(torch.int8)
    packed = pack(codes, QuantSpec(4))
    assert packed.shape == (2, (width + 1) // 2)
    assert torch.equal(unpack(packed, width, QuantSpec(4)), codes)


def test_nibble_order():
    """Part of the format: even places low."""
    assert pack(torch.tensor([[1, 2]], dtype=torch.uint8), QuantSpec(4, False)).item() == 0x21
    assert pack(torch.tensor([[-8, 7]], dtype=torch.int8), QuantSpec(4)).item() == 0xF0


def test_all_zero_rows_have_a_scale_of_one():
    for spec in (QuantSpec(4), QuantSpec(4, False), QuantSpec(4, clip="mse")):
        x = torch.zeros(2, 8)
        _, scale, _ = quantize(x, spec)
        assert torch.equal(scale, torch.ones(2, 1)) and torch.equal(fake_quantize(x, spec), x)


def test_mse_clip_is_the_best_of_its_candidates():
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    w[0, 0] = 9.0
    found, _ = grid(w, QuantSpec(4, clip="mse"))
    for row in range(6):
        errors = {}
        for i in range(80):
            spec = QuantSpec(4, clip=1 - i / 100)
            scale, _ = grid(w[row : row + 1], spec)
            errors[scale.item()] = (
                (fake_quantize(w[row : row + 1], spec) - w[row : row + 1]).abs().pow(2.4).sum().item()
            )
        assert errors[found[row].item()] == min(errors.values())
    assert found[0] < w[0].abs().max() / 7  # the outlier is clipped


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 16}, "2 to 8"),
        ({"granularity": "chanel"}, "channel"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 8}, "group_size"),
        ({"clip": 0.0}, "fraction"),
        ({"clip": 1.5}, "fraction"),
    ],
)
def test_bad_specs(values, message):
    with pytest.raises(PhaseQuantError, match=message):
        QuantSpec(**values)


def test_groups_must_divide():
    with pytest.raises(PhaseQuantError, match="does not divide"):
        quantize(torch.ones(2, 10), QuantSpec(4, True, "group", 8))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 36, 172, 224, 256, 512])
def test_hadamard_matrices(order):
    h = hadamard(order)
    assert torch.allclose(h @ h.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, order**-0.5))


def test_table_reaches_every_multiple_of_four():
    assert {4 * k for k in range(1, 65)} <= table_orders()
    assert not is_order(107) and not is_order(6) and is_order(1024)


@pytest.mark.parametrize(
    ("width", "rung"),
    [
        (576, "hadamard"),
        (1536, "hadamard"),
        (896, "hadamard"),
        (3584, "hadamard"),
        (11008, "hadamard"),
        (14336, "hadamard"),
        (18944, "hadamard"),
        (13696, "block-hadamard"),
        (9, "random-orthogonal"),
        (107, "random-orthogonal"),
        (577, "random-orthogonal"),
        (1, "identity"),
    ],
)
def test_every_width_has_a_rotation(width, rung):
    rotation = spreading_rotation(width, 5, randomize=True)
    assert rotation.rung == rung and rotation.size == width
    x = torch.randn(3, width, dtype=torch.float64)
    y = rotation.apply(x)
    assert torch.allclose(rotation.apply_inverse(y), x, atol=1e-10)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
    if rung == "hadamard":
        pair = factors(width)
        assert pair is not None and pair[0] * pair[1] == width
        spike = torch.zeros(1, width, dtype=torch.float64)
        spike[0, width // 3] = 1.0
        assert torch.allclose(rotation.apply(spike).abs(), torch.full((1, width), width**-0.5, dtype=torch.float64))


def test_factors_equal_the_dense_product():
    rotation = spreading_rotation(48)
    dense = torch.kron(rotation.left, rotation.right)
    x = torch.randn(4, 48, dtype=torch.float64)
    assert torch.allclose(rotation.apply(x), x @ dense)


def test_rotations_repeat_by_seed():
    x = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(spreading_rotation(9, 1).apply(x), spreading_rotation(9, 1).apply(x))
    assert not torch.allclose(spreading_rotation(9, 1).apply(x), spreading_rotation(9, 2).apply(x))
