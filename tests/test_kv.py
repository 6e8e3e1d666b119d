"""The KV grid: what is stored, what comes back, what it costs."""

import pytest
import torch

from phasequant.nn.kv import KVQuantizer, PackedLayer
from phasequant.numerics import QuantSpec, spreading_rotation


def make(bits=4, symmetric=False, size=16, rotate=True):
    spec = QuantSpec(bits, symmetric, "group", size)
    return KVQuantizer.of(spec, spec, 16, spreading_rotation(16) if rotate else None)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 16])
def test_error_is_within_a_step(bits, symmetric, size):
    quantizer = make(bits, symmetric, size)
    k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    keys, values = quantizer.encode(k, v)
    back = quantizer.decode(values, torch.float32)
    step = values.scale.float().repeat_interleave(size, -1)
    assert ((back - v).abs() <= step * 1.01).all()
    rotated = quantizer.decode(keys, torch.float32)
    assert ((rotated - quantizer.rotate_keys(k)).abs() <= keys.scale.float().repeat_interleave(size, -1) * 1.01).all()


def test_bytes_are_what_is_promised():
    quantizer = make()
    k = torch.randn(1, 3, 10, 16)
    keys, values = quantizer.encode(k, k)
    assert keys.codes.shape == (1, 3, 10, 8) and keys.codes.dtype == torch.uint8
    assert keys.nbytes + values.nbytes == quantizer.bytes_per_token(3) * 10 == 2 * 3 * (8 + 3) * 10


def test_tokens_are_rounded_on_their_own():
    """So a cache filled piece by piece equals one filled at once."""
    quantizer = make()
    k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    whole, pieces = PackedLayer(quantizer), PackedLayer(quantizer)
    whole.update(k, v)
    for part_k, part_v in zip(k.split([4, 1, 4], 2), v.split([4, 1, 4], 2), strict=True):
        pieces.update(part_k, part_v)
    assert torch.equal(whole.packed.keys.codes, pieces.packed.keys.codes)
    assert torch.equal(whole.packed.values.scale, pieces.packed.values.scale)
    assert pieces.get_seq_length() == 9 and pieces.get_mask_sizes(3) == (12, 0)


def test_layer_housekeeping():
    layer = PackedLayer(make())
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    k = torch.randn(2, 2, 5, 16)
    layer.update(k, k)
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.packed.keys.codes[0], layer.packed.keys.codes[1])
    layer.batch_repeat_interleave(2)
    assert layer.packed.values.codes.shape[0] == 4
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.packed.values.codes.shape[0] == 1
    layer.reset()
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e4])
def test_extreme_magnitudes_survive(value):
    quantizer = make(rotate=False)
    x = torch.full((1, 1, 1, 16), value)
    back = quantizer.decode(quantizer.encode(x, x).values, torch.float32)
    assert torch.isfinite(back).all()
    assert (back - x).abs().max() <= max(value * 1e-3, 1e-6)
