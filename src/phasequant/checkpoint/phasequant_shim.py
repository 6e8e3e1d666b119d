"""Makes a checkpoint of PhaseQuant's load with `trust_remote_code=True`.

Transformers runs this file, which stands beside the weights, where that is given: it imports phasequant, which
registers the format, and hands the config back as it is. It names no class of its own: config and model are
Transformers' classes of this architecture.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

try:
    import phasequant  # noqa: F401  (registers the format)
except ModuleNotFoundError as error:
    if error.name != "phasequant":
        raise
    raise ImportError(
        "this checkpoint holds packed 4-bit weights in PhaseQuant's format, which Transformers cannot read without it: "
        "pip install phasequant"
    ) from error


class Config:
    """What `auto_map` names: it gives the config of this model's own class."""

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """Nothing: a class of Transformers' own must not be saved as somebody's code."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> PretrainedConfig:
        """The config, by its `model_type`."""
        return AutoConfig.from_pretrained(path, **{**options, "trust_remote_code": False})
