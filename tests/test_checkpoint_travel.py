"""Checkpoints in other hands: processes that did not import phasequant, Transformers' own ways, the Hub, damage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, make_model, make_tokenizer, where
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.quantizers import auto

import phasequant
from phasequant import pipeline
from phasequant.checkpoint import manifest, native, read_plan
from phasequant.checkpoint.hf import FORMAT
from phasequant.checkpoint.seal import layout_hash, seal_name
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe
from phasequant.source import wrap

SMALL = ["calibration.sequences=2", "calibration.seqlen=32"]
PLAN = ["policy.name=budget", "policy.a8_share=0.3"]  # some groups of every kind
FILES = ("config.json", "generation_config.json", "model.safetensors", "phasequant_shim.py")


def quantized(name="llama", *sets, recipe="quarot"):
    source = wrap(name, make_model(name), make_tokenizer())
    return pipeline.run(source, Recipe.load(recipe, [*SMALL, *where(name), *sets]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and the folder that it was saved to; not to be changed."""
    run = quantized("llama", *PLAN)
    return run, run.save(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _sign(folder):
    """A manifest that fits what is there: what somebody would do who swaps files together with it."""
    content = manifest.read(folder)
    content.pop("files")
    manifest.write(folder, content)


def _retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _script(text, *arguments):
    found = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    return found.returncode, found.stdout, found.stderr


# --- without the import -------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten(monkeypatch):
    """Transformers as it is before phasequant is imported."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "phasequant")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "phasequant")


@pytest.mark.parametrize("name", CONFIGS)
def test_no_family_loads_without_us(name, tmp_path, forgotten):
    run = quantized(name, "weights.clip=1.0")
    run.save(tmp_path / "out")
    run.model.save_pretrained(tmp_path / "own")
    for folder in ("out", "own"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}], ids=str
)
def test_no_option_loads_it_without_us(options, made, forgotten):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(made[1], **options)


def test_offloaded_to_disk_without_us_it_fails_when_it_runs(made, forgotten, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(
        made[1], device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(ValueError, match="shape"):
        model(input_ids=ids)


FRESH = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import torch
ids = torch.load(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded")
except RuntimeError as error:
    print("refused:", error)
assert "phasequant" not in sys.modules
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(config).__module__, type(config).__name__)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
for path in (sys.argv[1], sys.argv[3]):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    torch.save(model(input_ids=ids, use_cache=False).logits, path + ".logits")
model.save_pretrained(sys.argv[1] + ".again")
again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + ".again", trust_remote_code=True)
assert torch.equal(again(input_ids=ids, use_cache=False).logits, torch.load(path + ".logits"))
"""


def test_a_fresh_process_loads_it_by_trust_remote_code_alone(made, folder, tmp_path, ids, monkeypatch):
    run = made[0]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run.model.save_pretrained(tmp_path / "own")
    torch.save(ids, tmp_path / "ids")
    status, out, err = _script(FRESH, folder, tmp_path / "ids", tmp_path / "own")
    assert status == 0, err
    assert out.splitlines()[0].startswith("refused:") and "Unknown quantization type, got phasequant" in err
    assert out.splitlines()[1] == "transformers.models.llama.configuration_llama LlamaConfig"
    before = run.model(input_ids=ids, use_cache=False).logits
    for path in (folder, tmp_path / "own"):
        assert torch.equal(torch.load(f"{path}.logits"), before)
    assert sorted(p.name for p in (tmp_path / "copy.again").iterdir()) == sorted(FILES)


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "phasequant":
            raise ModuleNotFoundError("No module named 'phasequant'", name="phasequant")
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM
for trusted in (None, True):
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trusted)
        print("loaded")
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_where_phasequant_is_not_installed_the_shim_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    status, out, err = _script(BLOCKED, made[1])
    assert status == 0, err
    plain, trusted = out.splitlines()
    assert plain.startswith("RuntimeError")
    assert trusted.startswith("ImportError") and "pip install phasequant" in trusted


