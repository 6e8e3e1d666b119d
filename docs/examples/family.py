"""A new family: StarCoder2, whose names and LayerNorms are described, not patched.

In the package this `Family` is one entry of `arch/families.py`, with a tiny config in `tests/conftest.py`: every test
of invariance then runs on it. Here it is tried from outside. Run: python docs/examples/family.py
"""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Starcoder2Config

from phasequant.arch import ModelMap, map
from phasequant.arch.names import Family, GroupNames
from phasequant.transform import apply, fixed_rotations

STARCODER2 = Family(
    "StarCoder2",
    ("starcoder2",),  # config.model_type
    groups=(  # linears that read one input, and the norm it comes from
        GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        GroupNames("o", ("self_attn.o_proj",)),
        GroupNames("gate_up", ("mlp.c_fc",), "post_attention_layernorm"),
        GroupNames("down", ("mlp.c_proj",)),
    ),
    norm="layer",  # the mean is taken off: no rotation of the residual stream can be folded
    ups=(),  # no gate, and no scale goes through its GELU
    writers=("self_attn.o_proj", "mlp.c_proj"),
)

CONFIG = Starcoder2Config(
    vocab_size=256, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, use_bias=True, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(32)[None]).logits


def main() -> float:
    """How far the logits move when every rotation is in place and nothing is rounded: rounding errors of fp32."""
    map.FAMILIES = (STARCODER2, *map.FAMILIES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float64).eval()
    model_map = ModelMap.from_config(model.config)
    model_map.check(model)  # every name is there
    before = logits(model)
    apply(model, model_map, fixed_rotations(model_map, seed=0, where="online"))
    moved = float((logits(model) - before).norm() / before.norm())
    print(f"{model_map.family.name}: {len(model_map.groups)} groups a block, logits moved by {moved:.1e}")
    return moved


if __name__ == "__main__":
    main()
