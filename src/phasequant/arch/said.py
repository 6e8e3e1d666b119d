"""What a config says about where transforms can act, in words: it is printed with the model and in the docs."""

from typing import Any

from transformers import PretrainedConfig

from phasequant.arch.names import Family

NORMED_QK = (
    "q and k are normalized: no rotation can be folded through those norms, so R3 is never folded into q and k; it "
    "runs online, after the norms and RoPE"
)


def said(family: Family, config: PretrainedConfig) -> tuple[str, ...]:
    """A sentence each."""
    found = []
    if family.qk_norms and getattr(config, "qk_layernorm", True):
        found.append(NORMED_QK)
    found += _rope(config)
    if family.softcap is not None and (cap := getattr(config, family.softcap, None)) is not None:
        found.append(f"attention scores are capped at {cap:g}: attention is computed step by step, never by SDPA")
    if family.logit_softcap is not None and (cap := getattr(config, family.logit_softcap, None)) is not None:
        found.append(f"logits are capped at {cap:g}, after the head")
    times = [f"{name} {value:g}" for name in family.multipliers if (value := getattr(config, name)) != 1]
    if times:
        found.append(f"the model multiplies by numbers of its own ({', '.join(times)}): rotations go through them")
    if family.shared_width is not None:
        parts = int(getattr(config, family.shared_width)) // int(getattr(config, family.d_ffn))
        found.append(
            f"the shared expert is taken apart into {parts} of the others' width, to which every token goes: they are "
            "the last ones by number, and have bits as all others"
        )
    return tuple(found)


def _rope(config: PretrainedConfig) -> list[str]:
    found = []
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    part = rope.get("partial_rotary_factor") or 1.0
    if part < 1:
        found.append(f"RoPE turns {part:g} of the channels of a head: R3 runs online, after it, over all of them")
    without = [str(i) for i, has in enumerate(getattr(config, "no_rope_layers", None) or ()) if not has]
    if without:
        found.append(
            f"there is no RoPE in blocks {', '.join(without)}: R3 runs online there too, where it could be folded"
        )
    return found
