"""The runtime against Transformers: the same logits, the same tokens, with rows of different lengths."""

import pytest
import torch

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear
from phasequant.runtime import Decoder, Runner, can_run
from phasequant.runtime.stacking import stack

NAMES = ["llama", "llama-bias", "llama-odd", "llama-one", "qwen2", "qwen3"]
PROMPTS = [[5, 9, 200, 31, 7], [1, 2, 3], [77] * 9]


def alone(model, prompt, new):
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=257, eos_token_id=None)
    return made[0, len(prompt) :].tolist()


def quantized(source, *sets):
    return phasequant.quantize(source, "quarot", overrides=["calibration.sequences=2", "calibration.seqlen=32",
                                                            "storage.dtype=float32", *sets]).model  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits(name, tiny):
    model = tiny(name).model
    want = [alone(model, prompt, 6) for prompt in PROMPTS]
    assert Runner.of(model, 3, 20).generate(PROMPTS, 6) == want


LOWRANK = ("lowrank.method=svd", "lowrank.rank=4")


PREFIX = ("prefix.method=tokens", "prefix.tokens=[3,7]")


@pytest.mark.parametrize("sets", [(), ("kv.bits=16",), PREFIX, LOWRANK], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_quantized(name, sets, tiny):
    model = quantized(tiny(name), *sets)
    want = [alone(model, prompt, 6) for prompt in PROMPTS]
    logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1]
    runner = Runner.of(model, 3, 20)
    got = runner.prefill(torch.tensor([row + [0] * (9 - len(row)) for row in PROMPTS]), torch.tensor([5, 3, 9]))
    assert torch.allclose(got[2], logits, atol=1e-5)
    assert runner.generate(PROMPTS, 6) == want
    assert [alone(model, prompt, 6) for prompt in PROMPTS] == want  # the model itself goes on


@pytest.mark.parametrize("sets", [(), LOWRANK, ("rotation.where=online",)], ids=str)
@pytest.mark.parametrize("name", ["llama-bias", "qwen3"])
def test_fused_entrances(name, sets, tiny, monkeypatch):
    """The GPU's kernels in Triton's interpreter: logits but for a code that falls to the other side now and then."""
    pytest.importorskip("triton")
    from phasequant.kernels.triton_int import TritonInt

    model = quantized(tiny(name), "kv.bits=16", "activations.bits=8", *sets)
    tokens = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    want = model(tokens).logits[:, -1]
    monkeypatch.setattr(TritonInt, "can_run", lambda self, spec, device: self.takes(spec))
    runner = Runner.of(model, 2, 12)
    told = runner.decoder.describe()
    assert all(one == {"kernel": "triton-int8", "entrance": "fused"} for one in told.values()), told
    got = runner.prefill(tokens)
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    runner.tokens.copy_(torch.tensor([[3], [4]]))
    longer = model(torch.cat((tokens, torch.tensor([[3], [4]])), 1)).logits[:, -1]
    assert (runner.decode() - longer).abs().max() < 0.05 * longer.abs().max()


@pytest.mark.parametrize("name", ["llama-bias", "qwen2"])
def test_a_stack_is_its_parts(name, tiny):
    model = quantized(tiny(name), "lowrank.method=svd", "lowrank.rank=4")
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(7, parts[0].in_features)
    want = torch.cat([part(x) for part in parts], -1)
    made = stack(parts)
    assert torch.equal(made(x), want)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), want)
    assert parts[1].weight_packed.untyped_storage().data_ptr() == made.weight_packed.untyped_storage().data_ptr()


def test_parts_on_different_grids_are_not_stacked(tiny):
    model = quantized(tiny("llama"))
    q, k = model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj
    assert isinstance(q, QuantLinear)
    q.input_spec = None
    with pytest.raises(PhaseQuantError, match="different grids"):
        stack([q, k])


def test_a_window_bounds_the_capacity(tiny):
    model = tiny("mistral").model
    window = model.config.sliding_window
    want = alone(model, [1, 2], 3)
    assert Runner.of(model, 1, min(window, 8)).generate([[1, 2]], 3) == [want]
    with pytest.raises(PhaseQuantError, match="sliding windows"):
        Runner.of(model, 1, window + 1)


def test_what_it_cannot_run(tiny):
    for name, why in (("gemma2", "Gemma 2"), ("opt", "OPT"), ("mixtral", "Mixtral")):
        ok, reason = can_run(tiny(name).model)
        assert not ok and why in reason
    with pytest.raises(PhaseQuantError, match="Transformers"):
        Decoder(tiny("gemma2").model)
    runner = Runner.of(tiny("llama").model, 1, 8)
    with pytest.raises(PhaseQuantError, match="capacity"):
        runner.generate([[1, 2, 3]], 9)
    with pytest.raises(PhaseQuantError, match="holds 1 rows"):
        runner.prefill(torch.zeros(2, 3, dtype=torch.long))
