"""RoPE in one kernel, and the packed cache read back: Triton's interpreter, or a GPU where one is visible."""

import pytest
import torch

pytest.importorskip("triton")

import phasequant
from phasequant.kernels.gpu import runs_on
from phasequant.kernels.gpu.kv import read_kv
from phasequant.kernels.gpu.rope import MANY, can_run, rope
from phasequant.nn import kv as kv_module
from phasequant.nn import quant_linears
from phasequant.nn.attention import TRITON, attended, quantizers
from phasequant.nn.kv import KVQuantizer, PackedLayer
from phasequant.nn.online import OnlineMap
from phasequant.numerics import LinearMap, QuantSpec, spreading_rotation
from phasequant.runtime import Runner
from phasequant.runtime.decoder import _rotated

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not runs_on(DEVICE)[0], reason=runs_on(DEVICE)[1])
HALF = torch.bfloat16


def randn(*shape, dtype=HALF):
    return torch.randn(*shape).to(DEVICE, dtype)


def angles(rows, d_head, dtype):
    """cos and sin whose halves differ, as no model's do."""
    return tuple(randn(rows, d_head, dtype=torch.float32).sin().to(dtype) for _ in range(2))


def stepwise(qkv, cos, sin, heads, kv_heads):
    """q and k, as Transformers rotates them."""
    split = qkv.unflatten(-1, (-1, cos.shape[-1])).split((heads, kv_heads, kv_heads), 1)
    return tuple(_rotated(x[None], cos[None, :, None], sin[None, :, None])[0] for x in split[:2])


CASES = [(64, 4, 2, 3), (80, 3, 1, 5), (96, 2, 2, 9), (128, 8, 2, 4), (256, 2, 1, 3), (12, 4, 2, 7), (16, 1, 1, 1),
         (6, 9, 3, 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_head", "heads", "kv_heads", "rows"), CASES)
def test_rotated_as_transformers_rotates(d_head, heads, kv_heads, rows, dtype):
    torch.manual_seed(0)
    qkv = randn(rows, (heads + 2 * kv_heads) * d_head + 8, dtype=dtype)[:, :-8]
    cos, sin = angles(rows, d_head, dtype)
    want = stepwise(qkv, cos, sin, heads, kv_heads)
    found = rope(qkv, cos, sin, heads, kv_heads)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("d_head", "heads", "kv_heads", "rows"), [*CASES, (6, 9, 3, MANY // 9 + 1), (128, 32, 8, MANY // 32)]
)
def test_queries_are_mapped_as_the_online_map_does(d_head, heads, kv_heads, rows, dtype):
    """But for a rounding on the edge; keys are left to the cache."""
    torch.manual_seed(0)
    online = OnlineMap.of(LinearMap("kron", torch.randn(1, d_head, d_head) / d_head**0.5)).to(DEVICE)
    if d_head & d_head - 1 == 0:
        online = OnlineMap.of(spreading_rotation(d_head)).to(DEVICE)
    matrix = online.map().matrix().to(DEVICE, torch.float32)
    qkv = randn(rows, (heads + 2 * kv_heads) * d_head, dtype=dtype)
    cos, sin = angles(rows, d_head, dtype)
    query, want_k = stepwise(qkv, cos, sin, heads, kv_heads)
    want = online(query)
    found, found_k = rope(qkv, cos, sin, heads, kv_heads, matrix)
    assert torch.equal(found_k, want_k) and found.dtype == dtype
    assert torch.allclose(found.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if dtype != torch.float32:
        assert (found != want).float().mean() < 0.01


def test_what_is_refused_is_told():
    for d_head, dtype, why in ((7, HALF, "even"), (258, HALF, "up to 256"), (64, torch.float64, "float64")):
        ok, told = can_run(d_head, dtype, DEVICE)
        assert not ok and why in told
    assert can_run(256, HALF, DEVICE)[0] and not can_run(64, HALF, torch.device("meta"))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_head", "groups", "bits"), [(64, 1, 4), (128, 2, 4), (12, 2, 3), (7, 1, 4), (80, 1, 2)])
def test_what_is_read_is_the_reference(d_head, groups, bits, dtype):
    """Bit for bit: of a cache with room, of its first slots, and of states as the encoder lays them."""
    torch.manual_seed(0)
    spec = QuantSpec(bits, False, "group", d_head // groups)
    grid = KVQuantizer.of(spec, spec, d_head, None).to(DEVICE)
    layer = PackedLayer(grid)
    for count in (37, 3):
        held = layer.update(*(randn(2, count, 3, d_head).transpose(1, 2) for _ in range(2)))
    laid = grid.encode(*(randn(2, 5, 3, d_head).transpose(1, 2) for _ in range(2)))
    for states, length in ((held[0], 40), (held[1], 33), (held[0], 1), (laid.keys, 5), (laid.values, 4)):
        found = read_kv(*states.parts, d_head, dtype, length)
        assert torch.equal(found, grid.decode(states.first(length), dtype)) and found.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("sets", [(), ("prefix.method=tokens", "prefix.tokens=[3,7]"), ("kv.bits=16",)], ids=str)
def test_the_runtime_rotates_and_reads_with_them(name, sets, tiny, monkeypatch):
    """Prefill and two steps against Transformers, whose attention dequantizes; Qwen3's queries are rotated apart."""
    made = phasequant.quantize(tiny(name), "quarot", overrides=["calibration.sequences=2", "calibration.seqlen=32",
                                                                "activations.bits=16", *sets])  # fmt: skip
    model = made.model.to(DEVICE, HALF)
    assert quant_linears(model)
    tokens = torch.tensor([[5, 9, 200, 31, 7, 77, 2], [1, 2, 3, 4, 5, 6, 7]], device=DEVICE)
    more = torch.tensor([[3, 8], [4, 9]], device=DEVICE)
    monkeypatch.setattr(kv_module, "TRITON_ON", set())
    want = [model(torch.cat((tokens, more[:, :n]), 1)).logits[:, -1].float() for n in range(3)]
    monkeypatch.setattr(kv_module, "TRITON_ON", {DEVICE.type})
    runner = Runner.of(model, 2, 12)
    assert runner.decoder.rope is not None
    assert all((block.matrix is None) == ("kv.bits=16" in sets) for block in runner.decoder.blocks)
    found = [runner.prefill(tokens).float()]
    for step in range(2):
        runner.tokens.copy_(more[:, step, None])
        found.append(runner.decode().float().clone())
    assert not quantizers(model) or attended(model) == {TRITON}
    for got, told in zip(found, want, strict=True):
        assert (got - told).norm() < 0.05 * told.norm()