# --- with it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-gelu", "mixtral", "gemma3"])
def test_saving_again_gives_the_same_bytes(name, tmp_path):
    run = quantized(name, "policy.name=paper")
    one = run.save(tmp_path / "one")
    content = manifest.read(one)
    for key in ("files", "format", "versions"):
        content.pop(key)
    for load in (phasequant.load, lambda path: AutoModelForCausalLM.from_pretrained(path)):
        model = load(one)
        plan, recipe = read_plan(one, run.map), Recipe.load(one / "recipe.yaml")
        two = native.save(tmp_path / "two", model, AutoTokenizer.from_pretrained(one), recipe, plan, content)
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
        for path in one.iterdir():
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_save_pretrained_again_gives_the_same_bytes(made, tmp_path):
    phasequant.load(made[1]).save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    AutoModelForCausalLM.from_pretrained(made[1]).save_pretrained(tmp_path / "native")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
        assert (tmp_path / "native" / name).read_bytes() == (made[1] / name).read_bytes(), name


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_maps_and_shards(device_map, made, tmp_path, ids):
    run = made[0]
    run.model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    before = run.model(input_ids=ids, use_cache=False).logits
    for path in (made[1], tmp_path / "sharded"):
        model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, dtype=torch.float32)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert torch.equal(phasequant.load(tmp_path / "sharded", verify=False)(ids, use_cache=False).logits, before)


