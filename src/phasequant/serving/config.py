"""`QuantizationConfig`: vLLM asks it for every layer how it is computed, and by which names tensors are found.

vLLM fuses q/k/v and gate/up; the shards of one are a group of ours, which reads one grid. What is no linear of the
model map (head, routers) stays vLLM's own in 16 bits.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest
from phasequant.checkpoint.guard import check_architecture
from phasequant.checkpoint.hf import METHOD
from phasequant.checkpoint.hf import PhaseQuantConfig as Stored
from phasequant.checkpoint.seal import seal_of
from phasequant.errors import PhaseQuantError
from phasequant.nn import ModelLayout
from phasequant.serving import cpu_attention
from phasequant.serving.attention import Embedding, RoundedKV
from phasequant.serving.linears import CodesLinear
from phasequant.serving.support import eager, refusals

logger = init_logger(__name__)

Linears = dict[str, tuple[int, str]]
"""Full name of a linear → (block, group)."""


class PhaseQuantConfig(QuantizationConfig):
    """See the module's docstring. Filled in two steps, as vLLM gives them: `from_config`, `maybe_update_config`."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored
        self.map: ModelMap | None = None
        self.layout: ModelLayout | None = None
        self.linears: Linears = {}

    def get_name(self) -> Any:
        """As `config.json` has it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that vLLM computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing: int8 matrix units."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is all in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PhaseQuantConfig":
        """From `quantization_config`; unknown keys and newer formats are errors."""
        return cls(Stored(**config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Where the model's folder and config become known: check the files, lay out."""
        folder = Path(model_name)
        if (folder / manifest.NAME).is_file():
            manifest.check(folder)
        check_architecture(folder, self.stored.architecture)
        if hf_config is not None:
            self._lay_out(hf_config)

    def _lay_out(self, hf_config: Any) -> None:
        self.map = ModelMap.from_config(hf_config)
        self.layout = ModelLayout.from_dict(self.stored.layout, self.map)
        self.linears = {name: (block, group) for block, group, name in self.map.linears()}

    def _ready(self) -> tuple[ModelMap, ModelLayout]:
        """Map and layout, once; what cannot be served as promised is refused here, before a weight is read."""
        running = get_current_vllm_config()
        if self.map is None or self.layout is None:
            self._lay_out(running.model_config.hf_config)
        assert self.map is not None and self.layout is not None
        parallel = running.parallel_config
        wrong = refusals(
            self.layout,
            self.map,
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
        )
        why = eager(self.layout)
        if why is not None and not running.model_config.enforce_eager:
            wrong.append(f"{why}: pass enforce_eager=True (--enforce-eager)")
        if current_platform.is_cpu():
            _as_torch_computes(running)
        if wrong:
            raise PhaseQuantError("vLLM cannot serve this checkpoint as it was measured: " + "; ".join(wrong))
        return self.map, self.layout

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Of linears, attention and embeddings; None leaves a layer to vLLM."""
        model_map, layout = self._ready()
        if isinstance(layer, LinearBase):
            return self._linear(layout, prefix)
        if isinstance(layer, Attention) and (layout.kv or layout.prefix is not None or current_platform.is_cpu()):
            block = _block(prefix, model_map)
            return RoundedKV(self, layout, model_map, block)
        embeds = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        if embeds and layout.prefix is not None:
            return Embedding(layout.prefix.tokens)
        return None

    def _linear(self, layout: ModelLayout, prefix: str) -> QuantizeMethodBase:
        parent, _, leaf = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{shard}" if parent else shard for shard in shards]
        places = {self.linears.get(name) for name in names}
        if places == {None}:
            return UnquantizedLinearMethod()
        if len(places) > 1 or None in places:
            raise PhaseQuantError(
                f"vLLM computes {', '.join(names)} as one linear '{leaf}', and the checkpoint does not have them in "
                "one group: the plugin does not know this family as vLLM builds it"
            )
        (place,) = places
        assert place is not None
        return CodesLinear(layout, *place, seal=self._seal)

    def _seal(self) -> torch.Tensor:
        return seal_of(self.stored.layout, self.stored.dtype, self.stored.architecture)

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """The KV grid's maps and the prefix stand in the attention module there, in vLLM in its `attn`."""
        inner: Mapping[re.Pattern[str], str | None] = {
            re.compile(r"(?<!\.attn)\.(kv_quantizer|kv_prefix)\."): r".attn.\1."
        }
        return WeightsMapper(orig_to_new_regex=inner)


def _as_torch_computes(running: Any) -> None:
    """Norms, RoPE and acts by torch, as in Transformers: vLLM's own operators sum in another order."""
    ops = running.compilation_config.custom_ops
    if cpu_attention.chosen(torch.device("cpu")) and "none" not in ops:
        ops[:] = ["none", *(op for op in ops if op != "all")]
        logger.info("phasequant: on this CPU norms, RoPE, acts and attention are torch's, as in Transformers")


def _block(prefix: str, model_map: ModelMap) -> int:
    inside = f"{model_map.family.blocks}."
    if not prefix.startswith(inside):
        raise PhaseQuantError(f"vLLM's attention layer '{prefix}' stands in none of the blocks '{inside}N'")
    return int(prefix[len(inside) :].split(".")[0])
