"""Shapes of well-known models by name, so that they can be timed without their weights."""

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from phasequant.errors import PhaseQuantError, did_you_mean


def _llama(width: int, ffn: int, heads: int, kv_heads: int, blocks: int, vocab: int, **more: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=blocks, vocab_size=vocab, max_position_embeddings=2**18, tie_word_embeddings=False, **more,
    )  # fmt: skip


def _qwen3(width: int, ffn: int, heads: int, kv_heads: int, blocks: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        num_hidden_layers=blocks, vocab_size=151936, max_position_embeddings=2**18, tie_word_embeddings=False,
    )  # fmt: skip


SHAPES = {
    "llama-2-7b": lambda: _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": lambda: _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": lambda: _llama(8192, 28672, 64, 8, 80, 32000),
    "llama-3-8b": lambda: _llama(4096, 14336, 32, 8, 32, 128256),
    "llama-3-70b": lambda: _llama(8192, 28672, 64, 8, 80, 128256),
    "mistral-7b": lambda: _llama(4096, 14336, 32, 8, 32, 32000),
    "qwen3-8b": lambda: _qwen3(4096, 12288, 32, 8, 36),
    "qwen3-14b": lambda: _qwen3(5120, 17408, 40, 8, 40),
    "smollm2-135m": lambda: _llama(576, 1536, 9, 3, 30, 49152),
}


def shape_of(name: str, blocks: int | None = None) -> PretrainedConfig:
    """The config of a shape by name, or of a model's directory; `blocks`: as many instead of its own."""
    name = "smollm2-135m" if name == "demo" else name
    if name in SHAPES:
        config: PretrainedConfig = SHAPES[name]()
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise PhaseQuantError(f"no shape or model called '{name}': {did_you_mean(name, SHAPES)}") from error
    if blocks is not None:
        config.num_hidden_layers = blocks
    return config
