"""The packed cache's kernels: Triton's interpreter on CPU tensors, or a GPU where one is visible."""

import pytest
import torch

pytest.importorskip("triton")

from conftest import make_model

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import runs_on
from phasequant.kernels.gpu.attention import Tiling, decode_attention, tiling
from phasequant.kernels.gpu.kv import can_run, write_kv
from phasequant.nn import kv as kv_module
from phasequant.nn.attention import SDPA, TRITON, PackedCache, attach, attended, quantized_attention
from phasequant.nn.kv import KVQuantizer, PackedLayer, PackedStates
from phasequant.nn.prefix import PrefixStates
from phasequant.nn.static_kv import Rows, StaticPackedCache, StaticPackedLayer
from phasequant.numerics import LinearMap, QuantSpec, spreading_rotation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not runs_on(DEVICE)[0], reason=runs_on(DEVICE)[1])
HALF = torch.bfloat16


@pytest.fixture
def triton(monkeypatch):
    """Have caches read and written by Triton, the interpreter's device included."""
    monkeypatch.setattr(kv_module, "TRITON_ON", {DEVICE.type})


def quantizer(d_head, groups=1, bits=4, clip=1.0, qk=None):
    spec = QuantSpec(bits, False, "group", d_head // groups, clip)
    return KVQuantizer.of(spec, spec, d_head, qk).to(DEVICE)


def randn(*shape, dtype=HALF):
    return torch.randn(*shape).to(DEVICE, dtype)


def reader(grid, times=1):
    """An attention module, as far as the attention function looks."""
    module = torch.nn.Module()
    module.kv_quantizer, module.num_key_value_groups, module.is_causal = grid, times, True
    return module


def exact(query, keys, values, seen, *, scale, softcap=None, prefix=None):
    """Attention in the queries' precision; seen (B, S)."""
    if prefix is not None:
        first, second = (x.to(query)[None].expand(len(query), -1, -1, -1) for x in prefix)
        keys, values = torch.cat((first, keys), 2), torch.cat((second, values), 2)
        seen = torch.cat((seen.new_ones(len(seen), first.shape[2]), seen), 1)
    times = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    scores = (query[:, :, None] @ keys.transpose(2, 3))[:, :, 0] * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf).float(), -1).to(query.dtype)
    return (weights[:, :, None] @ values)[:, :, 0]


