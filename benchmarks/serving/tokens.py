"""The same greedy tokens from Transformers, from vLLM's Python API, and from its HTTP server.

    make test-vllm   (makes .venv-vllm), then
    .venv-vllm/bin/python benchmarks/serving/tokens.py CHECKPOINT [--prompts 20] [--new 64] [--no-http] [-o FOUND.json]

20 prompts of different kinds, 64 new tokens each, float32 on a CPU. vLLM runs the prompts as one batch; the server gets
them one after the other, through the `openai` client. Where a token differs, the two likeliest log-probabilities there
are shown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PROMPTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):", "The theory of relativity says that",
    "In 1969, the first man", "Water boils at", "My favourite food is", "The quick brown fox", "To be or not to be",
    "A linear map is", "The stock market fell because", "Dear Sir or Madam,", "import numpy as np\n",
    "The best way to learn is", "Once the war had ended,", "She opened the door and", "Photosynthesis is the process",
    "The largest planet in", "He said that he would", "The history of computing begins",
]  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def in_transformers(path: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy, one prompt after the other, through the packed cache."""
    import torch

    import phasequant

    model = phasequant.load(path, device="cpu", dtype=torch.float32)
    found = []
    for ids in prompts:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        found.append(out[0, len(ids) :].tolist())
    return found


def in_vllm(path: Path, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[list[list[float]]]]:
    """One batch; also the two likeliest log-probabilities at every step."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(path), dtype="float32", enforce_eager=True, max_model_len=1024, disable_log_stats=True)
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=2)
    made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    two = [
        [sorted((entry.logprob for entry in step.values()), reverse=True)[:2] for step in one.outputs[0].logprobs]
        for one in made
    ]
    return [list(one.outputs[0].token_ids) for one in made], two


def over_http(path: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """`phasequant serve` and the openai client."""
    import signal
    import socket

    import openai

    from phasequant.serving.server import Server, run, server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[list[int]] = []

    def ask(it: Server) -> None:
        client = openai.OpenAI(base_url=f"{it.url}/v1", api_key="none", timeout=600)
        rest = {"ignore_eos": True, "return_token_ids": True}
        for ids in prompts:
            answer = client.completions.create(
                model=it.name, prompt=ids, max_tokens=new, temperature=0, extra_body=rest
            )
            found.append(list(answer.choices[0].token_ids))
        os.kill(os.getpid(), signal.SIGTERM)

    run(
        server(path, port=port, extra=["--max-model-len", "1024"]),
        lambda it: threading.Thread(target=ask, args=(it,), daemon=True).start(),
    )
    return found


def part(name: str, path: Path, prompts: list[list[int]], new: int) -> object:
    """One of the three in a process of its own: vLLM leaves threads and settings behind."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        asked = json.dumps([name, str(path), prompts, new, file.name])
        subprocess.run([sys.executable, __file__, "--part", asked], check=True, env={**os.environ, **ENVIRONMENT})
        return json.loads(Path(file.name).read_text())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        name, path, prompts, new, out = json.loads(given.part)
        ask = {"transformers": in_transformers, "vllm": in_vllm, "http": over_http}[name]
        Path(out).write_text(json.dumps(ask(Path(path), prompts, new)))
        return

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[: given.prompts]]
    asked = (given.checkpoint, prompts, given.new)
    want = part("transformers", *asked)
    found = {"vllm": part("vllm", *asked)}
    tokens, two = found["vllm"]
    sides = {"vLLM": tokens}
    if not given.no_http:
        sides["vLLM over HTTP"] = part("http", *asked)
    result = {"checkpoint": given.checkpoint.name, "prompts": len(prompts), "new": given.new}
    for side, made in sides.items():
        same = [one == other for one, other in zip(made, want, strict=True)]
        result[side] = sum(same)
        print(f"{side}: {sum(same)} of {len(same)} prompts have the {given.new} tokens of Transformers", flush=True)
        for at, (mine, its) in enumerate(zip(made, want, strict=True)):
            if mine != its:
                step = next(i for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b)
                print(f"  prompt {at}, token {step}: the two likeliest there {two[at][step]}")
    if given.output:
        given.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
