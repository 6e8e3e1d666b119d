"""Stock checkpoints: the same codes, the same numbers in stock Transformers, and nothing lost without leave."""

import json
import re

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from conftest import CONFIGS, foldable
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import phasequant
from phasequant.checkpoint import manifest
from phasequant.errors import PhaseQuantError
from phasequant.export import folder as folder_of_exports
from phasequant.export import whole as whole_export
from phasequant.export.card import page
from phasequant.export.checks import check_shared, told
from phasequant.export.measure import peaks_of, stock_values
from phasequant.export.profiles import PROFILES, int_grid
from phasequant.export.requantize import FOLDED, ROTATIONS, folded
from phasequant.export.tensors import linear_tensors
from phasequant.nn import quant_linears
from phasequant.numerics import QuantSpec, fake_quantize, unpack
from phasequant.presets import presets
from phasequant.recipe import Recipe
from phasequant.source import open_model

BUDGET = ["policy.name=budget", "policy.score=noise", "policy.a8_share=0.4"]
STOCK = ["rotation.online=false", "kv.bits=16", f"activations.clip={14 / 15}", f"policy.clip={254 / 255}"]
GROUPED = ["weights.granularity=group", "weights.group_size=16"]
FAMILIES = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma")


@pytest.fixture
def checkpoint(tiny, text_file, tmp_path):
    """A function: family, preset, overrides → directory of a checkpoint."""

    def make(name="llama", preset="quarot", *overrides):
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        small = [f'calibration.text="{text_file}"', "calibration.sequences=2", "calibration.seqlen=48",
                 "learning.sequences=2", "learning.seqlen=48", "learning.steps=1"]  # fmt: skip
        phasequant.quantize(tiny(name), preset, overrides=[*small, *overrides], output=folder)
        return folder

    return make


@pytest.fixture
def export(text_file, tmp_path):
    """A function: checkpoint, profile → what `export` made, measured on a little text."""

    def make(folder, profile, **options):
        options = {"text": text_file, "chunks": 1, "seqlen": 96, **options}
        return phasequant.export(folder, tmp_path / f"{profile}-{folder.name}", profile, **options)

    return make


def config_of(made):
    return json.loads((made.folder / "config.json").read_text())["quantization_config"]


