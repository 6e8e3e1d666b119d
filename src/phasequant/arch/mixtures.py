"""Families whose MLPs are mixtures of experts, and models that are known and refused.

Transformers keeps all experts of a block in two stacked tensors; `nn.experts` takes them apart into linears named
`experts.gate.{}`, `experts.up.{}` and `experts.down.{}`, which is what the groups name.
"""

from dataclasses import replace

from phasequant.arch.names import Family, GroupNames, Needs

EXPERTS = (
    GroupNames("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    GroupNames("o", ("self_attn.o_proj",)),
    GroupNames(
        "gate_up", ("mlp.experts.gate.{}", "mlp.experts.up.{}"), "post_attention_layernorm", probe="mlp.experts"
    ),
    GroupNames("down", ("mlp.experts.down.{}",), probe="mlp.experts.down"),
)
TOGETHER = "bits are given to all experts of a block together; the router reads and computes in 16 bits"

MIXTRAL = Family(
    "Mixtral",
    ("mixtral",),
    groups=EXPERTS,
    ups=("mlp.experts.up.{}",),
    writers=("self_attn.o_proj", "mlp.experts.down.{}"),
    experts="mlp.experts",
    router="mlp.gate",
    notes=(TOGETHER,),
)

DENSE_BLOCKS = "blocks with an MLP of another width stand between those with experts, and a map has one layout for all"
QWEN_MOE = replace(
    MIXTRAL,
    n_experts="num_experts",
    d_ffn="moe_intermediate_size",
    needs=(Needs("mlp_only_layers", DENSE_BLOCKS, []), Needs("decoder_sparse_step", DENSE_BLOCKS, 1)),
)

MIXTURES: tuple[Family, ...] = (
    MIXTRAL,
    replace(
        QWEN_MOE,
        name="Qwen2-MoE",
        model_types=("qwen2_moe",),
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
        shared_width="shared_expert_intermediate_size",
        notes=(TOGETHER, "the shared expert's gate reads and computes in 16 bits"),
    ),
    replace(
        QWEN_MOE,
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    replace(
        MIXTRAL,
        name="gpt-oss",
        model_types=("gpt_oss",),
        ups=(),
        router="mlp.router",
        notes=(
            TOGETHER,
            "up's half of an expert is clamped and one is added: no scale goes through, and down's input is not scaled",
            "its files hold the experts in MXFP4: load them by Transformers with Mxfp4Config(dequantize=True), and "
            "give that model",
            "attention has a sink a head, one more score in the softmax: it is computed step by step, by no kernel",
        ),
    ),
)

_LATENT = (
    "its latent attention puts projections of other widths behind norms of their own (q_a, q_b, kv_a, kv_b), caches "
    "what is neither keys nor values, and its first blocks have an MLP of another width: a map knows four groups a "
    "block, with one width each, and a KV grid is of keys and values"
)
REFUSED: dict[str, tuple[str, str]] = {
    "deepseek_v2": ("DeepSeek-V2", _LATENT),
    "deepseek_v3": ("DeepSeek-V3", _LATENT),
}
"""Model type → its name, and why it is not supported."""
