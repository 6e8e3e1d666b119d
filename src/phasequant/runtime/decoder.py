r"""A decoder of the common layout, written for speed: the model's own tensors, its numbers, few and large steps.

    h ─ [norm → Q] ─ W_qkv ─ RoPE ─ attention over the cache ─ [mix → Q] ─ W_o ─(+)
      ─ [norm → Q] ─ W_gate,up ─ [act·mul → T → Q] ─ W_down ─(+)                       [ ]: one kernel, where it can be

Linears that read one input are stacked (`stacking`). What stands before a product, the sum with the residual stream
included, is fused into one kernel where `linear.Linear` can; elsewhere it is done step by step, in the same
order and with the same roundings as Transformers' modules, so that both give the same integers but for the order of a
sum. Attention is the model's own function (`nn.attention` for a quantized KV), with the model's own rotary embedding.
On a GPU one kernel rotates queries and keys and maps the queries of a quantized KV (`kernels.gpu.rope`), for 16-bit
models as well; Qwen3's, which are normed in between, are rotated step by step.

For pre-norm blocks with RMS norms and a gated MLP: LLaMA, SOLAR, Mistral, Qwen2, Qwen3. Others run in Transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import runs_on
from phasequant.nn import SLOT, kv
from phasequant.runtime.linear import Linear, Norm
from phasequant.runtime.stacking import stack

FAMILIES = ("LLaMA", "Mistral", "Qwen2", "Qwen3")


def can_run(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether `Decoder` runs a model; if not, why."""
    return can_run_config(model.config)


def can_run_config(config: Any) -> tuple[bool, str]:
    """The same of a Transformers config."""
    name = ModelMap.from_config(config).family.name
    if name not in FAMILIES:
        return False, f"the runtime has the layout of {', '.join(FAMILIES)}, not {name}'s: it runs in Transformers"
    return True, "pre-norm blocks, RMS norms, gated MLP"


def window_of(model: PreTrainedModel) -> int | None:
    """How far its tokens see; None where all do."""
    return window_in(model.config)


def window_in(config: Any) -> int | None:
    """The same of a Transformers config."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


@dataclass
class Block:
    """One decoder block: stacked linears, norms, and the model's attention module for what only it knows."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    before: Norm
    between: Norm
    attention: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    matrix: Tensor | None  # of the queries after RoPE, fp32, where `rope` multiplies by it


class Decoder:
    """A model's blocks, ready to run; see the module's docstring. `model` goes on sharing all tensors, but its packed
    codes where `release` and a kernel laid them out anew: then only this runs."""

    def __init__(self, model: PreTrainedModel, *, release: bool = False) -> None:
        ok, reason = can_run(model)
        if not ok:
            raise PhaseQuantError(reason)
        self.model, self.map = model, ModelMap.from_config(model.config)
        shape = self.map.shape
        self.heads, self.kv_heads, self.d_head = shape.heads, shape.kv_heads, shape.d_head
        like = next(model.parameters())
        self.device, self.dtype = like.device, like.dtype
        core = model.get_submodule(self.map.family.decoder)
        self.embed = core.embed_tokens
        self.rotary: Any = core.rotary_emb
        self.norm = Norm.of(core.norm)
        self.head = model.get_submodule(self.map.family.head)
        self.rope = self._rope_kernel()
        self.act = core.layers[0].mlp.act_fn
        name = getattr(model.config, "hidden_act", "silu")
        self.blocks = [self._block(layer, name, release) for layer in core.layers]
        self.attend: Any = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]

    def _rope_kernel(self) -> Any:
        """What rotates queries and keys in one; None where it cannot."""
        if self.device.type not in kv.TRITON_ON or not runs_on(self.device)[0]:
            return None
        from phasequant.kernels.gpu import rope

        return rope.rope if rope.can_run(self.d_head, self.dtype, self.device)[0] else None

    def _block(self, layer: Any, act: str, release: bool) -> Block:
        attention, mlp = layer.self_attn, layer.mlp

        def linear(*parts: nn.Module) -> Linear:
            made = Linear(stack(parts), self.device, self.dtype, act=act)
            if release:
                made.release(parts)
            return made

        return Block(
            linear(attention.q_proj, attention.k_proj, attention.v_proj),
            linear(attention.o_proj),
            linear(mlp.gate_proj, mlp.up_proj),
            linear(mlp.down_proj),
            Norm.of(layer.input_layernorm),
            Norm.of(layer.post_attention_layernorm),
            attention,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            self._query_matrix(getattr(attention, SLOT, None)),
        )

    def _query_matrix(self, quantizer: kv.KVQuantizer | None) -> Tensor | None:
        online = None if quantizer is None else quantizer.query_map or quantizer.key_map
        if self.rope is None or online is None:
            return None
        return online.map().matrix().to(self.device, torch.float32).contiguous()

    def describe(self) -> dict[str, dict[str, str]]:
        """What runs each group of the first block: its kernel, and how its input gets there."""
        first = self.blocks[0]
        named = {"qkv": first.qkv, "o": first.o, "gate_up": first.gate_up, "down": first.down}
        return {name: linear.describe() for name, linear in named.items()}

    @torch.no_grad()
    def hidden(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], cache: Any, mask: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last norm; `cache` takes the new keys and values (`update`, as Transformers'
        caches have it). `positions`: of the tokens, a prefix counted."""
        batch, count = tokens.shape
        h = self.embed(tokens)
        angles = self.rotary(h, positions)
        h, added = h.flatten(0, 1), None
        for index, block in enumerate(self.blocks):
            h, qkv = block.qkv.after_norm(h, added, block.before)
            a = self._attention(block, index, qkv.unflatten(0, (batch, count)), angles, cache, mask)
            h, gate_up = block.gate_up.after_norm(h, block.o.plain(a.flatten(0, 1)), block.between)
            added = block.down.after_gate(gate_up, self.act)
        return self.norm.after(h, added).unflatten(0, (batch, count))

    def _attention(
        self, block: Block, index: int, qkv: Tensor, angles: tuple[Tensor, Tensor], cache: Any, mask: Tensor | None
    ) -> Tensor:
        options: dict[str, Any] = {"dropout": 0.0, "scaling": block.attention.scaling}
        q, k, v = qkv.unflatten(-1, (-1, self.d_head)).split((self.heads, self.kv_heads, self.kv_heads), 2)
        if self.rope is None or block.q_norm is not None or block.k_norm is not None:
            if block.q_norm is not None and block.k_norm is not None:
                q, k = block.q_norm(q), block.k_norm(k)
            cos, sin = (x[:, :, None] for x in angles)
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        else:
            cos, sin = (x.flatten(0, 1) for x in angles)
            both = self.rope(qkv.flatten(0, 1), cos, sin, self.heads, self.kv_heads, block.matrix)
            q, k = (x.unflatten(0, qkv.shape[:2]) for x in both)
            if block.matrix is not None:
                options["rotated"] = True
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = cache.update(k, v, index)
        out, _ = self.attend(block.attention, q, keys, values, mask, **options)
        return out.flatten(2)

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Of the next token."""
        return self.head(hidden)


def _rotated(x: Float[Tensor, "B T N H"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T N H"]:
    """RoPE, rounded as Transformers rounds it."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin
