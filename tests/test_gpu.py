"""On a GPU: the CPU's numbers, one block resident at a time. CUDA_VISIBLE_DEVICES=0 pytest tests/test_gpu.py"""

import pytest
import torch
from test_kernels import INPUTS, WEIGHTS, make

import phasequant
from phasequant.kernels.reference import Reference
from phasequant.nn import quant_linears
from phasequant.numerics import QuantSpec
from phasequant.stream import BlockStream, Step
from phasequant.weight import gptq
from phasequant.weight.gptq import _Columns

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that is visible")
SMALL = ["calibration.sequences=2", "calibration.seqlen=32", "policy.name=budget", "storage.dtype=float32"]


@pytest.mark.parametrize("weight_spec", WEIGHTS, ids=str)
@pytest.mark.parametrize("input_spec", [s for s in INPUTS if s is not None], ids=str)
def test_the_reference_is_the_same_on_both(weight_spec, input_spec):
    linear = make(weight_spec, input_spec, width=96, out=33, bias=False)
    x = torch.randn(40, 96)
    here = Reference().linear(x, linear.tensors, linear.spec)
    linear.cuda()
    there = Reference().linear(x.cuda(), linear.tensors, linear.spec)
    assert torch.equal(there.cpu(), here)


def test_blocks_visit_one_at_a_time(saved, monkeypatch):
    seen = []
    run = Step.run

    def watched(self):
        stream: BlockStream = self._stream
        where = [next(block.parameters()).device.type for block in stream._blocks]
        seen.append((self.index, where))
        yield from run(self)

    monkeypatch.setattr(Step, "run", watched)
    phasequant.analyze(str(saved("llama")), overrides=SMALL, device="cuda")
    assert len(seen) == 6
    for index, where in seen:
        assert [i for i, kind in enumerate(where) if kind == "cuda"] == [index]


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "qwen3"])
def test_quantizing_there_gives_the_same_codes(name, saved, ids):
    folder = str(saved(name))
    here = phasequant.quantize(folder, overrides=SMALL, device="cpu")
    there = phasequant.quantize(folder, overrides=SMALL, device="cuda")
    assert next(there.model.parameters()).is_cuda and there.plan.raised.keys() == here.plan.raised.keys()
    for (key, a), (_, b) in zip(quant_linears(here.model), quant_linears(there.model), strict=True):
        differing = (a.weight_packed != b.weight_packed.cpu()).float().mean()
        assert differing < 1e-3, key  # a rounding on the edge may fall to the other side
    tokens = there.model.generate(ids.cuda(), max_new_tokens=8, do_sample=False, pad_token_id=257)
    again = there.model.generate(ids.cuda(), max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=257)
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("spec", [QuantSpec(4, True, "channel", clip="mse"), QuantSpec.floating("nvfp4")], ids=str)
def test_gptq_is_the_same_on_both(spec):
    """Columns run as a captured graph there; sums in another order flip a code here and there, and what follows it."""
    torch.manual_seed(0)
    weight, x = torch.randn(200, 320), torch.randn(2000, 320) @ torch.randn(320, 320)
    hessian = x.T @ x
    here, told = gptq(weight, hessian, spec)
    there, found = gptq(weight.cuda(), hessian.cuda(), spec)
    assert (there.codes.cpu() != here.codes).float().mean() < 0.02
    assert found.error == pytest.approx(told.error, rel=0.01) and found.rung == told.rung
    assert _Columns(8, 16, spec, torch.device("cuda")).graph is not None
