"""Mixtures of experts block by block: their files hold experts one by one or stacked, and are the same from memory."""

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_model, make_tokenizer, where
from safetensors.torch import load_file, save_file
from test_resume import Stopped, stop_after
from test_streaming import FEW, assert_same, both, sharded, tensors
from transformers import AutoConfig, MixtralConfig

import phasequant
from phasequant import PhaseQuantError
from phasequant.source import open_model, open_streamed
from phasequant.stream import resident
from phasequant.streaming import LazyBlock
from phasequant.streaming.opening import NotStreamable, open_lazily
from phasequant.streaming.tensors import SourceTensors

QUICK = ["weights.clip=none"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


@pytest.fixture
def files(tmp_path):
    """A function: family → directory as on the Hub, experts one by one (but gpt-oss'); or `stacked` as in a model."""

    def make(family: str, *, stacked: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = tmp_path / f"model-{family}"
        make_model(family, dtype).save_pretrained(folder, save_original_format=not stacked)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "stacked", "has"),
    [
        ("mixtral", False, "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", True, "model.layers.1.mlp.experts.down_proj"),
        ("qwen2_moe", False, "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("qwen2_moe", True, "model.layers.1.mlp.experts.gate_up_proj"),
        ("qwen3_moe", False, "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("gpt_oss", False, "model.layers.1.mlp.experts.gate_up_proj_bias"),
        ("gpt_neox", False, "embed_out.weight"),
    ],
)
def test_streamed_is_what_memory_gives(files, family, stacked, has):
    model = files(family, stacked=stacked)
    assert has in tensors(model)
    whole, streamed = both(model, "quarot", [*where(family), *QUICK])
    assert_same(whole, streamed)
    assert len(list(streamed.glob("model-*.safetensors"))) == 5
    phasequant.load(streamed, device="cpu")


@pytest.mark.parametrize("family", MIXTURES)
def test_what_looks_at_data_streams_too(files, family, text_file):
    assert_same(*both(files(family), "quarot-gptq", [*FEW, f"calibration.text={text_file}"]))


@pytest.mark.parametrize(
    ("family", "recipe", "overrides"),
    [
        ("mixtral", "qfep-w8a8", [*QUICK, "prefix.candidates=1"]),
        ("qwen2_moe", "quarot", [*QUICK, "prefix.method=bos"]),
        ("gpt_oss", "quarot", [*QUICK, "prefix.method=prefixquant", "prefix.eta=2"]),
    ],
)
def test_one_block_at_a_time_behind_a_prefix_too(files, family, recipe, overrides, text_file, monkeypatch):
    filled, most = set(), []
    fill, drop = LazyBlock.fill, LazyBlock.drop

    def counted(self, block, device):
        fill(self, block, device)
        filled.add(id(block))
        most.append(len(filled))

    def less(self, block):
        drop(self, block)
        filled.discard(id(block))
        assert all(p.is_meta for p in block.parameters())

    monkeypatch.setattr(LazyBlock, "fill", counted)
    monkeypatch.setattr(LazyBlock, "drop", less)
    whole, streamed = both(files(family), recipe, [*overrides, *FEW, f"calibration.text={text_file}"])
    assert not filled and max(most) == 1 and len(most) > 6
    assert_same(whole, streamed)
    assert tensors(streamed)["model.layers.2.self_attn.kv_prefix.keys"].shape[1] >= 1


def test_a_block_reads_its_own_tensors_once(files, monkeypatch):
    seen, read = [], SourceTensors.read

    def told(self, names):
        seen.extend(names.values())
        return read(self, names)

    monkeypatch.setattr(SourceTensors, "read", told)
    source = open_streamed(files("mixtral"), "cpu")
    assert not any(".experts." in name for name in seen)
    seen.clear()
    block = source.model.get_submodule("model.layers.1")
    with resident(block, torch.device("cpu")):
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert len(seen) == len(set(seen)) == 7 + 3 * 4
    assert all(name.startswith("model.layers.1.") for name in seen)


def test_ten_stands_behind_nine_and_shards_split_experts(tmp_path, monkeypatch):
    config = MixtralConfig(**{**CONFIGS["mixtral"].to_dict(), "num_local_experts": 12, "num_hidden_layers": 2})
    monkeypatch.setitem(CONFIGS, "mixtral", config)
    folder = tmp_path / "model"
    make_model("mixtral").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    whole = open_model(folder, "cpu").model
    files = sharded(folder)
    streamed = open_streamed(folder, "cpu").model
    parts = [
        {file for name, file in files.items() if f"layers.{index}.block_sparse_moe.experts" in name} for index in (0, 1)
    ]
    assert max(map(len, parts)) == 2
    for index in (0, 1):
        own, lazy = (model.get_submodule(f"model.layers.{index}") for model in (whole, streamed))
        with resident(lazy, torch.device("cpu")):
            found = lazy.state_dict()
            assert found.keys() == own.state_dict().keys() and "mlp.experts.up.11.weight" in found
            for name, tensor in own.state_dict().items():
                assert torch.equal(tensor, found[name]), name


def test_an_expert_that_is_missing_is_named(files):
    model = files("qwen3_moe")
    found = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    save_file({n: t for n, t in found.items() if n != name}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PhaseQuantError, match=r"layers\.1\.mlp\.experts\.down_proj.* has shape \(3, 48, 32\)"):
        open_streamed(model, "cpu")
    save_file({n: t[:-1] if n == name else t for n, t in found.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PhaseQuantError, match=r"cannot be made of 'model\.layers\.1\.mlp\.experts\.0\.down_proj"):
        open_streamed(model, "cpu")


def test_nan_of_one_expert_is_found(files, tmp_path):
    model = files("mixtral")
    found = load_file(model / "model.safetensors")
    found["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 4] = float("nan")
    save_file(found, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PhaseQuantError, match=r"experts\.2\.w3\.weight' holds 1 values that are NaN"):
        phasequant.quantize(model, "quarot", output=tmp_path / "out", stream=True, device="cpu")


def test_a_stopped_run_goes_on(files, tmp_path, monkeypatch):
    model = files("mixtral")
    options = {"overrides": QUICK, "stream": True, "device": "cpu"}
    phasequant.quantize(model, "quarot", output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            phasequant.quantize(model, "quarot", output=tmp_path / "out", **options)
    assert len(list((tmp_path / ".out.work").glob("block-*.json"))) == 2
    phasequant.quantize(model, "quarot", output=tmp_path / "out", **options)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_what_stays_in_32_bits_is_not_streamed(files):
    model = files("gpt_oss", dtype=torch.float16)
    config = AutoConfig.from_pretrained(model)
    with pytest.raises(NotStreamable, match="stays in 32 bits"):
        open_lazily(model, config, torch.float16)
    open_lazily(model, config, torch.bfloat16)


def test_a_dry_run_of_a_mixture(files, tmp_path, run):
    model, out = files("qwen3_moe"), tmp_path / "out"
    status, printed, _ = run("quantize", model, "-o", out, "--dry-run", "--json", "--device", "cpu", "--stream")
    assert status == 0 and '"streamed": true' in printed and not out.exists()
