"""Writes docs/families.md from the maps themselves: `python docs/families.py`; a test fails where the file is old.

Each family is shown by Transformers' default config of its first model type, with what tells it apart (`Family.when`)
and what EXAMPLES gives it, so that everything a config can make a map say is seen.
"""

from pathlib import Path

from transformers import AutoConfig

from phasequant.arch import FAMILIES, REFUSED, Family, ModelMap
from phasequant.nn import ModelLayout
from phasequant.runtime import can_run_config
from phasequant.serving.support import refusals

PAGE = Path(__file__).with_suffix(".md")
EXAMPLES = {
    "OPT, no ReLU": {"activation_function": "gelu"},
    "StableLM": {"qk_layernorm": True},
    "Phi-3": {"partial_rotary_factor": 0.75},
    "Granite": {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "SmolLM3": {"num_hidden_layers": 8},
}  # fmt: skip
NORMS = {"rms": "RMS", "rms+1": "RMS, 1 + w", "layer": "LayerNorm"}
HEAD = """# Families

Written by `python docs/families.py` from the maps in `phasequant.arch`; a test keeps it so.

**R1**: whether a rotation of the residual stream can be folded into the weights (`rotation.where=folded`), or runs
online before attention and MLP. **R2**: whether values are rotated in the weights of v and o. **Scales** of inputs are
folded before these groups of linears. R3 (queries and keys) and R4 (before down) run online in every family.
**Runtime**: whether `phasequant.runtime` runs it; all others run in Transformers. **vLLM**: whether our plugin takes
its checkpoints rather than refusing them; `tests/in_vllm` has the families whose tokens were compared there.

"""


def example(family: Family) -> ModelMap:
    """The map of a family's example; an error where another family takes that config."""
    found = ModelMap.from_config(_config(family))
    assert found.family.name == family.name, f"the example of {family.name} is {found.family.name}'s"
    return found


def _config(family: Family):
    return AutoConfig.for_model(family.model_types[0], **{**dict(family.when), **EXAMPLES.get(family.name, {})})


def row(family: Family) -> list[str]:
    """The cells of one family."""
    found = example(family)
    before = [] if found.group("qkv").norm is None else [NORMS[family.norm]]
    after = [f"{NORMS[family.norm]} after the sublayers"] if family.post_norms else []
    experts = "none"
    if family.experts is not None:
        experts = f"one group{', a shared one taken apart' if family.shared else ''}"
    scales = [*found.scaled, *(["o"] if family.value else [])]
    return [
        family.name,
        ", ".join(f"`{name}`" for name in family.model_types),
        "; ".join(before + after),
        "online" if found.unfoldable else "folded",
        "folded" if family.value else "none",
        ", ".join(scales),
        experts,
        "yes" if can_run_config(_config(family))[0] else "no",
        "no" if refusals(ModelLayout(), found) else "yes",
    ]


def page() -> str:
    """The whole page."""
    names = ["family", "model types", "norms", "R1", "R2", "scales", "experts", "runtime", "vLLM"]
    rows = [names, ["---"] * len(names), *(row(family) for family in FAMILIES)]
    lines = [HEAD + "\n".join(f"| {' | '.join(cells)} |" for cells in rows), "", "## What is said of each", ""]
    for family in FAMILIES:
        found = example(family)
        said = [*found.notes, *refusals(ModelLayout(), found)]
        if found.unfoldable:
            said.append(f"R1 is not folded: {found.unfoldable}")
        for need in family.needs:
            wanted = need.value if need.same_as is None else need.same_as
            said.append(f"refused unless `{need.attribute}` is `{wanted}`: {need.why}")
        if said:
            lines += [f"**{family.name}**", "", *(f"- {one}" for one in said), ""]
    lines += ["## Known and refused", ""]
    lines += [f"- **{name}** (`{kind}`): {why}" for kind, (name, why) in REFUSED.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
