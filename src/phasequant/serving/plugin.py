"""What vLLM finds under the entry point group `vllm.general_plugins`, in every process it starts; harmless when called
twice. Named in VLLM_PLUGINS or not at all: vLLM then loads every plugin."""


def register() -> None:
    """Make vLLM know the method `phasequant`, and put prefixes before the prompts of its checkpoints."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from phasequant.checkpoint.hf import METHOD
    from phasequant.checkpoint.hf import register as register_with_transformers
    from phasequant.serving.config import PhaseQuantConfig
    from phasequant.serving.prompts import install

    register_with_transformers()
    register_quantization_config(METHOD)(PhaseQuantConfig)
    install()
