"""The doctor's word against what then runs: loaded models, the runtime, stock Transformers."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import phasequant
from phasequant.doctor import ask, vllm_rules
from phasequant.doctor.question import Question, real
from phasequant.errors import PhaseQuantError
from phasequant.kernels import LinearSpec, Machine, choose, choose_on
from phasequant.kernels.gpu import kv as gpu_kv
from phasequant.nn import quant_linears
from phasequant.nn.attention import SDPA, TRITON, attended
from phasequant.numerics import QuantSpec
from phasequant.runtime import Decoder

BOTH = frozenset({"humming", "triton"})
W4 = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False, "group_size": None}
A4 = {"num_bits": 4, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True, "group_size": None}
A8, W4G = A4 | {"num_bits": 8}, W4 | {"strategy": "group", "group_size": 128}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "symmetric": True,
    "dynamic": False,
    "group_size": 16,
}


@pytest.fixture(autouse=True)
def by_the_written_rules(monkeypatch):
    """Wherever the tests run; `tests/in_vllm` holds the rules to vLLM."""
    monkeypatch.setattr(ask, "has_vllm", lambda: False)


@pytest.fixture
def made(tiny, tmp_path, text_file):
    """A function: family, recipe, overrides → folder of a checkpoint."""

    def make(name="llama", recipe="rtn", *overrides, dtype=torch.float32):
        short = [f"calibration.text={text_file}", "calibration.seqlen=64", "calibration.sequences=2"]
        run = phasequant.quantize(tiny(name, dtype=dtype), recipe, overrides=[*short, *overrides], device="cpu")
        run.save(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return make


@pytest.fixture
def stock(tmp_path):
    """A function: config groups → folder with a config.json of compressed-tensors, without weights."""

    def make(groups=None, *, name="llama", wide=False, **rest):
        config = CONFIGS[name].to_dict()
        if wide:
            config |= {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
        groups = groups or {"g": {"targets": ["Linear"], "weights": W4, "input_activations": A4}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
            "ignore": ["lm_head"], **rest,
        }  # fmt: skip
        folder = tmp_path / "stock"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, default=str))
        return folder

    return make


def test_kernels_are_those_that_a_loaded_model_has(made, ids):
    folder = made("llama", "quarot", "policy.name=budget")
    found = phasequant.doctor(folder, gpu="cpu")
    assert found["as_promised"] and found["problems"] == []
    model = phasequant.load(folder, "cpu")
    said = {(b, row["group"]): row for row in found["groups"] for b in row["blocks"]}
    names = {"self_attn.q_proj": "qkv", "self_attn.o_proj": "o", "mlp.up_proj": "gate_up", "mlp.down_proj": "down"}
    for name, linear in quant_linears(model):
        group = names.get(name.split(".", 3)[3])
        if group is None:
            continue
        row = said[int(name.split(".")[2]), group]
        assert row["kernel"] == linear.kernel(torch.device("cpu"), torch.float32).name
        assert row["inputs"]["real"].startswith(f"int{linear.input_spec.bits} ")
        assert bool(row["online"]) == (linear.online is not None)
    model(ids, use_cache=True)
    assert attended(model) == {SDPA} and found["kv"][0]["how"].startswith(f"packed; {SDPA}")
    assert any("R1" in step for step in found["folded"]) and any("R3" in step for step in found["online"])
    on_gpu = phasequant.doctor(folder, gpu="sm_90")
    assert TRITON in phasequant.doctor(made("llama", "quarot", dtype=torch.bfloat16), gpu="sm_90")["kv"][0]["how"]
    assert {row["kernel"] for row in on_gpu["groups"]} == {"triton-int8"}  # 32-bit activations: not humming's
    assert any("int8 lanes" in note for note in on_gpu["notes"])


def test_the_runtime_runs_what_was_said(made):
    folder = made("qwen3")
    found = phasequant.doctor(folder, target="runtime", gpu="cpu")
    told = Decoder(phasequant.load(folder, "cpu")).describe()
    assert found["as_promised"]
    assert {row["group"]: row["kernel"] for row in found["groups"]} == {g: d["kernel"] for g, d in told.items()}


@pytest.mark.parametrize("packages", [BOTH, frozenset({"triton"}), frozenset()], ids=sorted)
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0), (12, 0)], ids=str)
def test_a_gpu_that_is_not_here_gets_what_one_that_is_would(monkeypatch, capability, packages):
    machine = Machine("cuda", capability, packages)
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: machine))
    channel = QuantSpec(4, granularity="channel")
    for weight in (channel, QuantSpec(4, symmetric=False, granularity="channel"), None):
        for dtype in (torch.bfloat16, torch.float32):
            spec = LinearSpec(128, 192, weight, QuantSpec(4), dtype=dtype)
            kernel, why = choose_on(spec, machine)
            assert kernel is choose(spec, torch.device("cuda"))
            assert all(why.values())
    best = choose_on(LinearSpec(128, 192, channel, QuantSpec(4), dtype=torch.bfloat16), machine)[0].name
    wanted = "triton-int8" if "triton" in packages else "reference"
    assert best == ("humming-int8" if "humming" in packages and capability >= (7, 5) else wanted)
    assert bool(gpu_kv.too_old(torch.device("cuda"))) == (capability < (8, 0))


def test_damage_is_told_and_the_table_still_shown(made, run):
    folder = made()
    (folder / "plan.json").write_text((folder / "plan.json").read_text() + " ")
    status, out, err = run("doctor", folder, "--gpu", "cpu")
    assert status == 1 and "cpu-int8" in out and "plan.json" in err
    status, out, _ = run("doctor", folder, "--gpu", "cpu", "--no-verify", "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["as_promised"]


def test_a_kernel_named_by_hand_that_cannot_run(made, run, monkeypatch):
    folder = made()
    monkeypatch.setenv("PHASEQUANT_KERNEL", "humming-int8")
    status, out, err = run("doctor", folder, "--gpu", "cpu")
    assert status == 1 and "none" in out and "PHASEQUANT_KERNEL" in err
    with pytest.raises(PhaseQuantError):
        phasequant.load(folder, "cpu")(torch.zeros(1, 4, dtype=torch.long))


def test_scales_that_humming_would_refuse(made):
    folder = made("llama-fp4", dtype=torch.bfloat16)
    assert phasequant.doctor(folder, gpu="sm_90")["as_promised"]
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.weight_scale"))
    tensors[name] = tensors[name] * 1.0001
    save_file(tensors, file, {"format": "pt"})
    found = phasequant.doctor(folder, gpu="sm_90", verify=False)
    assert any("humming-int8" in row["kernel"] for row in found["groups"])
    assert [problem["where"] for problem in found["problems"]] == [name]
    assert phasequant.doctor(folder, gpu="cpu", verify=False)["as_promised"]


def test_floating_grids_run_by_the_reference(made):
    found = phasequant.doctor(made("llama-fp4", "nvfp4"), gpu="sm_100")
    assert {row["kernel"] for row in found["groups"]} == {"reference"} and found["as_promised"]
    assert any("by the reference" in note for note in found["notes"])


def test_what_the_runtime_and_vllm_refuse(made, run):
    status, out, err = run("doctor", made("opt"), "--target", "runtime", "--gpu", "cpu")
    assert status == 1 and "none: refused" in out and "--target hf" in err
    experts = made("mixtral")
    found = phasequant.doctor(experts, target="vllm", gpu="sm_90")
    assert not found["as_promised"] and "experts" in found["problems"][0]["what"]
    assert phasequant.doctor(experts, gpu="cpu")["as_promised"]


def test_vllm_with_our_plugin(made):
    folder = made()

    def ask_for(gpu="sm_90", **flags):
        return phasequant.doctor(folder, target="vllm", gpu=gpu, **flags)

    plain = ask_for()
    assert plain["as_promised"] and any("no bytes are saved" in note for note in plain["notes"])
    assert ask_for(tensor_parallel=2)["as_promised"]
    assert "do not divide" in ask_for(tensor_parallel=3)["problems"][0]["what"]
    own = ask_for(kv_cache_dtype="int4_per_token_head")
    assert [p["where"] for p in own["problems"]] == ["KV"] and "vLLM's int4" in own["kv"][0]["real"]
    assert "refuses" in ask_for("cpu", kv_cache_dtype="fp8")["problems"][0]["what"]


@pytest.mark.parametrize("gpu, wanted", [
    ("cpu", "16-bit"), ("sm_80", "16-bit"), ("sm_90", "16-bit"), ("sm_100", "16-bit"),
])  # fmt: skip
def test_stock_w4a4_is_w4a16_in_vllm(stock, run, gpu, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = stock(wide=True)
    status, out, err = run("doctor", folder, "--target", "vllm", "--gpu", gpu, "--json")
    found = json.loads(out.splitlines()[-1])
    assert status == 1 and {row["inputs"]["real"] for row in found["groups"]} == {wanted}
    assert {row["inputs"]["promised"] for row in found["groups"]} == {"int4 per token"}
    assert ("mixed_precision" in err) == (gpu == "sm_80")
    if gpu == "sm_80":
        assert phasequant.doctor(folder, target="vllm", gpu=gpu, linear_backend="humming")["as_promised"]
    if gpu == "sm_90":  # no flag gives it there, and none is said to
        assert (
            "no flag of vLLM's"
            in phasequant.doctor(folder, target="vllm", gpu=gpu, linear_backend="humming")["problems"][0]["do"]
        )
        found = phasequant.doctor(folder, target="vllm", gpu=gpu, linear_backend={"mixed_precision": "humming"})
        assert {row["inputs"]["real"] for row in found["groups"]} == {"int8 per token"}


def test_stock_grids_that_vllm_keeps_and_those_it_does_not(stock):
    def inputs(weights, given, gpu, kind="pack-quantized", **flags):
        group = {"targets": ["Linear"], "weights": weights, "input_activations": given, "format": kind}
        found = phasequant.doctor(stock({"g": group}, wide=True), target="vllm", gpu=gpu, **flags)
        return {row["inputs"]["real"] for row in found["groups"]}, found

    assert inputs(W4, A8, "sm_90", linear_backend="humming")[1]["as_promised"]
    assert inputs(W4G, A8, "sm_90", linear_backend="humming")[0] == {"16-bit"}
    assert inputs(W4, None, "sm_90")[1]["as_promised"]
    eight = inputs(W4 | {"num_bits": 8}, A8, "sm_90", "int-quantized")[1]
    assert eight["as_promised"] and "Cutlass" in eight["groups"][0]["kernel"]
    broken = inputs(W4 | {"num_bits": 8}, A8, "sm_90", "int-quantized", linear_backend="humming")
    assert broken[0] == {"16-bit"} and "leave --linear-backend away" in broken[1]["problems"][0]["do"]
    mx = NVFP4 | {"strategy": "group", "group_size": 32}
    more = inputs(mx, None, "sm_100", "mxfp4-pack-quantized")
    assert more[0] == {"mxfp4"} and "marlin" in more[1]["problems"][0]["do"]  # rounded, and not declared
    local = NVFP4 | {"dynamic": "local"}
    assert inputs(NVFP4, local, "sm_90", "nvfp4-pack-quantized")[0] == {"16-bit"}
    assert inputs(NVFP4, local, "sm_100", "nvfp4-pack-quantized")[1]["as_promised"]
    assert inputs(NVFP4, local, "cpu", "nvfp4-pack-quantized")[0] == {"none"}


def test_stock_grids_that_vllm_does_not_load(stock):
    two = {
        "a": {"targets": ["re:.*q_proj$"], "weights": W4, "input_activations": A8},
        "b": {"targets": ["Linear"], "weights": W4},
    }
    fused = phasequant.doctor(stock(two, wide=True), target="vllm", gpu="sm_90")
    assert any("fuses" in p["what"] and "qkv" in p["where"] for p in fused["problems"])
    assert phasequant.doctor(stock(two, wide=True), gpu="cpu")["as_promised"]
    scheme = A4 | {"symmetric": False}
    kv = phasequant.doctor(stock(wide=True, kv_cache_scheme=scheme), target="vllm", gpu="sm_90")
    assert any("kv_cache_scheme" in p["what"] for p in kv["problems"])


def test_stock_transforms(stock):
    def transform(location, size=None):
        apply = [{"targets": ["re:.*down_proj$"], "location": location, "inverse": False, "ignore": []}]
        config = {"config_groups": {"R4": {"type": "hadamard", "head_dim": size, "apply": apply}}}
        groups = {"g": {"targets": ["Linear"], "weights": W4}}
        return stock(groups, wide=True, transform_config=config)

    def wrong(folder, **options):
        return [p["what"] for p in phasequant.doctor(folder, **options)["problems"] if p["where"] == "transforms"]

    assert not wrong(transform("input", 128), target="vllm", gpu="sm_90")
    assert "tensor" in wrong(transform("input", 128), target="vllm", gpu="sm_90", tensor_parallel=2)[0]
    assert "CPU" in wrong(transform("input", 128), target="vllm", gpu="cpu")[0]
    assert "powers of two" in wrong(transform("input", 96), target="vllm", gpu="sm_90")[0]
    assert "attention" in wrong(transform("k_cache", 64), target="vllm", gpu="sm_90")[0]
    assert "ignores" in wrong(transform("input", 128), gpu="cpu")[0]
    assert not wrong(transform("weight_input", 128), gpu="cpu")


def test_transformers_does_what_was_said(tmp_path, ids):
    """It rounds inputs as declared, and ignores transforms."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = make_model("llama-bias")
    groups = {"g": {"targets": ["Linear"], "weights": W4, "input_activations": A4, "format": "pack-quantized"}}
    wanted = QuantizationConfig.model_validate({"config_groups": groups, "ignore": ["lm_head"]})
    apply_quantization_config(model, wanted)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 7
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    path = tmp_path / "config.json"
    kept = json.loads(path.read_text())

    def logits(change):
        config = json.loads(json.dumps(kept))
        change(config["quantization_config"])
        path.write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits

    def without_inputs(quantization):
        for group in quantization["config_groups"].values():
            group["input_activations"] = None

    def with_transform(quantization):
        apply = [{"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []}]
        quantization["transform_config"] = {
            "config_groups": {"R4": {"type": "hadamard", "head_dim": 32, "apply": apply}}
        }

    plain = logits(lambda _: None)
    assert phasequant.doctor(tmp_path, gpu="cpu")["groups"][0]["inputs"]["real"] == "int4 per token"
    assert (logits(without_inputs) - plain).abs().max() > 0.1
    assert torch.equal(logits(with_transform), plain)
    assert not phasequant.doctor(tmp_path, gpu="cpu")["as_promised"]


def test_rules_follow_the_amx_of_a_cpu():
    asked = Question(W4, None, "pack-quantized", 4096, (4096,), "cpu")
    answer = vllm_rules.answer(asked)
    assert real(asked, answer)[1] == "16-bit"
    assert real(replace(asked, amx=True), answer)[1] == "int8 per token"


def test_asking_a_python_without_vllm(stock, run):
    status, _, err = run("doctor", stock(), "--target", "vllm", "--gpu", "sm_90", "--python", "/no/python")
    assert status == 2 and "--python" in err
    with pytest.raises(PhaseQuantError, match="could not be asked"):
        ask.answers([Question(W4, A4, "pack-quantized", 64, (64,), "sm_90")], "true")


@pytest.mark.parametrize("arguments, what", [
    (["--gpu", "h100"], "sm_90"), (["--target", "sglang"], "target"), (["--kv-cache-dtype", "fp8"], "--target vllm"),
    (["--target", "vllm", "--linear-backend", "mixed_precision="], "--linear-backend"),
    (["--target", "vllm", "--tensor-parallel-size", "0"], "tensor parallelism"), (["--target", "runtime"], "runtime"),
])  # fmt: skip
def test_mistakes_end_with_status_2(stock, run, arguments, what):
    status, _, err = run("doctor", stock(), *arguments)
    assert status == 2 and what in err


def test_a_model_that_promises_nothing(saved, run, tmp_path):
    assert run("doctor", saved())[0] == 2
    assert run("doctor", tmp_path / "nowhere")[0] == 2