def agree(made):
    """Three digits, and more. FP4 weights Transformers rounds to bfloat16; `export` itself holds it to that."""
    figures = made.figures
    assert abs(figures["stock"] / figures["profile"] - 1) < (0.05 if "fp4" in made.profile else 5e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_codes_are_carried_over_and_stock_transformers_computes_what_was_measured(name, checkpoint, export):
    folder = checkpoint(name, "quarot", *STOCK, *BUDGET)
    made = export(folder, "ct-w4a4")
    agree(made)
    own, found = phasequant.load(folder), load_file(made.folder / "model.safetensors")
    for place, linear in quant_linears(own):
        codes = unpack(linear.weight_packed, linear.in_features, linear.weight_spec)
        shape = torch.Size(found[f"{place}.weight_shape"].tolist())
        assert torch.equal(unpack_from_int32(found[f"{place}.weight_packed"], 4, shape), codes)
        assert found[f"{place}.weight_scale"].dtype == torch.bfloat16
        assert torch.equal(found[f"{place}.weight_scale"].float(), linear.weight_scale)
        assert (f"{place}.bias" in found) == (linear.bias is not None)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in found
    assert "phasequant" not in json.dumps(config)
    assert not made.notes


def test_a_stock_model_generates(checkpoint, export):
    made = export(checkpoint("qwen2", "quarot", *STOCK), "ct-w4a8")
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_a_mixed_plan_becomes_groups_that_never_divide_fused_linears(checkpoint, export):
    made = export(checkpoint("llama", "quarot", *STOCK, *BUDGET), "ct-w4a4")
    config = config_of(made)
    assert config["format"] == "pack-quantized" and "kv_cache_scheme" not in config and "actorder" not in str(config)
    groups = QuantizationConfig(**config).config_groups.values()
    assert {group.input_activations.num_bits for group in groups} == {4, 8}
    assert all(group.format == "pack-quantized" for group in groups)
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in range(3):
            part = "self_attn" if "q_proj" in fused else "mlp"
            names = [f"model.layers.{block}.{part}.{one}" for one in fused]
            matched = [
                [target for group in groups for target in group.targets if re.match(target.removeprefix("re:"), name)]
                for name in names
            ]
            assert all(len(one) == 1 for one in matched) and len({*map(tuple, matched)}) == 1


def test_plans_of_single_groups(checkpoint, export, tiny, tmp_path):
    folder = checkpoint("llama", "quarot", *STOCK)
    plan = json.loads((folder / "plan.json").read_text())
    plan["raised"] = {"0.down": {"bits": 8, "clip": 1.0}, "1.qkv": {"bits": 16}, "2.o": {"bits": 6}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    recipe = Recipe.load(folder / "recipe.yaml")
    mixed = tmp_path / "mixed"
    phasequant.quantize(tiny("llama"), recipe, plan=tmp_path / "plan.json", output=mixed)
    made = export(mixed, "ct-w4a4")
    agree(made)
    groups = config_of(made)["config_groups"].values()
    by_bits = {(group.get("input_activations") or {"num_bits": 16})["num_bits"]: group["targets"] for group in groups}
    assert by_bits[8] == [r"re:.*layers\.(2)\.(self_attn\.o_proj)$", r"re:.*layers\.(0)\.(mlp\.down_proj)$"]
    assert by_bits[16] == [r"re:.*layers\.(1)\.(self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj)$"]
    assert any("int6 → int8: o of block 2" in note for note in made.notes)


@pytest.mark.parametrize("profile", ["ct-w4a16", "ct-w4a8", "ct-w4a4"])
def test_what_runs_online_is_refused_by_name_and_nothing_is_written(profile, checkpoint, export, tmp_path):
    folder = checkpoint("llama", "quarot")
    with pytest.raises(PhaseQuantError) as refused:
        export(folder, profile, allow=["grid", "prefix"])
    message = str(refused.value)
    assert "inputs of o: the mixing of heads" in message and "inputs of down: R4" in message
    assert "--requantize" in message and "--allow grid" not in message
    assert not (tmp_path / f"{profile}-{folder.name}").exists()


def test_branches_and_other_weights_are_refused(checkpoint, export):
    with pytest.raises(PhaseQuantError, match="low-rank branches of"):
        export(checkpoint("llama", "rtn", "lowrank.method=svd", "lowrank.rank=4", "lowrank.weighting=none"), "ct-w4a16")
    with pytest.raises(PhaseQuantError, match="weights have 3 bits"):
        export(checkpoint("llama", "rtn", "weights.bits=3"), "ct-w4a16")
    with pytest.raises(PhaseQuantError, match="zero points, which vLLM refuses"):
        export(checkpoint("llama", "rtn", "weights.symmetric=false"), "ct-w4a8")
    with pytest.raises(PhaseQuantError, match="weights are int, and ct-mxfp4 holds mxfp4"):
        export(checkpoint("llama", "rtn"), "ct-mxfp4")
    with pytest.raises(PhaseQuantError, match="in 16 bits: there are no codes"):
        export(checkpoint("llama", "rtn", "weights.bits=16"), "ct-w4a16")
    with pytest.raises(PhaseQuantError, match="has experts"):
        export(checkpoint("mixtral", "rtn"), "ct-w4a16")
    with pytest.raises(PhaseQuantError, match="no group of this checkpoint reads"):
        export(checkpoint("llama", "rtn", "activations.bits=8", "activations.clip=1.0"), "ct-w4a4")


def test_another_grid_of_inputs_needs_leave_and_a_finer_one_does_not(checkpoint, export):
    folder = checkpoint("llama", "rtn")
    with pytest.raises(PhaseQuantError, match=r"clipped at 0.9 .*\n.*\n  --allow grid: reads"):
        export(folder, "ct-w4a4")
    made = export(folder, "ct-w4a4", allow=["grid"])
    agree(made)
    assert made.notes[0].startswith("let go (grid): inputs of qkv; o; gate_up; down")
    finer = export(folder, "ct-w4a8")
    agree(finer)
    assert any(note.startswith("inputs in more bits, int4 → int8") for note in finer.notes)
    weights = export(folder, "ct-w4a16")
    agree(weights)
    assert weights.figures["profile"] == made.figures["weights_alone"]
    kv = [note for note in weights.notes if "int4_per_token_head" in note]
    assert len(kv) == 1 and "no accuracy is lost" in kv[0]
    with pytest.raises(PhaseQuantError, match="prefix"):
        export(folder, "ct-w4a4", allow=["prefx"])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["activations.symmetric=false"], "zero point"),
        (["activations.token_policy=absmax"], "single rows of them"),
        (["activations.granularity=tensor", "activations.clip=1.0"], "one scale a tensor"),
        (["activations.granularity=tensor", "activations.scales=static", "activations.clip=1.0"], "was calibrated"),
    ],
)
def test_why_a_grid_needs_leave(overrides, why, checkpoint, export):
    folder = checkpoint("llama", "rtn", *overrides)
    with pytest.raises(PhaseQuantError, match=why):
        export(folder, "ct-w4a4")
    agree(export(folder, "ct-w4a4", allow=["grid"]))


