"""Seconds and peak memory of GPTQ for one block of a model's size, on random weights and tokens.

    python benchmarks/weights/block.py [--shape llama-3-8b] [--sequences 128] [--seqlen 2048] [--set weights.rounds=0]

The block is quantized by the whole recipe (`quarot-gptq`: rotations, Hessians from what the quantized block produces,
search of clips, columns); what is printed is its weight part alone. Random weights say nothing of accuracy.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import phasequant

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                   "num_key_value_heads": 32},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                   "num_key_value_heads": 8},
    "llama-3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                    "num_key_value_heads": 8},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[given.shape], num_hidden_layers=1, vocab_size=256, max_position_embeddings=8192)
    with torch.device(given.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "random.txt"
        letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ,.", k=(given.sequences + 1) * given.seqlen)
        text.write_text("".join(letters))
        sets = [f"calibration.text={json.dumps(str(text))}", f"weights.sequences={given.sequences}",
                f"weights.seqlen={given.seqlen}", *given.sets]  # fmt: skip
        run = phasequant.quantize(model, "quarot-gptq", overrides=sets, tokenizer=byte_tokenizer())
    told = run.origin["weights"]
    where = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    print(f"{given.shape}, {where}, {given.sequences} x {given.seqlen} tokens, {' '.join(given.sets) or 'defaults'}: "
          f"{told['seconds']:.1f} s, peak {told['peak_bytes'] / 2**30:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
