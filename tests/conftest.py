"""Tiny random models of every family, a byte-level tokenizer, and the embedded model where a test needs a real one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same numbers on every machine
os.environ.pop("PHASEQUANT_KERNEL", None)
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for a GPU on CPU tensors

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from phasequant import cli, console
from phasequant.arch import ModelMap
from phasequant.numerics import product
from phasequant.source import Source, wrap

product.multiplies_bfloat16 = lambda device: False  # the same numbers on every machine; test_numerics has the other way

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB = 258
if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["in_vllm"]  # `make test-vllm`

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}

NEOX = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
OPT = {name: value for name, value in COMMON.items() if name not in ("intermediate_size", "num_key_value_heads")}
OPT["ffn_dim"] = 96

CONFIGS = {
    "llama": LlamaConfig(**COMMON, head_dim=12, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**COMMON, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama-odd": LlamaConfig(
        **{**COMMON, "hidden_size": 54, "intermediate_size": 107, "num_attention_heads": 9, "num_key_value_heads": 3},
        head_dim=6,
        tie_word_embeddings=False,
    ),
    "llama-one": LlamaConfig(
        **{**COMMON, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 16},
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "llama-fp4": LlamaConfig(
        **{**COMMON, "hidden_size": 64, "intermediate_size": 128}, head_dim=16, tie_word_embeddings=False
    ),
    "mistral": MistralConfig(**COMMON, head_dim=12, sliding_window=16, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-sliding": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": Qwen3Config(**COMMON, head_dim=20, tie_word_embeddings=True),
    "gemma": GemmaConfig(**{**COMMON, "num_key_value_heads": 1}, head_dim=20, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=12, query_pre_attn_scalar=20, sliding_window=16, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, tie_word_embeddings=True,
    ),
    "gemma3": Gemma3TextConfig(
        **COMMON, head_dim=16, query_pre_attn_scalar=20, sliding_window=16, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "stablelm": StableLmConfig(**COMMON, partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm-parallel": StableLmConfig(
        **COMMON, partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True
    ),
    "phi": PhiConfig(**COMMON, partial_rotary_factor=0.5),
    "phi-norm": PhiConfig(**{**COMMON, "num_key_value_heads": None}, partial_rotary_factor=0.5, qk_layernorm=True),
    "opt": OPTConfig(**OPT),
    "opt-gelu": OPTConfig(**OPT, activation_function="gelu", enable_bias=False),
    "gpt_neox": GPTNeoXConfig(**NEOX, rotary_pct=0.5),
    "gpt_neox-serial": GPTNeoXConfig(**NEOX, rotary_pct=0.5, use_parallel_residual=False, attention_bias=False),
    "smollm3": SmolLM3Config(
        **COMMON, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=16, tie_word_embeddings=True
    ),
    "granite": GraniteConfig(
        **COMMON, embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=3.0,
        tie_word_embeddings=True,
    ),
    "olmo2": Olmo2Config(**COMMON),
    "phi3": Phi3Config(**COMMON, sliding_window=16, partial_rotary_factor=0.5),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, head_dim=20, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gpt_oss": GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, swiglu_limit=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


NEW = ("gemma", "gemma2", "gemma3", "stablelm", "stablelm-parallel", "phi", "phi-norm", "opt", "opt-gelu",
       "gpt_neox", "gpt_neox-serial", "mixtral", "smollm3", "granite", "olmo2", "phi3", "qwen2_moe", "qwen3_moe",
       "gpt_oss")  # fmt: skip
"""Families whose layout is not LLaMA's."""


def foldable(name: str) -> bool:
    """Whether a rotation of the residual stream can be folded into models of a family."""
    return ModelMap.from_config(CONFIGS[name]).unfoldable is None


def where(name: str) -> list[str]:
    """What a recipe that folds rotations must be told for a family in which they cannot be."""
    return [] if foldable(name) else ["rotation.where=online"]


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model whose norms, biases and embeddings are far from their trivial initial values."""
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in key:
                parameter.uniform_(0.2, 2.0).sub_(float(name.startswith("gemma")))  # Gemma's multiply by 1 + w
            elif "embed" in key:
                parameter.normal_(0, 1.0)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: any text, 256 tokens, plus begin and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(autouse=True)
def heard():
    """A test that asked for quiet leaves none behind."""
    yield
    console.set_quiet(False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh one for every test: some take its special tokens away."""
    return make_tokenizer()


@pytest.fixture
def tiny(tokenizer):
    """A function: family name → `Source` of a fresh tiny model."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Source:
        return wrap(name, make_model(name, dtype, seed), tokenizer)

    return make


@pytest.fixture
def saved(tiny, tmp_path):
    """A function: family name → directory of a saved tiny model with its tokenizer."""

    def make(name: str = "llama", **options) -> Path:
        source = tiny(name, **options)
        folder = tmp_path / f"model-{name}"
        source.model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Two random sequences."""
    return torch.randint(0, VOCAB - 2, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some English to calibrate and evaluate on."""
    from phasequant.text import builtin

    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(builtin("evaluation").text[:20000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def wikitext() -> tuple[Path, Path]:
    """(test, train) of WikiText-2, where this checkout has the shared data beside it."""
    test, train = SHARED / "wikitext2" / "test.txt", SHARED / "wikitext2" / "train-1MB.txt"
    if not test.is_file():
        pytest.skip("the shared WikiText-2 is not beside this checkout")
    return test, train


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: arguments → (status, stdout, stderr) of the command."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["phasequant", *map(str, arguments)])
        monkeypatch.setattr(console, "_quiet", False)
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call
