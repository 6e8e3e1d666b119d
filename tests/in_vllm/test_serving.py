"""Checkpoints in vLLM on a CPU: the same tokens as in Transformers, or a refusal."""

import gc
import json
import os
from contextlib import contextmanager

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # what the engine raises reaches the test
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import phasequant
from phasequant.checkpoint import manifest

COMMON = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257, "head_dim": 32,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "biased llama": LlamaConfig(**COMMON, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "qwen2": Qwen2Config(**{name: value for name, value in COMMON.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**COMMON),
}
PLAN = ["policy.name=budget", "policy.a8_share=0.3", "calibration.sequences=2", "calibration.seqlen=48"]
PREFIX = ["prefix.method=tokens", "prefix.tokens=[256, 104]"]
QUICK = ["learning.sequences=2", "learning.seqlen=32", "learning.epochs=1"]
WHOLE = [
    *QUICK, "weights.method=gptq", "weights.sequences=2", "weights.seqlen=32", "lowrank.method=svd", "lowrank.rank=4",
    "activations.token_policy=absmax", "activations.token_share=0.1",
]  # fmt: skip
RECIPES = {
    "quarot": ("quarot", [*PLAN, *PREFIX]),
    "no prefix": ("quarot", PLAN),
    "online": ("quarot-online", PLAN),
    "frtq": ("frtq", [*PLAN, *PREFIX]),
    "flat": ("flat", [*PLAN, *PREFIX, *QUICK]),
    "all of it": ("flat+wush", [*PLAN, *PREFIX, *WHOLE]),
    "static": ("smooth-static-w8a8", PLAN[2:]),
    "sixteen-bit KV": ("rtn", ["kv.bits=16", *PLAN[2:]]),
}
PROMPTS = [[104, 101, 108, 108, 111], [32] * 17, [49, 50], list(range(60, 110))]


def checkpoint(config, recipe, sets, tokenizer, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():  # spread logits: no ties
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    source = folder / "source"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    phasequant.quantize(str(source), recipe, overrides=sets).save(folder / "made")
    return folder / "made"


@contextmanager
def served(path, **options):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 192, **options}
    llm = None
    try:
        llm = LLM(model=str(path), disable_log_stats=True, **options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def greedy(llm, prompts, new):
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


@torch.no_grad()
def in_transformers(path, prompts, new, dtype=torch.float32):
    model = phasequant.load(path, dtype=dtype)
    found = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=257
        )
        found.append(out[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_give_the_tokens_of_transformers(recipe, tokenizer, tmp_path):
    path = checkpoint(FAMILIES["llama"], *RECIPES[recipe], tokenizer, tmp_path)
    with served(path) as llm:
        assert greedy(llm, PROMPTS, 24) == in_transformers(path, PROMPTS, 24)


@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_families_give_the_tokens_of_transformers(family, tokenizer, tmp_path):
    path = checkpoint(FAMILIES[family], *RECIPES["quarot"], tokenizer, tmp_path)
    with served(path) as llm:
        assert greedy(llm, PROMPTS, 16) == in_transformers(path, PROMPTS, 16)


@pytest.mark.parametrize("sets", [[], ["weights.granularity=group", "weights.group_size=16"]], ids=["channel", "group"])
def test_two_devices_compute_the_integers_of_one(sets, tokenizer, tmp_path):
    config = LlamaConfig(**{**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128})
    grids = ["activations.bits=8", "rotation.block=16", "activations.symmetric=" + ("false" if sets else "true")]
    path = checkpoint(config, "quarot-online", [*PLAN[2:], *PREFIX, *grids, *sets], tokenizer, tmp_path)
    want = in_transformers(path, PROMPTS, 12)
    with served(path, tensor_parallel_size=2) as llm:
        assert greedy(llm, PROMPTS, 12) == want


def test_prefix_caching_and_chunks_change_nothing(tokenizer, tmp_path):
    path = checkpoint(FAMILIES["llama"], *RECIPES["quarot"], tokenizer, tmp_path)
    long = [list(range(40, 140)), list(range(40, 120))]
    want = in_transformers(path, long, 8)
    with served(path, enable_prefix_caching=True) as llm:
        assert greedy(llm, long, 8) == want
        assert greedy(llm, long, 8) == want  # now from the cache
    with served(path, enable_prefix_caching=False, max_num_batched_tokens=192, enable_chunked_prefill=True) as llm:
        assert greedy(llm, long + PROMPTS, 8)[:2] == want


def test_text_prompts_and_their_length(tokenizer, tmp_path):
    from vllm import SamplingParams

    path = checkpoint(FAMILIES["llama"], *RECIPES["quarot"], tokenizer, tmp_path)
    with served(path) as llm:
        (found,) = llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert found.prompt_token_ids == [256, 104, *tokenizer("hello")["input_ids"]]
        with pytest.raises(ValueError, match="with this checkpoint's prefix of 2"):
            greedy(llm, [[97] * 191], 1)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"enforce_eager": False}, "enforce_eager"),
        ({"kv_cache_dtype": "fp8"}, "a second time"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
    ],
    ids=str,
)
def test_what_would_be_another_model_is_refused(options, match, tokenizer, tmp_path, capfd):
    path = checkpoint(FAMILIES["llama"], *RECIPES["quarot"], tokenizer, tmp_path)
    with pytest.raises(Exception) as raised, served(path, **options):
        pass
    told = capfd.readouterr()
    assert match in str(raised.value) + told.err + told.out


def _without_manifest(path, change):
    """Change a checkpoint's tensors and take its manifest away."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    (path / manifest.NAME).unlink()


def test_damage_is_found(tokenizer, tmp_path):
    path = checkpoint(FAMILIES["llama"], *RECIPES["no prefix"], tokenizer, tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Exception, match=r"SHA-256|not what was saved"), served(path):
        pass
    file.write_bytes(whole)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["layout"]["activations"]["base"]["clip"] = 0.5
    kept = (path / "config.json").read_text()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="config"), served(path):
        pass
    (path / "config.json").write_text(kept)
    _without_manifest(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(Exception, match="lacks 1 tensors"), served(path):
        pass
