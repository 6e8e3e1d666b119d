"""Metrics against their formulas computed by hand in fp64, and the sweep against a plain forward."""

import math

import pytest
import torch
from conftest import NEW

from phasequant import observe, transform
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.observe.massive import Outlier, outstanding, phases


def test_jump_ratio_by_hand():
    x, update = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 10.0], [0.0, 0.0]])
    assert observe.jump_ratio(x, update).tolist() == pytest.approx([2.0, 0.0])


def test_jump_ratio_survives_rotation_and_snr_does_not():
    torch.manual_seed(0)
    x, update = torch.randn(50, 64, dtype=torch.float64), torch.randn(50, 64, dtype=torch.float64)
    x[:, 3] *= 40
    r = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    assert torch.allclose(observe.jump_ratio(x @ r, update @ r), observe.jump_ratio(x, update))
    raw, rotated = observe.historical_snr(x, update, 4), observe.historical_snr(x @ r, update @ r, 4)
    assert (rotated.mean() - raw.mean()).abs() > 0.5


def test_historical_snr_by_hand():
    x, update = [1.0, -2.0, 0.5], [0.25, 3.0, -1.0]
    y = [a + b for a, b in zip(x, update, strict=True)]
    step = (max(y) - min(y)) / 15
    estimate = [step * round(v / step) - u for v, u in zip(y, update, strict=True)]
    noise = sum((e - v) ** 2 for e, v in zip(estimate, x, strict=True))
    expected = 10 * math.log10(sum(v * v for v in x) / (noise + 1e-8))
    found = observe.historical_snr(torch.tensor([x]).double(), torch.tensor([update]).double(), 4)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_snr_gains_about_24_db_from_four_more_bits():
    torch.manual_seed(0)
    x, update = torch.randn(200, 576), torch.randn(200, 576)
    gain = observe.historical_snr(x, update, 8).mean() - observe.historical_snr(x, update, 4).mean()
    assert gain.item() == pytest.approx(20 * math.log10(255 / 15), abs=0.5)


def test_gsr_of_known_rows():
    torch.manual_seed(0)
    assert observe.gsr(torch.randn(2000, 1024)).mean().item() == pytest.approx(0.490, abs=0.01)
    uniform = torch.linspace(-1, 1, 4001)[None]
    assert observe.gsr(uniform).item() == pytest.approx(math.sqrt(3) / 7, rel=1e-2)
    assert observe.gsr(torch.zeros(1, 8)).item() == 0.0


def test_spike_ratio_is_qfems():
    s = torch.tensor([[1.0, 2.0, 100.0], [1.0, 1.0, 3.0]])
    assert observe.spike_ratio(s) == pytest.approx((100 / 2 + 3 / 1) / 2)


def test_outstanding_needs_both_conditions():
    h = torch.full((4, 10), 0.05)
    h[0, 1], h[1, 2], h[2, 3] = 101.0, -200.0, 49.0
    assert outstanding(h).nonzero().tolist() == [[0, 1], [1, 2]]
    h = torch.full((4, 10), 1.0)
    h[0, 1], h[1, 2] = 500.0, 1000.0
    assert outstanding(h).nonzero().tolist() == [[1, 2]]
    assert outstanding(h, 100.0).nonzero().tolist() == [[0, 1], [1, 2]]


def test_phases_split_and_attribute():
    def at(block, value, position=0, channel=7):
        return Outlier(block, 0, position, "x", channel, value, value / 0.1)

    found = [at(2, 300.0), at(3, 900.0), at(4, 900.0), at(5, 400.0), at(8, 150.0), at(3, 500.0, position=4)]
    first, *rest = phases(found, blocks=10)
    assert (first.channel, first.first_token, first.appears, first.last) == (7, True, 2, 5)
    assert first.written_by == (2, 3) and first.taken_back_by == (5, 6)
    assert {(p.appears, p.last, p.first_token) for p in rest} == {(8, 8, True), (3, 3, False)}
    assert phases([at(9, 500.0)], blocks=10)[0].taken_back_by == ()


def plant(source, block, channel, token, size):
    """Make `block` write `size` on `channel` for one token id, by its down projection."""
    layer = source.model.model.layers[block].mlp
    with torch.no_grad():
        direction = source.model.model.embed_tokens.weight[token]
        norm = source.model.model.layers[block].post_attention_layernorm.weight
        for later in source.model.model.layers[: block + 1]:
            later.self_attn.o_proj.weight.zero_()
        for earlier in source.model.model.layers[:block]:
            earlier.mlp.down_proj.weight.zero_()
        unit = direction / direction.norm() / norm
        layer.gate_proj.weight[0] = 40 * unit / unit.norm()
        layer.up_proj.weight[0] = 40 * unit / unit.norm()
        layer.down_proj.weight[:, 0] = 0
        layer.down_proj.weight[channel, 0] = size / 4e3


def test_a_planted_massive_activation_is_found(tiny):
    source = tiny("llama")
    plant(source, block=1, channel=11, token=65, size=5e4)
    tokens = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(5))
    tokens[tokens == 65] = 66
    tokens[0, 9] = tokens[1, 20] = 65
    found = observe.sweep(source.model, source.map, tokens, tokenizer=source.tokenizer)
    top = found.phases[0]
    assert (top.channel, top.appears, top.first_token) == (11, 1, False)
    assert top.written_by == (1,)
    assert dict(top.tokens)[source.tokenizer.decode([65])] == 2
    assert found.residual.absmax_channel[2] == 11


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-sliding", "qwen3", *NEW])
def test_streaming_equals_the_whole_model(name, tiny):
    """Block by block with captured arguments gives the hidden states of a plain forward, and so the same metrics."""
    source = tiny(name)
    tokens = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(2))
    states = source.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    found = observe.sweep(source.model, source.map, tokens)
    for block in range(source.map.shape.blocks - 1):  # the last hidden state is taken after the final norm
        x, y = states[block], states[block + 1]
        ratios = ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        assert found.jump_ratio.all_tokens[block] == pytest.approx(ratios.item(), rel=1e-4)
        assert found.residual.absmax[block + 1] == pytest.approx(y.abs().max().item(), rel=1e-4)
    assert len(found.groups) == 4 * source.map.shape.blocks
    # the model is as it was
    again = source.model(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(again).all()
    assert type(source.model.get_submodule(source.map.block_name(0))).__name__.endswith("Layer")


def test_rotation_keeps_jr_changes_gsr_and_noise_is_measured(tiny):
    source = tiny("llama")
    with torch.no_grad():
        source.model.model.embed_tokens.weight[:, 5] *= 30
    tokens = torch.randint(0, 200, (2, 32))
    raw = observe.sweep(source.model, source.map, tokens)
    transform.apply(source.model, source.map, transform.fixed_rotations(source.map, 0))
    grids = {"low": QuantSpec(4), "high": QuantSpec(8)}
    rotated = observe.sweep(source.model, source.map, tokens, coordinates="after quarot", noise=grids)
    assert rotated.jump_ratio.all_tokens == pytest.approx(raw.jump_ratio.all_tokens, rel=1e-4)
    assert rotated.group(0, "qkv").gsr < raw.group(0, "qkv").gsr
    assert all(g.noise["low"] > 20 * g.noise["high"] > 0 for g in rotated.groups)
    assert all(m.input_spec is None for m in source.model.modules() if hasattr(m, "input_spec"))
    assert Observations.from_dict(rotated.to_dict()) == rotated