def test_a_lost_shard_and_a_damaged_index(made, tmp_path):
    sharded = tmp_path / "sharded"
    made[0].model.save_pretrained(sharded, max_shard_size="30KB")
    for name in ("plan.json", "recipe.yaml", "manifest.json"):
        shutil.copy(made[1] / name, sharded)
    _sign(sharded)
    assert phasequant.load(sharded) is not None
    index, shard = sharded / "model.safetensors.index.json", sorted(sharded.glob("*.safetensors"))[1]
    kept, bytes_kept = index.read_text(), shard.read_bytes()

    def refused(match):
        with pytest.raises(PhaseQuantError):
            phasequant.load(sharded)
        with pytest.raises(PhaseQuantError, match=match):
            phasequant.load(sharded, verify=False)

    shard.unlink()
    refused(shard.name)
    with pytest.raises(PhaseQuantError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(sharded)
    shard.write_bytes(bytes_kept)
    for text in (kept[: len(kept) // 2], "{}", kept.replace(shard.name, sorted(sharded.glob("*.safetensors"))[0].name)):
        index.write_text(text)
        refused(".")
        with pytest.raises(Exception, match=r".") as found:
            AutoModelForCausalLM.from_pretrained(sharded)
        assert not isinstance(found.value, AssertionError)


def test_the_model_object_is_let_go_without_the_collector(made):
    import gc
    import weakref

    model = phasequant.load(made[1])
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(model)
        del model
        assert seen() is None
    finally:
        gc.enable()


# --- damage, by either door ---------------------------------------------------------------------------------------


def _lose(tensors):
    tensors.pop("model.norm.weight")


def _bend(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def _add(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_extra"] = torch.zeros(3)


def _retype(tensors):
    key = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[key] = tensors[key].to(torch.float16)


def _unseal(tensors):
    tensors.pop("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, r"missing keys, first 'model\.norm\.weight'"),
        (_bend, r"'model\.norm\.weight' .* has shape \(47,\)"),
        (_add, "unexpected keys.*weight_extra"),
        (_retype, "weight_scale.*is of type F16"),
        (_unseal, "lack their seal"),
    ],
)
def test_tensors_that_do_not_fit(change, message, folder):
    _retensor(folder, change)
    for load in (phasequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PhaseQuantError, match=r"cut short|edited"):
            load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(PhaseQuantError, match=message):
        phasequant.load(folder, verify=False)
    for options in ({}, {"device_map": "auto"}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(PhaseQuantError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_flipped_bit_and_a_cut_by_either_door(folder):
    path = folder / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-9] + bytes([kept[-9] ^ 4]) + kept[-8:])
    for load in (phasequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PhaseQuantError, match="SHA-256 differs"):
            load(folder)
    path.write_bytes(kept[:-100])
    with pytest.raises(PhaseQuantError, match="cut short"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(PhaseQuantError, match="cannot be read"):
        phasequant.load(folder, verify=False)


def test_files_of_another_plan(folder, tmp_path):
    """Of the same model: every tensor has the same name and shape."""
    other = quantized("llama", "policy.name=uniform").save(tmp_path / "other")
    shutil.copy(other / "config.json", folder)
    for load in (phasequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PhaseQuantError, match=r"SHA-256 differs|cut short"):
            load(folder)
    _sign(folder)
    for load in (phasequant.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PhaseQuantError, match="of another plan"):
            load(folder)


@pytest.mark.parametrize(
    ("sets", "part"),
    [
        (["policy.name=uniform"], "activations"),
        ([*PLAN, "activations.clip=0.8"], "activations"),
        ([*PLAN, "weights.symmetric=false"], "weights"),
        ([*PLAN, "kv.bits=8"], "kv"),
    ],
)
def test_a_plan_of_another_checkpoint(sets, part, folder, tmp_path):
    other = quantized("llama", *sets).save(tmp_path / "other")
    shutil.copy(other / "plan.json", folder)
    with pytest.raises(PhaseQuantError, match=r"cut short|SHA-256"):
        phasequant.load(folder)
    _sign(folder)
    with pytest.raises(PhaseQuantError, match=f"gives other {part} than"):
        phasequant.load(folder)


def test_newer_formats_name_the_version_that_wrote_them(folder):
    def newer(values):
        values["quantization_config"]["format"] = FORMAT + 1

    _edit(folder / "config.json", newer)
    _edit(folder / "manifest.json", lambda m: m["versions"].update(phasequant="9.8.7"))
    _sign(folder)
    with pytest.raises(PhaseQuantError, match=r"format 8.*install phasequant 9\.8\.7"):
        phasequant.load(folder)
    with pytest.raises(PhaseQuantError, match=r"format 8, and this phasequant reads formats 2 to 7"):
        AutoModelForCausalLM.from_pretrained(folder)
    _edit(folder / "manifest.json", lambda m: m.update(format=2))
    with pytest.raises(PhaseQuantError, match=r"manifest\.json has format 2.*9\.8\.7"):
        phasequant.load(folder)


def test_a_checkpoint_without_a_seal_of_format_5_still_loads(made, folder, ids):
    """And its tensors are still held against its config."""
    _retensor(folder, _unseal)
    _edit(folder / "config.json", lambda c: c["quantization_config"].update(format=5))
    _sign(folder)
    model = phasequant.load(folder)
    assert torch.equal(model(ids, use_cache=False).logits, made[0].model(ids, use_cache=False).logits)
    model.save_pretrained(folder.parent / "again")
    block = json.loads((folder.parent / "again" / "config.json").read_text())["quantization_config"]
    assert block["format"] == FORMAT and phasequant.load(folder.parent / "again", verify=False) is not None
    _edit(folder / "config.json", lambda c: c["quantization_config"]["layout"]["weights"].update(bits=8))
    with pytest.raises(PhaseQuantError, match="has shape"):
        phasequant.load(folder, verify=False)


def test_the_seal_is_the_hash_of_the_layout(made):
    run, path = made
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    seal = load_file(path / "model.safetensors")[seal_name(run.map)]
    assert bytes(seal.tolist()).hex() == layout_hash(block["layout"], block["dtype"], block["architecture"])
    clips = block["layout"]["activations"]["clips"]
    clips[min(clips)] -= 1e-9
    assert bytes(seal.tolist()).hex() != layout_hash(block["layout"], block["dtype"], block["architecture"])


# --- the card and the Hub -----------------------------------------------------------------------------------------


def _front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_tells_the_runs_own_figures(tmp_path, text_file):
    run = quantized("llama", "policy.name=paper")
    assert "perplexity" not in (run.save(tmp_path / "bare") / "README.md").read_text()
    found = phasequant.evaluate(run, text=text_file, chunks=2, seqlen=64)
    run.origin["source"] = "someone/Tiny-1B"
    card = (run.save(tmp_path / "out") / "README.md").read_text()
    assert f"| {found['ppl']:.3f} |" in card and "2 chunks of 64 tokens" in card
    assert f"{100 * run.plan.a8_share:.1f} %" in card and "`quarot`" in card and str(tmp_path) not in card
    assert card.index("import phasequant") < card.index("from transformers import")
    front = _front(card)
    assert front["base_model"] == "someone/Tiny-1B" and front["base_model_relation"] == "quantized"
    assert "w4a4kv4" in front["tags"] and "license" not in front
    (tmp_path / "out" / "README.md").write_text("edited, as a card may be")
    assert phasequant.load(tmp_path / "out") is not None
    run.save(tmp_path / "out")  # still an earlier result of ours
    assert (tmp_path / "out" / "README.md").read_text() == card


def test_the_card_takes_a_licence_from_the_sources_own(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\nwords")
    run = quantized()
    run.origin["source"] = str(tmp_path / "source")
    card = (run.save(tmp_path / "out") / "README.md").read_text()
    assert _front(card)["license"] == "mit" and "base_model" not in _front(card) and str(tmp_path) not in card
    run.origin["source"] = "demo"
    card = (run.save(tmp_path / "out") / "README.md").read_text()
    assert _front(card)["license"] == "apache-2.0" and _front(card)["base_model"].endswith("SmolLM2-135M-Instruct")


class Hub:
    """What would have been uploaded."""

    def __init__(self):
        self.made, self.files, self.options = [], {}, {}

    def create_repo(self, api, repo_id, **options):
        self.made.append((repo_id, options.get("private")))
        return type("Url", (), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})()

    def upload_folder(self, api, *, repo_id, folder_path, allow_patterns, **options):
        self.options = options
        self.files = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}

    def create_commit(self, api, repo_id, operations, **options):
        self.files = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}
        return type("Commit", (), {"commit_url": "url"})()


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    fake = Hub()
    for name in ("create_repo", "upload_folder", "create_commit"):
        method = getattr(fake, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, _m=method, **o: _m(api, *a, **o))
    return fake


def test_push_sends_what_the_manifest_names(folder, hub, run):
    (folder / "notes.txt").write_text("mine")
    assert phasequant.push(folder, "me/tiny", private=True) == "https://huggingface.co/me/tiny"
    assert hub.made == [("me/tiny", True)]
    assert set(hub.files) == {*manifest.read(folder)["files"], "manifest.json", "README.md"}
    assert "notes.txt" not in hub.files and "phasequant_shim.py" in hub.files
    assert hub.options["delete_patterns"]
    status, out, _ = run("push", folder, "tiny", "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["address"] == "https://huggingface.co/me/tiny"


def test_push_refuses_what_is_not_whole(folder, hub, run, monkeypatch):
    with pytest.raises(PhaseQuantError, match="no name of a repository"):
        phasequant.push(folder, "not a name")
    with pytest.raises(PhaseQuantError, match="does not exist"):
        phasequant.push(folder / "nowhere", "me/tiny")

    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "create_repo", offline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_repo", offline)
        with pytest.raises(PhaseQuantError, match=r"did not take.*no route"):
            phasequant.push(folder, "me/tiny")
    path = folder / "plan.json"
    path.write_text(path.read_text() + " ")
    status, _, err = run("push", folder, "me/tiny")
    assert status == 2 and "'plan.json'" in err and hub.files == {} and hub.made == []


def test_push_to_hub_of_the_model_itself(made, hub, tmp_path, ids, monkeypatch):
    from transformers.utils import hub as transformers_hub

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    monkeypatch.setattr(transformers_hub, "create_and_tag_model_card", lambda *args, **options: Card())
    made[0].model.push_to_hub("tiny")
    assert {*FILES, "README.md"} == set(hub.files)
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids, use_cache=False).logits, made[0].model(ids, use_cache=False).logits)


def test_the_config_is_of_its_own_class_with_and_without_trust(made, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for trusted in (False, True):
        config = AutoConfig.from_pretrained(made[1], trust_remote_code=trusted)
        assert type(config) is LlamaConfig and config.model_type == "llama" and LlamaConfig._auto_class is None
