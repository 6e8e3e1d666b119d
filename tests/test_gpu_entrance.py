"""What the fused entrances write against norm, gate, map and grid one by one: the same integers."""

from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")

from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import entrance as module
from phasequant.kernels.gpu.entrance import can_run, gated_round, norm_round, round_rows
from phasequant.kernels.gpu.entrance_map import map_tiles
from phasequant.nn import OnlineMap
from phasequant.numerics import (
    LinearMap,
    QuantSpec,
    dequantize,
    grid,
    random_orthogonal,
    round_to_codes,
    spreading_mix,
    spreading_rotation,
    static_grid,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # exp, in Triton's interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = QuantSpec(4, clip=0.9, rows_by="absmax", above=3.0)
SPECS = [QuantSpec(4), QuantSpec(4, clip=0.83), QuantSpec(8), QuantSpec(3, clip=0.7), MIXED]
FLIPPED = 2e-3
"""Of 8-bit codes, by one: where sums were taken in another order."""


def make(rows, width, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def separately(x, spec, calibrated=None):
    """(codes, scales) of what is rounded."""
    x = x.float()
    scale, zero = grid(x, spec) if calibrated is None else static_grid(calibrated, spec)
    return round_to_codes(x, scale, zero, spec), scale.expand(len(x), 1)[:, 0]


def equal(found, x, spec, calibrated=None):
    codes, scale = separately(x, spec, calibrated)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.codes, codes)


def close(found, x, spec):
    codes, scale = separately(x, spec)
    flips = (found.codes.int() - codes.int()).abs()
    assert flips.max() <= 1 and flips.float().mean() < FLIPPED
    assert torch.allclose(found.scale, scale, rtol=1e-2, atol=0)
    assert ((found.scale - scale).abs() > 1e-4 * scale).float().mean() < 0.1


def adversarial(width, dtype):
    """Rows that a careless kernel gets wrong."""
    generator = torch.Generator().manual_seed(width)
    base = torch.randn(width, generator=generator)
    spike, low, tiny = base.clone(), base.clone(), torch.zeros(width)
    spike[width // 2] = 3e4
    low[-1] = -17.0
    tiny[0] = torch.finfo(dtype).smallest_normal / 4
    ties = (torch.arange(width) % 16 - 8) + 0.5
    ties[0] = 7.0
    exponents = torch.linspace(-14, 14, width).exp2() * base.sign()
    largest = torch.finfo(dtype).max
    rows = [base, torch.zeros(width), spike, low, tiny, ties, ties / 7, exponents, base.abs(), -base.abs()]
    rows += [base * torch.finfo(dtype).smallest_normal, base.sign() * largest, base / 4.5 * largest]
    return torch.stack(rows).to(DEVICE, dtype)


def around_ties(spec):
    """Rows of scales of all sizes with values next to half-integers of them, by one unit in the last place or none."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.cat((torch.arange(-149, 122, 6), torch.randint(-20, 20, (20,), generator=generator)))
    largest = torch.ldexp(1 + torch.rand(len(exponents), generator=generator), exponents)
    scale = (largest.float() * spec.clip / spec.highest).double()
    halves = torch.arange(-spec.highest, spec.highest) + 0.5
    at = (halves * scale[:, None]).float()
    for _ in range(2):
        at = torch.cat((at, at.nextafter(torch.tensor(torch.inf)), at.nextafter(torch.tensor(-torch.inf))), 1)
    at = torch.where(at.abs() <= largest[:, None], at, torch.zeros_like(at))
    return torch.cat((largest[:, None], at), 1).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", [54, 107, 1000])
def test_codes_and_scales_are_the_references(width, spec, dtype):
    equal(round_rows(adversarial(width, dtype), spec), adversarial(width, dtype), spec)


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_next_to_ties_the_quotient_decides(spec):
    x = around_ties(spec)
    for one in (x, x.bfloat16()):
        equal(round_rows(one, spec), one, spec)


@pytest.mark.parametrize("rows", [0, 1, 3, 4097 if DEVICE.type == "cuda" else 1025])
def test_any_number_of_rows(rows):
    x = make(rows, 48)
    equal(round_rows(x, MIXED), x, MIXED)


def test_absmax_rows_read_eight_bits():
    x = make(40, 96, torch.float32)
    x[::4] *= 4
    found = round_rows(x, MIXED)
    equal(found, x, MIXED)
    wide = x.abs().amax(-1) > 3.0
    assert 0 < wide.sum() < 40
    assert (found.codes.int().abs().amax(-1) > 8).equal(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [2.5, 1e-3, 1e4, 0.0])
def test_static_grids(dtype, top):
    spec = QuantSpec(8, True, "tensor", static=True, clip=0.9)
    calibrated = torch.tensor([[-top / 2], [top]], device=DEVICE)
    scale, _ = static_grid(calibrated, spec)
    x = adversarial(107, dtype)
    equal(round_rows(x, spec, static_scale=scale), x, spec, calibrated)


@pytest.mark.parametrize("width", [54, 96, 107])
def test_even_columns_first(width):
    x = make(9, width)
    codes = round_rows(x, QuantSpec(4)).codes
    padded = torch.nn.functional.pad(codes, (0, width % 2))
    assert torch.equal(round_rows(x, QuantSpec(4), split=True).codes, torch.cat((padded[:, ::2], padded[:, 1::2]), 1))


@pytest.mark.parametrize("a, b", [(6, 8), (5, 7), (6, 9)])
def test_even_columns_first_behind_a_map(a, b):
    found = LinearMap.kronecker(random_orthogonal(a, 0), random_orthogonal(b, 1))
    tiles = map_tiles(found, torch.bfloat16, DEVICE)
    x = make(9, a * b)
    codes = round_rows(x, QuantSpec(8), linear_map=tiles).codes
    padded = torch.nn.functional.pad(codes, (0, a * b % 2))
    split = round_rows(x, QuantSpec(8), linear_map=tiles, split=True).codes
    assert torch.equal(split, torch.cat((padded[:, ::2], padded[:, 1::2]), 1))


def test_rows_may_lie_apart():
    wide = make(7, 300)
    for x in (wide[:, :107], wide[:, 64:160], wide[::2, 3:57]):
        equal(round_rows(x, QuantSpec(8)), x, QuantSpec(8))
    with pytest.raises(PhaseQuantError, match="next to each other"):
        round_rows(wide.T, QuantSpec(8))


def llama(width, dtype, eps=1e-5, seed=5):
    norm = LlamaRMSNorm(width, eps).to(DEVICE, dtype)
    norm.weight.data = torch.rand(width, generator=torch.Generator().manual_seed(seed)).add(0.5).to(DEVICE, dtype)
    return norm.requires_grad_(False)


def gemma(width, dtype, eps=1e-6, seed=6):
    norm = GemmaRMSNorm(width, eps).to(DEVICE, dtype)
    norm.weight.data = torch.randn(width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) / 4
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [107, 576])
@pytest.mark.parametrize("spec", [QuantSpec(8), MIXED], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_norms_are_transformers(width, dtype, spec, added):
    x, residual = make(12, width, dtype) * 3, make(12, width, dtype, 1)
    x[0] = 0
    total = x + residual if added else x
    for norm, plus_one in ((llama(width, dtype), False), (gemma(width, dtype), True)):
        eps = norm.variance_epsilon if not plus_one else norm.eps
        found = norm_round(x, norm.weight, eps, spec, plus_one=plus_one, residual=residual if added else None)
        close(found, norm(total), spec)
        assert found.total is None if not added else torch.equal(found.total, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [107, 1536])
def test_gates_are_transformers(width, act, dtype):
    both = make(9, 2 * width, dtype) * 3
    both[0] = 0
    both[1, :width] *= 60  # where exp overflows
    gate, up = both.chunk(2, -1)
    expected = (silu(gate) if act == "silu" else gelu(gate, approximate="tanh")) * up
    close(gated_round(gate, up, act, QuantSpec(8)), expected, QuantSpec(8))
    close(gated_round(gate, up, act, QuantSpec(4, clip=0.9)), expected, QuantSpec(4, clip=0.9))


def learned(a, b=1, blocks=1, seed=0):
    """An invertible map that is neither orthogonal nor even."""
    generator = torch.Generator().manual_seed(seed)

    def factor(n):
        return random_orthogonal(n, seed) * torch.rand(n, generator=generator, dtype=torch.float64).add(0.5)

    if b > 1:
        return LinearMap.kronecker(factor(a), factor(b), blocks=blocks)
    return LinearMap.dense(torch.stack([factor(a) * (1 + i / 9) for i in range(blocks)]))


def shared(a, blocks):
    return LinearMap("shared", random_orthogonal(a, 2)[None], blocks=blocks)


def scaled(one, seed=3):
    diagonal = torch.rand(one.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return LinearMap(one.kind, one.left, one.right, one.blocks, one.tail, diagonal, False)


MAPS = {
    "hadamard 24⊗24": spreading_rotation(576),
    "hadamard 48⊗32": spreading_rotation(1536),
    "hadamard 12⊗4": spreading_rotation(48),
    "hadamard with signs": spreading_rotation(576, 1, randomize=True),
    "107 blocks of a pair": spreading_rotation(107 * 16),
    "6 heads of a pair": spreading_rotation(64, copies=6),
    "pair 6⊗9": learned(6, 9),
    "pair 24⊗32": learned(24, 32),
    "scaled pair": scaled(learned(12, 16)),
    "own blocks of 16": learned(16, blocks=6),
    "own blocks of 100": learned(100, blocks=5),
    "scaled own blocks": scaled(learned(16, blocks=5)),
    "own pairs": LinearMap("pairs", learned(4, blocks=5).left, learned(4, blocks=5, seed=1).left, 5),
    "shared blocks of 12": shared(12, 20),
    "dense 54": learned(54),
    "dense 107": learned(107),
    "mixed 4 heads of 12": spreading_mix(4, 12),
    "mixed 9 heads of 6": spreading_mix(9, 6, 1),
    "scaling": LinearMap.scaling(torch.linspace(0.2, 3, 54, dtype=torch.float64)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_the_online_maps(name, dtype):
    found = MAPS[name]
    ok, reason = can_run(QuantSpec(8), found.size, dtype, DEVICE, linear_map=found)
    assert ok, reason
    online = OnlineMap.of(found).to(DEVICE)
    tiles = map_tiles(online.map(), dtype, DEVICE)
    x = make(11, found.size, dtype)
    x[3], x[4, 7] = 0, 300.0
    close(round_rows(x, QuantSpec(8), linear_map=tiles), online(x), QuantSpec(8))


@pytest.mark.parametrize("name", ["hadamard 24⊗24", "pair 24⊗32", "own blocks of 100", "mixed 9 heads of 6"])
@pytest.mark.parametrize("split", [False, True])
def test_maps_stand_behind_norms_and_gates(name, split):
    found, spec = MAPS[name], QuantSpec(8)
    width, online = found.size, OnlineMap.of(found).to(DEVICE)
    tiles = map_tiles(found, torch.bfloat16, DEVICE)
    x, residual, up = (make(11, width, seed=i) for i in range(3))
    norm = llama(width, torch.bfloat16)

    def back(entered):
        if not split:
            return entered
        half = entered.codes.shape[1] // 2
        return entered._replace(codes=torch.stack(entered.codes.split(half, 1), -1).flatten(1)[:, :width])

    of_norm = partial(norm_round, x, norm.weight, norm.variance_epsilon, spec, linear_map=tiles, split=split)
    close(back(of_norm()), online(norm(x)), spec)
    added = of_norm(residual=residual)
    close(back(added), online(norm(x + residual)), spec)
    assert torch.equal(added.total, x + residual)
    close(back(gated_round(x, up, "silu", spec, linear_map=tiles, split=split)), online(silu(x) * up), spec)


def test_large_values_stay_finite_behind_a_map():
    found = MAPS["hadamard 24⊗24"]
    x = make(3, 576) * 1e30
    tiles = map_tiles(found, x.dtype, DEVICE)
    close(round_rows(x, QuantSpec(8), linear_map=tiles), OnlineMap.of(found).to(DEVICE)(x), QuantSpec(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", [None, "pair 24⊗32", "own blocks of 100"])
def test_branches_read_what_is_rounded_or_its_codes(name, rounded, dtype):
    found = MAPS[name] if name else None
    width = found.size if found else 107
    down = make(5, width, torch.bfloat16, 9)
    x, up, norm = make(11, width, dtype), make(11, width, dtype, 1), llama(width, dtype)
    tiles = map_tiles(found, dtype, DEVICE) if found else None
    online = OnlineMap.of(found).to(DEVICE) if found else torch.nn.Identity()
    asked = {"linear_map": tiles, "down": down, "rounded": rounded}
    for entered, read in (
        (round_rows(x, QuantSpec(8), **asked), x),
        (norm_round(x, norm.weight, norm.variance_epsilon, QuantSpec(8), **asked), norm(x)),
        (gated_round(x, up, "silu", QuantSpec(8), **asked), silu(x) * up),
    ):
        read = online(read)
        if rounded:
            scale = entered.scale[:, None]
            read = dequantize(entered.codes, scale, torch.zeros_like(scale), QuantSpec(8))
        expected = read.double() @ down.double().T
        assert entered.low.dtype == torch.float32
        bound = 2e-5 if rounded or found is None else 2e-3  # a rounding of x's type may fall the other way
        assert (entered.low - expected).abs().max() < bound * expected.abs().max()


def test_rows_in_portions(monkeypatch):
    found, spec = MAPS["own blocks of 16"], QuantSpec(8)
    tiles, norm = map_tiles(found, torch.bfloat16, DEVICE), llama(96, torch.bfloat16)
    x, residual, down = make(260, 96), make(260, 96, seed=1), make(3, 96, seed=2)
    ask = partial(norm_round, x, norm.weight, 1e-5, spec, residual=residual, linear_map=tiles, down=down, rounded=True)
    whole = ask()
    monkeypatch.setattr(module, "PORTION", 1)
    parts = ask()
    torch.testing.assert_close(parts.low, whole.low)  # cuBLAS sums by the number of rows
    for one, other in zip(parts._replace(low=None), whole._replace(low=None), strict=True):
        assert one is other or torch.equal(one, other)


def test_what_is_not_taken_is_said():
    def why(spec=QuantSpec(4), width=96, dtype=torch.bfloat16, device=DEVICE, **rest):  # noqa: B008
        ok, reason = can_run(spec, width, dtype, device, **rest)
        assert ok or reason
        return None if ok else reason

    assert why() is None and why(act="silu") is None and why(MIXED) is None
    assert "GPU" in why(device=torch.device("meta"))
    assert "16 bits" in why(None)
    assert "symmetric" in why(QuantSpec(4, False))
    assert "symmetric" in why(QuantSpec.floating("mxfp4"))
    assert "one scale a token" in why(QuantSpec(4, True, "group", 16))
    assert "one scale a token" in why(QuantSpec(8, True, "tensor"))
    assert "order" in why(QuantSpec(4, rows_by="gsr", above=1.0))
    assert "float64" in why(dtype=torch.float64)
    assert "one program" in why(width=2**17)
    assert "relu" in why(act="relu")
    assert "dense matrices" in why(linear_map=learned(300))
    assert "shared memory" in why(linear_map=learned(250, 250))
    assert "blocks up to" in why(linear_map=learned(16, 16, blocks=2))
    with pytest.raises(PhaseQuantError, match="symmetric"):
        round_rows(make(2, 8), QuantSpec(4, False))
    with pytest.raises(PhaseQuantError, match="do not take this map"):
        map_tiles(learned(300), torch.bfloat16, DEVICE)
    with pytest.raises(PhaseQuantError, match="48 channels"):
        round_rows(make(2, 8), QuantSpec(4), linear_map=map_tiles(MAPS["hadamard 12⊗4"], torch.bfloat16, DEVICE))
    with pytest.raises(PhaseQuantError, match="static"):
        round_rows(make(2, 8), QuantSpec(8, True, "tensor", static=True))
    with pytest.raises(PhaseQuantError, match="wider"):
        norm_round(make(2, 8), torch.ones(8, device=DEVICE), 1e-5, QuantSpec(4))
    with pytest.raises(PhaseQuantError, match="relu"):
        gated_round(make(2, 8), make(2, 8), "relu", QuantSpec(4))


@pytest.mark.parametrize("mode", ["plain", "norm", "gate"])
@pytest.mark.parametrize("name", ["hadamard 12⊗4", "own blocks of 16"])
def test_torch_is_told_the_shapes(name, mode):
    found = MAPS[name]
    tiles = map_tiles(found, torch.bfloat16, DEVICE)
    second = None if mode == "plain" else make(3, found.size, seed=1)
    weight = torch.ones(found.size, dtype=torch.bfloat16, device=DEVICE) if mode == "norm" else None
    arguments = (make(3, found.size), second, weight, tiles.left, tiles.right, tiles.blocks, tiles.diagonal, None)
    settings = {"mode": mode, "odd": False, "eps": 1e-5, "highest": 7, "clip": 1.0, "above": None, "split": True}
    settings |= {"rounded": False, "a": tiles.a, "b": tiles.b, "exact": tiles.exact, "gain": tiles.gain}
    arguments = (*arguments, make(2, found.size, seed=4))
    torch.library.opcheck(module.entrance, arguments, settings)
    ask = partial(module.entrance, **settings)
    for one, other in zip(
        torch.compile(ask, backend="aot_eager", fullgraph=True)(*arguments), ask(*arguments), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device that is visible")
@pytest.mark.parametrize("name", ["hadamard 48⊗32", "own blocks of 100"])
def test_a_graph_replays_it(name):
    found = MAPS[name]
    tiles = map_tiles(found, torch.bfloat16, DEVICE)
    gate, up = make(33, found.size), make(33, found.size, seed=1)
    ask = partial(gated_round, gate, up, "silu", QuantSpec(4), linear_map=tiles, down=make(8, found.size, seed=2))
    ask()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = ask()
    gate.copy_(make(33, found.size, seed=3))
    graph.replay()
    expected = ask()
    assert torch.equal(held.codes, expected.codes) and torch.equal(held.low, expected.low)