def test_a_prefix_needs_leave_and_is_named_on_the_page(checkpoint, export):
    folder = checkpoint("llama", "rtn", "prefix.method=tokens", "prefix.tokens=[7, 9]", "activations.bits=16")
    with pytest.raises(PhaseQuantError, match=r"the prefix \(tokens 7, 9\)"):
        export(folder, "ct-w4a16")
    made = export(folder, "ct-w4a16", allow=["prefix"])
    agree(made)
    assert made.figures["checkpoint"] != made.figures["profile"]
    assert "token ids 7, 9 before every prompt" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("overrides", [["weights.symmetric=false"], GROUPED, [*GROUPED, "weights.symmetric=false"]])
def test_zero_points_and_groups(overrides, checkpoint, export):
    made = export(checkpoint("qwen3", "smooth", *overrides), "ct-w4a16")
    agree(made)
    weights = config_of(made)["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == ("group" if "weights.group_size=16" in overrides else "channel")
    assert config_of(made)["config_groups"]["group_0"]["targets"] == ["Linear"]
    config = json.loads((made.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True  # scales alone leave them tied


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4(kind, checkpoint, export):
    preset = [f"weights.format={kind}", f"activations.format={kind}", "activations.clip=1.0", "kv.bits=16"]
    folder = checkpoint("llama-fp4", "quarot", "rotation.online=false", *preset)
    made = export(folder, f"ct-{kind}")
    agree(made)
    assert made.groups == [f"weights {kind} per group of {16 if kind == 'nvfp4' else 32}, inputs {kind}: qkv; o; "
                           "gate_up; down"]  # fmt: skip
    found = load_file(made.folder / "model.safetensors")
    at = "model.layers.1.self_attn."
    assert found[f"{at}q_proj.weight_packed"].dtype == torch.uint8
    if kind == "nvfp4":
        for second in ("weight_global_scale", "input_global_scale"):
            assert len({found[f"{at}{one}.{second}"].item() for one in ("q_proj", "k_proj", "v_proj")}) == 1
        scheme = QuantizationConfig(**config_of(made)).config_groups["group_0"]
        state = {k.removeprefix(f"{at}q_proj."): v for k, v in found.items() if k.startswith(f"{at}q_proj.")}
        theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        own = phasequant.load(folder).get_submodule(f"{at}q_proj").dense_weight()
        assert torch.equal(theirs, own.to(theirs.dtype))  # bfloat16


def test_raised_groups_beside_fp4_are_in_16_bits(checkpoint, export):
    folder = checkpoint("llama-fp4", "quarot", "rotation.online=false", "weights.format=mxfp4", "kv.bits=16",
                        "activations.format=mxfp4", "activations.clip=1.0")  # fmt: skip
    made = export(folder, "ct-mxfp4", requantize=False)
    source = open_model(folder)
    config = source.model.config.quantization_config.layout
    assert config["activations"]["base"]["kind"] == "mxfp4"
    assert len(config_of(made)["config_groups"]) == 1
    assert PROFILES["ct-mxfp4"].reads(QuantSpec.floating("fp8")) is None


@pytest.mark.parametrize("profile", PROFILES)
def test_requantized_exports_hold_all_of_their_recipe(profile, saved, text_file, tmp_path, export):
    folder = saved("llama-fp4")
    small = [f'calibration.text="{text_file}"', "calibration.sequences=2", "calibration.seqlen=48"]
    phasequant.quantize(
        str(folder), "quarot", overrides=[*small, *BUDGET, "prefix.method=bos"], output=tmp_path / "made"
    )
    made = export(tmp_path / "made", profile, requantize=True)
    agree(made)
    assert made.notes[0].startswith("quantized again")
    recipe = Recipe.load(made.folder / "recipe.yaml")
    assert not recipe.rotation.online and recipe.kv.bits == 16 and recipe.prefix.method == "none"
    if profile == "ct-w4a4":
        assert abs(recipe.activations.clip - 14 / 15) < 1e-9 and abs(recipe.policy.clip - 254 / 255) < 1e-9
    for name in ("README.md", "export.json", "config.json"):
        assert str(tmp_path) not in (made.folder / name).read_text()


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("profile", PROFILES)
def test_every_preset_has_a_folded_form_or_says_why_not(preset, profile):
    recipe = Recipe.load(preset)
    if recipe.transform.method not in (*ROTATIONS, *FOLDED):
        with pytest.raises(PhaseQuantError, match="no folded form: name the recipe"):
            folded(recipe, PROFILES[profile])
        return
    if recipe.transform.method == "spin" and PROFILES[profile].kind != "int":
        with pytest.raises(PhaseQuantError, match="learns nothing through"):
            folded(recipe, PROFILES[profile])
        return
    found = folded(recipe, PROFILES[profile])
    assert found.weights.bits == 4 and found.kv.bits == 16 and found.lowrank.method == found.prefix.method == "none"
    assert found.rotation.where == "folded" and found.activations.bits == PROFILES[profile].bits
    assert found.transform == recipe.transform


@pytest.mark.parametrize("method", ROTATIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma"])
def test_rotations_with_nothing_online_keep_logits(method, name, tiny, text_file, ids):
    assert foldable(name)
    recipe = Recipe.from_dict(
        {
            "transform": {"method": method},
            "rotation": {"online": False, "iterations": 3, "preconditioning": 3, "down": "learned"},
            "learning": {"sequences": 2, "seqlen": 24, "batch": 1, "steps": 1},
            "calibration": {"text": str(text_file)},
            "storage": {"dtype": "float32"},
        }
    )
    source = tiny(name)
    with torch.no_grad():
        before = source.model(input_ids=ids, use_cache=False).logits
    run = phasequant.quantize(source, recipe)
    with torch.no_grad():
        after = run.model(input_ids=ids, use_cache=False).logits
    assert run.transform.online_macs(source.map) == 0
    assert all(linear.online is None for _, linear in quant_linears(run.model))
    assert run.transform.residual is not None and run.transform.block(0).value is not None
    assert (after - before).norm() < 2e-5 * before.norm()


@pytest.mark.parametrize("sets", [["transform.method=smooth"], ["transform.method=quarot", "rotation.where=online"]])
def test_online_false_is_of_folded_rotations(sets):
    with pytest.raises(PhaseQuantError, match=r"rotation.online=false leaves folded rotations alone"):
        Recipe.load("16bit", [*sets, "rotation.online=false"])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_of_a_profile_is_ours_but_for_the_tie(bits):
    x = torch.randn(200, 64)
    spec = int_grid(bits)
    ours, stock = fake_quantize(x, spec), stock_values(x, spec)
    differs = ~torch.isclose(ours, stock, rtol=1e-5, atol=0)
    assert (x.abs()[differs] == x.abs().amax(-1, keepdim=True).expand_as(x)[differs]).all()
    assert differs.sum() <= 200
    assert torch.equal(stock_values(torch.zeros(2, 4), spec), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_in_stock_transformers_is_ours_with_weights_in_bfloat16(kind, checkpoint, export, monkeypatch):
    held = []
    monkeypatch.setattr(whole_export, "check_agreement", lambda ours, stock: held.append((ours, stock)))
    folder = checkpoint("llama-fp4", "quarot", "rotation.online=false", f"weights.format={kind}", "kv.bits=16",
                        f"activations.format={kind}", "activations.clip=1.0")  # fmt: skip
    export(folder, f"ct-{kind}")
    ((ours, stock),) = held
    assert abs(stock / ours - 1) < 5e-4


def test_scales_that_no_16_bits_hold_are_stored_wider(checkpoint):
    model = phasequant.load(checkpoint("llama", "rtn"))
    _, linear = quant_linears(model)[0]
    assert linear_tensors(linear, torch.bfloat16)["weight_scale"].dtype == torch.bfloat16
    linear.weight_scale = linear.weight_scale * 1.001
    assert linear_tensors(linear, torch.bfloat16)["weight_scale"].dtype == torch.float32


def test_second_scales_that_differ_among_fused_linears_are_refused(checkpoint):
    folder = checkpoint("llama-fp4", "quarot", "rotation.online=false", "weights.format=nvfp4", "kv.bits=16",
                        "activations.format=nvfp4", "activations.clip=1.0")  # fmt: skip
    source = open_model(folder)
    check_shared(source.model, source.map)
    source.model.get_submodule("model.layers.1.self_attn.k_proj").weight_global.mul_(2)
    with pytest.raises(PhaseQuantError, match="qkv in block 1 have 2 second scales"):
        check_shared(source.model, source.map)


def test_peaks_are_of_what_enters(checkpoint, ids):
    source = open_model(checkpoint("llama", "rtn"))
    found = peaks_of(source.model, source.map, ids[:1])
    seen = []
    first = source.model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().amax().item()))
    with torch.no_grad():
        source.model(input_ids=ids[:1], use_cache=False)
    hook.remove()
    assert found[0, "qkv"] == seen[0] and len(found) == 12


def test_an_export_replaces_an_earlier_one_and_nothing_else(checkpoint, export, tmp_path):
    folder = checkpoint("llama", "rtn")
    made = export(folder, "ct-w4a16", chunks=0)
    assert made.figures == {} and "not measured" in (made.folder / "README.md").read_text()
    assert export(folder, "ct-w4a16", chunks=0).folder == made.folder
    (made.folder / "mine.txt").write_text("x")
    with pytest.raises(PhaseQuantError, match="holds other files"):
        export(folder, "ct-w4a16", chunks=0)
    with pytest.raises(PhaseQuantError, match="is not a PhaseQuant checkpoint"):
        phasequant.export(made.folder, tmp_path / "other")
    with pytest.raises(PhaseQuantError, match="they go with --requantize"):
        phasequant.export(folder, tmp_path / "other", recipe="quarot")
    with pytest.raises(PhaseQuantError, match="no profile 'ct-w4a5'"):
        phasequant.export(folder, tmp_path / "other", "ct-w4a5")


def test_what_stock_transformers_computes_otherwise_is_not_written(checkpoint, export, tmp_path, monkeypatch):
    folder = checkpoint("llama", "quarot", *STOCK)

    def wrong(linear, stored, peak=None):
        made = linear_tensors(linear, stored, peak)
        return {**made, "weight_scale": made["weight_scale"] * 1.5}

    monkeypatch.setattr(folder_of_exports, "linear_tensors", wrong)
    with pytest.raises(PhaseQuantError, match="nothing was written"):
        export(folder, "ct-w4a4")
    assert not (tmp_path / f"ct-w4a4-{folder.name}").exists()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_page_says_how_to_serve(profile):
    text = page(PROFILES[profile], "some", "demo", {}, [], ["all"], False, ())
    assert ("--linear-backend humming" in text) == (profile in ("ct-w4a8", "ct-w4a4"))
    assert "vllm serve some" in text and "int4_per_token_head" in text
    assert ("silently runs W4A16" in text) == (profile in ("ct-w4a8", "ct-w4a4"))


def test_blocks_are_told_in_runs(tiny):
    places = [(0, "qkv"), (1, "qkv"), (2, "qkv"), (0, "o"), (2, "o"), (1, "down")]
    assert told(places, tiny("llama").map) == "qkv; o of blocks 0, 2; down of block 1"


def test_command(run, checkpoint, text_file, tmp_path):
    folder = checkpoint("llama", "quarot")
    status, _, err = run("export", folder, "-o", tmp_path / "out", "-p", "ct-w4a4", "--chunks", 1, "--seqlen", 64)
    assert status == 2 and "--requantize" in err and "R4" in err
    plain = checkpoint("llama", "rtn")
    status, out, _ = run(
        "export", plain, "-o", tmp_path / "out", "-p", "ct-w4a4", "--allow", "grid", "--text", text_file,
        "--chunks", 1, "--seqlen", 64, "--json",
    )  # fmt: skip
    assert status == 0
    assert json.loads(out.splitlines()[-1])["figures"]["chunks"] == 1
    assert "perplexity: checkpoint" in out
    status, _, err = run("export", folder, "-o", tmp_path / "out2", "--requantize", "--chunks", 0)
    assert status == 2 and manifest.read(folder)["source"] in err  # "llama": a model in memory has no place of its own


def test_configs_that_are_tested_exist():
    assert set(FAMILIES) <= set(CONFIGS)