CASES = {
    "plain": {},
    "one split": {"chosen": Tiling(splits=1)},
    "many splits": {"chosen": Tiling(splits=9, block=16)},
    "more splits than blocks": {"chosen": Tiling(splits=16, block=32)},
    "two groups": {"groups": 2, "chosen": Tiling(splits=3, block=16)},
    "four groups": {"groups": 4, "d_head": 128, "tokens": 33},
    "no sharing": {"ratio": 1},
    "three heads": {"ratio": 3, "d_head": 128, "tokens": 40},
    "four heads": {"ratio": 4},
    "two tiles of heads": {"ratio": 20, "kv_heads": 1, "tokens": 40},
    "small head": {"d_head": 12, "groups": 2},
    "smaller head": {"d_head": 6, "ratio": 3},
    "odd head": {"d_head": 7},
    "head of 80": {"d_head": 80, "ratio": 4, "tokens": 50},
    "head of 256": {"d_head": 256, "tokens": 20},
    "unequal lengths": {"lengths": [1, 70, 33], "chosen": Tiling(splits=4, block=16)},
    "prefix": {"prefix": 5},
    "long prefix": {"prefix": 20, "lengths": [1, 70, 17], "chosen": Tiling(splits=3, block=16)},
    "window": {"window": 20, "lengths": [9, 70, 41]},
    "window after a prefix": {"window": 16, "prefix": 3, "chosen": Tiling(splits=2, block=16)},
    "softcap": {"softcap": 2.0, "prefix": 3},
    "mask": {"masked": True, "chosen": Tiling(splits=5, block=16)},
    "three bits": {"bits": 3},
    "fp16": {"dtype": torch.float16},
    "fp16, two groups": {"dtype": torch.float16, "groups": 2, "prefix": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_as_exact_as_16_bits(name):
    """The error against fp32 over the dequantized cache is within twice that of bfloat16 over it."""
    torch.manual_seed(0)
    case = {"kv_heads": 2, "ratio": 2, "d_head": 64, "tokens": 70, "groups": 1, "bits": 4, "dtype": HALF} | CASES[name]
    heads, d_head, tokens = case["kv_heads"], case["d_head"], case["tokens"]
    lengths = case.get("lengths")
    batch = 2 if lengths is None else len(lengths)
    grid = quantizer(d_head, case["groups"], case["bits"])
    keys, values = grid.encode(randn(batch, heads, tokens, d_head), randn(batch, heads, tokens, d_head) + 0.5)
    query = 2 * randn(batch, heads * case["ratio"], d_head, dtype=case["dtype"])
    prefix = None
    if "prefix" in case:
        prefix = tuple(randn(heads, case["prefix"], d_head, dtype=case["dtype"]) for _ in range(2))
    slots, ends = torch.arange(tokens), torch.tensor(lengths or [tokens] * batch)[:, None]
    seen = (slots < ends) & (slots >= ends - case.get("window", tokens))
    mask = None
    if "masked" in case:
        mask = (torch.rand(batch, tokens) > 0.3).to(DEVICE)
        mask[0, :40] = False
        seen &= mask.cpu()
    options = {"scale": d_head**-0.5, "softcap": case.get("softcap")}
    rows = None if lengths is None else torch.tensor(lengths, dtype=torch.int32).to(DEVICE)
    options |= {"mask": mask, "window": case.get("window"), "chosen": case.get("chosen")}
    found = decode_attention(query, keys.parts, values.parts, rows, prefix, **options)
    wide = [grid.decode(states, torch.float32) for states in (keys, values)]
    seen = seen.to(DEVICE)
    options = {"scale": options["scale"], "softcap": options["softcap"], "prefix": prefix}
    truth = exact(query.float(), *wide, seen, **options)
    rounded = exact(query.to(HALF), *(states.to(HALF) for states in wide), seen, **options)
    assert found.dtype == query.dtype and found.shape == query.shape
    assert (found.float() - truth).norm() <= 2 * (rounded.float() - truth).norm() + 1e-6 * truth.norm()


def test_long_even_attention_adds_up():
    """Thousands of equal weights: where a sum that keeps an offset would drift."""
    torch.manual_seed(0)
    grid = quantizer(64)
    keys, values = grid.encode(0.01 * randn(1, 1, 4096, 64), randn(1, 1, 4096, 64))
    query = randn(1, 1, 64)
    found = decode_attention(query, keys.parts, values.parts, scale=0.125, chosen=Tiling(splits=2, block=256))
    wide = [grid.decode(states, torch.float32) for states in (keys, values)]
    seen = torch.ones(1, 4096, dtype=torch.bool, device=DEVICE)
    truth = exact(query.float(), *wide, seen, scale=0.125)
    rounded = exact(query, *(states.to(HALF) for states in wide), seen, scale=0.125)
    assert (found.float() - truth).norm() <= 2 * (rounded.float() - truth).norm()


def test_a_row_that_sees_nothing_gets_zeros():
    keys, values = quantizer(16).encode(randn(2, 1, 5, 16), randn(2, 1, 5, 16))
    lengths = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    for splits in (1, 2):
        found = decode_attention(
            randn(2, 1, 16), keys.parts, values.parts, lengths, scale=0.25, chosen=Tiling(splits, 16)
        )
        assert (found[0] == 0).all() and (found[1] != 0).all()


def test_what_lies_after_a_row_is_not_read():
    torch.manual_seed(0)
    keys, values = quantizer(16).encode(randn(1, 2, 40, 16), randn(1, 2, 40, 16))
    query, lengths = randn(1, 2, 16), torch.tensor([21], dtype=torch.int32, device=DEVICE)
    before = decode_attention(query, keys.parts, values.parts, lengths, scale=0.25, chosen=Tiling(2, 16))
    for states in (keys, values):
        states.codes[:, :, 21:], states.scale[:, :, 21:] = 255, torch.nan
    after = decode_attention(query, keys.parts, values.parts, lengths, scale=0.25, chosen=Tiling(2, 16))
    assert torch.equal(before, after)


def test_parts_are_chosen_by_shapes():
    for tokens, rows in ((1, 1), (8192, 8), (32768, 64), (131072, 256), (4096, 4096)):
        cut = tiling(tokens, rows, 128, torch.device("cpu"))
        assert 1 <= cut.splits <= max(1, tokens // 64) and cut.block == 32
    assert tiling(100, 1, 64, DEVICE, Tiling(7, 16, 2, 4)) == Tiling(7, 16, 2, 4)


@pytest.mark.parametrize(
    ("spec", "d_head", "dtype", "reason"),
    [
        (QuantSpec(4, False, "token"), 64, HALF, ""),
        (QuantSpec(8, False, "token"), 64, HALF, "two to a byte"),
        (QuantSpec(4, True, "token"), 64, HALF, "asymmetric"),
        (QuantSpec(4, False, "group", 3), 12, HALF, "a byte of two groups"),
        (QuantSpec(4, False, "token"), 512, HALF, "up to 256"),
        (QuantSpec(4, False, "token"), 64, torch.float32, "16-bit queries"),
    ],
)
def test_what_is_refused_is_told(spec, d_head, dtype, reason):
    ok, told = can_run(spec, d_head, dtype, DEVICE)
    assert ok == (not reason) and reason in told


def empty(grid, batch, heads, slots):
    codes = torch.full((batch, heads, slots, (grid.d_head + 1) // 2), 7, dtype=torch.uint8, device=DEVICE)
    scale = torch.ones(batch, heads, slots, grid.layout.keys.groups(grid.d_head), dtype=torch.float16, device=DEVICE)
    return codes, scale, torch.ones_like(scale, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("d_head", "groups", "bits", "clip"),
    [(64, 1, 4, 1.0), (128, 2, 4, 0.87), (12, 2, 3, 1.0), (7, 1, 4, 0.95), (80, 1, 2, 1.0)],
)
def test_what_is_written_is_the_reference(d_head, groups, bits, clip, dtype):
    """Codes, scales and zero points bit for bit, in the rows' own slots, and nothing beside them or past the end."""
    torch.manual_seed(0)
    grid = quantizer(d_head, groups, bits, clip)
    size = torch.tensor([1e-9, 0.0, 1.0, 1e4])[:, None, None].to(DEVICE)
    keys = (torch.randn(4, 5, 3, d_head).to(DEVICE) * size[..., None]).to(dtype).transpose(1, 2)
    values = (torch.randn(4, 3, 5, d_head).to(DEVICE) * size[..., None] + 0.5).to(dtype)
    start = torch.tensor([0, 3, 6, 7], dtype=torch.int32, device=DEVICE)
    caches = empty(grid, 4, 3, 9), empty(grid, 4, 3, 9)
    write_kv(keys, values, start, *caches, (grid.layout.keys, grid.layout.values))
    for cache, before, new in zip(caches, (empty(grid, 4, 3, 9),) * 2, grid.encode(keys, values), strict=True):
        for found, kept, part in zip(cache, before, new.parts, strict=True):
            for b, at in enumerate(start.tolist()):
                kept[b, :, at : at + 5] = part[b, :, : 9 - at]
            assert torch.equal(found, kept)


@pytest.mark.parametrize("d_head", [64, 12])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_mapped_keys_are_written_but_for_roundings_on_the_edge(d_head, orthogonal):
    torch.manual_seed(0)
    matrix = torch.randn(d_head, d_head, dtype=torch.float64)
    grid = quantizer(d_head, qk=spreading_rotation(d_head) if orthogonal else LinearMap.dense(matrix))
    keys, values = randn(2, 2, 40, d_head), randn(2, 2, 40, d_head)
    caches = empty(grid, 2, 2, 40), empty(grid, 2, 2, 40)
    start = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    table = grid.key_map.map().matrix().float().contiguous().to(DEVICE)
    write_kv(keys, values, start, *caches, (grid.layout.keys, grid.layout.values), table)
    new = grid.encode(keys, values)
    assert all(torch.equal(a, b) for a, b in zip(caches[1], new.values.parts, strict=True))
    apart = [(x & 15).int() - (y & 15).int() for x, y in ((caches[0][0], new.keys.codes),)]
    apart += [(x >> 4).int() - (y >> 4).int() for x, y in ((caches[0][0], new.keys.codes),)]
    flips = torch.stack(apart).abs()
    assert flips.max() <= 1 and flips.float().mean() < 2e-3


def test_operators_are_well_made():
    grid = quantizer(16)
    keys, values = grid.encode(randn(2, 2, 8, 16), randn(2, 2, 8, 16))
    lengths = torch.tensor([3, 8], dtype=torch.int32, device=DEVICE)
    told = (None, None, None, 0.25, 5, None, 2, 16, 1, 3)
    torch.library.opcheck(
        torch.ops.phasequant.decode_attention.default, (randn(2, 4, 16), *keys.parts, *values.parts, lengths, *told)
    )
    new = randn(2, 2, 1, 16)
    torch.library.opcheck(
        torch.ops.phasequant.write_kv.default, (new, new, lengths, None, *keys.parts, *values.parts, 4, 1.0, 1.0)
    )


@pytest.mark.parametrize("option", ["none", "prefix", "mask", "window", "softcap"])
def test_the_attention_function_takes_the_kernel_where_it_can(option, monkeypatch):
    """And says which it took; both are equally near fp32."""
    torch.manual_seed(0)
    grid = quantizer(16, qk=spreading_rotation(16))
    layer = PackedLayer(grid)
    layer.update(randn(2, 2, 30, 16), randn(2, 2, 30, 16))
    keys, values = layer.update(randn(2, 2, 1, 16), randn(2, 2, 1, 16))
    module = reader(grid, 2)
    mask, options = None, {"scaling": 0.25}
    if option == "prefix":
        module.kv_prefix = PrefixStates(randn(2, 3, 16), randn(2, 3, 16))
    if option in ("mask", "window"):
        mask = torch.ones(2, 1, 1, 31, dtype=torch.bool, device=DEVICE)
        mask[1, ..., :4] = False
    if option == "window":
        mask[..., :21] = False
        options["sliding_window"] = 10
    if option == "softcap":
        options["softcap"] = 1.5
    query = 2 * randn(2, 4, 1, 16)

    def run(kinds, x):
        monkeypatch.setattr(kv_module, "TRITON_ON", kinds)
        out, _ = quantized_attention(module, x, keys, values, mask, **options)
        return out.float(), grid.attended

    truth, by = run(set(), query.float())
    assert by == SDPA
    rounded, by = run(set(), query)
    assert by == SDPA
    found, by = run({DEVICE.type}, query)
    assert by == TRITON and found.shape == rounded.shape
    assert (found - truth).norm() <= 2 * (rounded - truth).norm()
    assert run({DEVICE.type}, query.float())[1] == SDPA  # fp32 is not the kernel's


def test_a_cpu_does_not_take_the_kernel_unasked():
    """However Triton would run there: its interpreter is slow."""
    assert "cpu" not in kv_module.TRITON_ON
    assert not quantizer(16).by_triton(HALF, torch.device("cpu"))[0]


def same(a: PackedStates, b: PackedStates) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def test_a_growing_layer_seldom_moves():
    """Views of one room; what was cropped is overwritten, what an inference mode froze is copied."""
    torch.manual_seed(0)
    grid = quantizer(16)
    states = randn(1, 2, 70, 16), randn(1, 2, 70, 16)
    layer, places = PackedLayer(grid), set()
    with torch.inference_mode():
        layer.update(*(x[:, :, :4] for x in states))
    for at in range(4, 70):
        keys, _ = layer.update(*(x[:, :, at : at + 1] for x in states))
        places.add(keys.codes.data_ptr())
        if at == 40:
            layer.crop(-1)
            layer.update(*(x[:, :, at : at + 1] for x in states))
    assert len(places) <= 6 and layer.get_seq_length() == 70
    told = grid.encode(*states)
    assert same(layer.packed.keys, told.keys) and same(layer.packed.values, told.values)
    assert layer.nbytes == 70 * grid.bytes_per_token(2)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("pieces", [[9], [4, 1, 3, 1], [1] * 9])
def test_a_static_layer_holds_what_a_growing_one_does(pieces, kernel, monkeypatch):
    monkeypatch.setattr(kv_module, "TRITON_ON", {DEVICE.type} if kernel else set())
    torch.manual_seed(0)
    grid = quantizer(16, 2)
    rows = Rows(2, DEVICE)
    growing, static = PackedLayer(grid), StaticPackedLayer(grid, rows, 12)
    states = randn(2, 3, 9, 16), randn(2, 3, 9, 16)
    for keys, values in zip(*(x.split(pieces, 2) for x in states), strict=True):
        count = keys.shape[2]
        told = growing.update(keys, values)
        rows.begin(count)
        found = static.update(keys, values)
        rows.change(rows.lengths + count)
        for a, b in zip(told, found, strict=True):
            assert same(a, b.first(a.length)) and (b.lengths is None or b.lengths.tolist() == [a.length] * 2)
    assert static.nbytes == 2 * 12 * grid.bytes_per_token(3) and int(static.get_seq_length()) == 9


def test_static_rows_have_their_own_lengths(triton):
    """A ragged step writes where each row ends and sees what each row has, whichever kernel reads it."""
    torch.manual_seed(0)
    grid = quantizer(16)
    rows = Rows(3, DEVICE)
    static = StaticPackedLayer(grid, rows, 20)
    keys, values = randn(3, 1, 15, 16), randn(3, 1, 15, 16)
    rows.begin(15)
    static.update(keys, values)
    rows.change(torch.tensor([1, 15, 7]))
    new, query = (randn(3, 1, 1, 16), randn(3, 1, 1, 16)), randn(3, 1, 1, 16)
    rows.begin(1)
    held = static.update(*new)
    module = reader(grid)
    found, _ = quantized_attention(module, query, *held, None, scaling=0.25)
    assert grid.attended == TRITON
    wide, _ = quantized_attention(module, query.float(), *held, None, scaling=0.25)
    for row, length in enumerate([1, 15, 7]):
        alone = PackedLayer(grid)
        alone.update(keys[row, None, :, :length], values[row, None, :, :length])
        both = alone.update(new[0][row, None], new[1][row, None])
        told, _ = quantized_attention(module, query[row, None].float(), *both, None, scaling=0.25)
        assert torch.allclose(wide[row], told[0], atol=1e-6)
        assert torch.allclose(found[row].float(), told[0], atol=0.02)


def test_a_static_cache_says_what_it_cannot_do():
    static = StaticPackedLayer(quantizer(16), Rows(2, DEVICE), 4)
    with pytest.raises(PhaseQuantError, match="do not fit"):
        static.update(randn(2, 1, 5, 16), randn(2, 1, 5, 16))
    with pytest.raises(PhaseQuantError, match="2 rows"):
        static.update(randn(1, 1, 2, 16), randn(1, 1, 2, 16))
    for change in (lambda: static.crop(-1), lambda: static.reorder_cache(torch.tensor([1, 0])), static.offload):
        with pytest.raises(PhaseQuantError):
            change() if static.is_initialized else static.update(randn(2, 1, 1, 16), randn(2, 1, 1, 16)) and change()


@pytest.fixture
def packing():
    """A function: family → tiny model with a packed KV."""

    def make(name, dtype=HALF):
        model = make_model(name, dtype)
        model_map = ModelMap.from_config(model.config)
        size = model_map.shape.d_head
        spec = QuantSpec(4, False, "token")
        attach(model, model_map, lambda block: KVQuantizer.of(spec, spec, size, spreading_rotation(size)).to(DEVICE))
        return model.to(DEVICE)

    return make


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_models_decode_alike_with_both(name, packing, ids, monkeypatch):
    """Sliding windows and caps included, and rows padded on the left."""
    model, ids = packing(name), ids.to(DEVICE)
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    outputs = {}
    for kinds in (set(), {DEVICE.type}):
        monkeypatch.setattr(kv_module, "TRITON_ON", kinds)
        cache, steps = PackedCache(model), []
        for count in (20, 1, 2, 1):
            at = cache.get_seq_length()
            part = {"attention_mask": padding[:, : at + count], "past_key_values": cache}
            steps.append(model(ids[:, at : at + count], **part).logits[:, -1].float())
            if count == 1:
                assert attended(model) == {TRITON if kinds else SDPA}
        outputs[bool(kinds)] = torch.stack(steps)
    spread = (outputs[True] - outputs[False]).norm() / outputs[False].norm()
    assert spread < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_models_decode_alike_over_a_static_cache(name, dtype, packing, ids, triton):
    """Prefill in two pieces, then token by token: the growing cache's numbers."""
    model, ids = packing(name, dtype), ids.to(DEVICE)
    growing, static = PackedCache(model), StaticPackedCache(model, 2, 26)
    assert static.mask() is None and static.get_max_length() == 26
    for _ in range(2):
        at = 0
        for count in (13, 6, 1, 1):
            part = ids[:, at : at + count]
            told = model(part, past_key_values=growing).logits.float()
            found = model(part, past_key_values=static).logits.float()
            static.advance(count)
            at += count
            assert torch.allclose(found, told, atol=1e-4 if dtype == torch.float32 else 0.3, rtol=0)
        assert static.lengths.tolist() == [21, 21] == [growing.get_seq_length()] * 2
        for a, b in zip(growing.layers, static.layers, strict=True):
            if dtype == torch.float32:
                assert same(a.packed.keys, b._room.keys.first(21))
        static.reset()
        growing = PackedCache(model)
    kernel = SDPA if dtype == torch.float32 else TRITON
    assert attended(model) == {kernel} and static.describe() == f"4-bit packed, {kernel}"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
def test_a_captured_step_stays_right_while_rows_grow():
    torch.manual_seed(0)
    grid = quantizer(128, qk=spreading_rotation(128))
    rows = Rows(3, DEVICE)
    static, growing = StaticPackedLayer(grid, rows, 600), PackedLayer(grid)
    module = reader(grid, 4)
    states = randn(3, 2, 500, 128), randn(3, 2, 500, 128)
    rows.begin(500)
    static.update(*states)
    growing.update(*states)
    key, value, query = randn(3, 2, 1, 128), randn(3, 2, 1, 128), randn(3, 8, 1, 128)

    def step():
        rows.begin(1)
        out, _ = quantized_attention(module, query, *static.update(key, value), None, scaling=128**-0.5)
        rows.change(rows.lengths + 1)
        return out

    rows.change(torch.full_like(rows.lengths, 500))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    rows.change(torch.full_like(rows.lengths, 500))
    for _ in range(60):
        for x in (key, value, query):
            x.copy_(randn(*x.shape))
        graph.replay()
        told, _ = quantized_attention(module, query, *growing.update(key, value), None, scaling=128**-0.5)
        assert torch.allclose(out, told, atol=0.02) and grid.attended == TRITON
