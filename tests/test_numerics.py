"""Grids against the formulas by hand, packing as an identity, Hadamard matrices as orthogonal."""

import itertools
from dataclasses import replace

import pytest
import torch

from phasequant.errors import PhaseQuantError
from phasequant.numerics import (
    LinearMap,
    QuantSpec,
    dequantize,
    fake_quantize,
    grid,
    hadamard,
    pack,
    packed_width,
    polar,
    procrustes_step,
    quantize,
    spreading_rotation,
    straight_through,
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
    assert rotation.kind == rung and rotation.orthogonal and rotation.size == width
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
    dense = torch.kron(rotation.left[0], rotation.right[0])
    x = torch.randn(4, 48, dtype=torch.float64)
    assert torch.allclose(rotation.apply(x), x @ dense)


def test_rotations_repeat_by_seed():
    x = torch.randn(2, 9, dtype=torch.float64)
    assert torch.equal(spreading_rotation(9, 1).apply(x), spreading_rotation(9, 1).apply(x))
    assert not torch.allclose(spreading_rotation(9, 1).apply(x), spreading_rotation(9, 2).apply(x))


def maps():
    """One of every form: dense, Kronecker, shared and own blocks, mixing of heads, scaling, with and without signs."""
    g = torch.Generator().manual_seed(0)

    def free(*shape):
        eye = torch.eye(shape[-1], dtype=torch.float64)
        return eye + 0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "dense": LinearMap.dense(free(24, 24)),
        "kronecker": LinearMap.kronecker(free(4, 4), free(6, 6)),
        "blocks": LinearMap.dense(free(3, 8, 8)),
        "shared-blocks": LinearMap("shared", free(1, 4, 4), free(1, 2, 2), blocks=3, orthogonal=False),
        "own-kronecker": LinearMap("own", free(3, 4, 4), free(3, 2, 2), blocks=3, orthogonal=False),
        "mixing": LinearMap("mix", free(1, 4, 4), tail=6, orthogonal=False),
        "scaling": LinearMap.scaling(torch.rand(24, generator=g, dtype=torch.float64) + 0.5),
        "signed": spreading_rotation(24, 3, randomize=True),
        "heads": spreading_rotation(8, copies=3),
    }


@pytest.mark.parametrize("name", maps())
def test_maps_fold_into_weights(name):
    """(x·T)·(W·T^{-T})ᵀ = x·Wᵀ; apply, matrix, inverse and layout agree."""
    found = maps()[name]
    x = torch.randn(5, 24, dtype=torch.float64)
    w = torch.randn(7, 24, dtype=torch.float64)
    assert found.size == 24
    y = found.apply(x)
    assert torch.allclose(y, x @ found.matrix())
    assert not torch.allclose(y, x, atol=1e-2)
    assert torch.allclose(y @ found.inverse_transpose().apply(w).T, x @ w.T, atol=1e-9)
    assert torch.allclose(found.apply_inverse(y), x, atol=1e-9)
    again = LinearMap.from_layout(found.layout(), found.tensors())
    assert torch.equal(again.apply(x), y) and again.macs == found.macs
    assert found.condition() == pytest.approx(float(torch.linalg.cond(found.matrix())), rel=1e-6)


def test_maps_of_kv_heads_repeat_for_query_heads():
    own = LinearMap.dense(torch.randn(2, 3, 3, dtype=torch.float64))
    y = torch.randn(4, 2, 3, dtype=torch.float64)
    for found in (own, LinearMap.scaling(torch.rand(6, dtype=torch.float64) + 1), spreading_rotation(3, copies=2)):
        seen = found.apply(y.flatten(1)).unflatten(-1, (2, 3)).repeat_interleave(2, 1).flatten(1)
        assert torch.allclose(found.for_heads(2, 4).apply(y.repeat_interleave(2, 1).flatten(1)), seen)


def test_a_map_whose_factors_do_not_fit_is_refused():
    layout = maps()["kronecker"].layout()
    with pytest.raises(PhaseQuantError, match="missing"):
        LinearMap.from_layout(layout, {})
    with pytest.raises(PhaseQuantError, match="cannot have"):
        LinearMap.from_layout({**layout, "left": [2, 4]}, maps()["kronecker"].tensors())


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(8), QuantSpec(4, False), QuantSpec(4, False, "group", 8)])
def test_straight_through_rounds_like_the_grid(spec):
    x = torch.randn(6, 16)
    assert torch.equal(straight_through(x, spec), fake_quantize(x, spec))
    ratio = torch.full((6, spec.groups(16)), 0.7)
    assert torch.allclose(straight_through(x, spec, ratio), fake_quantize(x, replace(spec, clip=0.7)), atol=1e-6)


def test_straight_through_gradients():
    """Inside the grid x passes; clipped it does not; a clip ratio moves the scale as finite differences say."""
    spec = QuantSpec(4)
    x = torch.tensor([[7.0, 0.4, -3.2, 6.6]], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([[0.6]], dtype=torch.float64, requires_grad=True)
    y = straight_through(x, spec, ratio)
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).sum().backward()
    s = 0.6  # 0.6 · 7 / 7
    steps = x.detach() / s
    codes = steps.round().clamp(-8, 7)
    inside = (steps.round() == codes).double()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    to_scale = (weights * (codes - inside * steps)).sum()
    assert float(ratio.grad) == pytest.approx(float(to_scale))  # ds/dratio = max|x| / 7 = 1
    expected = weights * inside[0]
    expected[0] += to_scale * 0.6 / 7  # through the largest magnitude, which sets the scale
    assert torch.allclose(x.grad[0], expected)


@pytest.mark.parametrize("name", ["dense", "kronecker", "blocks", "own-kronecker", "mixing"])
def test_procrustes_finds_a_rotation_that_was_applied(name):
    """From the identity, B = X·R is met to rounding: at once for one factor, in a few turns for two."""
    start = maps()[name]

    def orthogonal(factor):
        return None if factor is None else polar(factor)

    target = replace(start, left=orthogonal(start.left), right=orthogonal(start.right), orthogonal=True)
    x = torch.randn(200, 24, dtype=torch.float64)
    b = target.apply(x)

    def eye(factor):
        return None if factor is None else torch.eye(factor.shape[-1], dtype=torch.float64).expand_as(factor)

    found = replace(target, left=eye(target.left), right=eye(target.right))
    distances = []
    for _ in range(30):
        found = procrustes_step(x, b, found)
        distances.append(float((found.apply(x) - b).norm() / b.norm()))
    assert distances[-1] < 1e-6 and all(b <= a + 1e-9 for a, b in itertools.pairwise(distances))
    assert torch.allclose(found.apply_inverse(found.apply(x)), x)


def test_products_for_learning():
    """bfloat16 is exact on codes, close on numbers, and passes its gradient on."""
    from phasequant.numerics import learning_product

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (30, 64), generator=generator, dtype=torch.int8)
    rows = torch.randint(-3, 4, (10, 64), generator=generator).float()
    for fast in (True, False):
        found = learning_product(rows, codes, fast)
        assert found.dtype == torch.float32
        assert torch.allclose(found, rows @ codes.float().T, rtol=2**-8)
    x, w = torch.randn(10, 64, generator=generator), torch.randn(30, 64, generator=generator)
    x.requires_grad_()
    w.requires_grad_()
    y = learning_product(x, w, True)
    assert torch.allclose(y, x @ w.T, atol=0.1) and not torch.equal(y, x @ w.T)
    y.sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(10, -1), atol=0.1) and w.grad.shape == w.shape
