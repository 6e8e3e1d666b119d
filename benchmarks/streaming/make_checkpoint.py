"""A random checkpoint of LLaMA-3-8B's shape, or of another depth and width, written block by block; with `--experts` a
Mixtral's, its experts one by one as on the Hub.

    python make_checkpoint.py OUT [--blocks 32] [--width 4096] [--ffn 14336] [--heads 32] [--kv-heads 8] [--vocab …]
                                  [--experts 8]

bfloat16 safetensors, a shard a block, and a byte-level tokenizer. One block is in memory at a time; weights are normal
with LLaMA's deviations, and seeded, so that two machines make the same files.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from phasequant.artifact import write_tensors

DTYPE = torch.bfloat16


def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, begin and end."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def make(folder: Path, config: LlamaConfig | MixtralConfig, experts: int) -> None:
    """Write the checkpoint; `experts`: 0 where the MLPs are dense."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=DTYPE).normal_(0, columns**-0.5, generator=generator)

    def gain() -> torch.Tensor:
        return torch.empty(config.hidden_size).uniform_(0.5, 1.5, generator=generator).to(DTYPE)

    width, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    count = config.num_hidden_layers + 2
    placed: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / name, tensors)
        placed.update(dict.fromkeys(tensors, name))

    shard(1, {"model.embed_tokens.weight": normal(config.vocab_size, width)})
    for index in range(config.num_hidden_layers):
        block = {
            "input_layernorm.weight": gain(),
            "self_attn.q_proj.weight": normal(queries, width),
            "self_attn.k_proj.weight": normal(keys, width),
            "self_attn.v_proj.weight": normal(keys, width),
            "self_attn.o_proj.weight": normal(width, queries),
            "post_attention_layernorm.weight": gain(),
        }
        if not experts:
            block["mlp.gate_proj.weight"] = normal(ffn, width)
            block["mlp.up_proj.weight"] = normal(ffn, width)
            block["mlp.down_proj.weight"] = normal(width, ffn)
        else:
            block["block_sparse_moe.gate.weight"] = normal(experts, width)
        for expert in range(experts):
            one = f"block_sparse_moe.experts.{expert}"
            block[f"{one}.w1.weight"] = normal(ffn, width)
            block[f"{one}.w3.weight"] = normal(ffn, width)
            block[f"{one}.w2.weight"] = normal(width, ffn)
        shard(index + 2, {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()})
        print(f"block {index}", flush=True)
    shard(count, {"model.norm.weight": gain(), "lm_head.weight": normal(config.vocab_size, width)})
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    shape = {"blocks": 32, "width": 4096, "ffn": 14336, "heads": 32, "kv-heads": 8, "vocab": 128256, "experts": 0}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    made, more = LlamaConfig, {}
    if given.experts:
        made, more = MixtralConfig, {"num_local_experts": given.experts, "num_experts_per_tok": 2}
    config = made(
        vocab_size=given.vocab,
        hidden_size=given.width,
        intermediate_size=given.ffn,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        head_dim=given.width // given.heads,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM" if given.experts else "LlamaForCausalLM"],
        **more,
    )
    make(given.output, config, given.experts)


if __name__ == "__main__":
    main()
