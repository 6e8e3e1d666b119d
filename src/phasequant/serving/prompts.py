"""A checkpoint's prefix before every prompt: the same token ids, so that vLLM's prefix caching keeps their blocks.

Every request, of `LLM` and of the server, becomes an `EngineCoreRequest` in `InputProcessor.process_inputs`; that
method is wrapped. So a request's prompt_token_ids, usage and prompt_logprobs count the prefix's tokens too, and the
longest prompt is shorter by them. The engine checks that they are there (`attention.Prefix`): a front end without this
plugin is an error, not another model.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from phasequant.checkpoint.hf import METHOD


def prefix_of(hf_config: Any) -> list[int]:
    """The token ids of a config's prefix; none where it is not ours, or has none."""
    given = getattr(hf_config, "quantization_config", None)
    values = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    if values.get("quant_method") != METHOD:
        return []
    prefix = (values.get("layout") or {}).get("prefix")
    return list(prefix["tokens"]) if prefix else []


def install() -> None:
    """Wrap `process_inputs`, once a process."""
    from vllm.v1.engine.input_processor import InputProcessor

    plain = InputProcessor.process_inputs
    if hasattr(plain, "of_phasequant"):
        return

    @wraps(plain)
    def with_prefix(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = plain(self, *args, **kwargs)
        prefix = prefix_of(self.model_config.hf_config)
        return put_before(request, prefix, self.model_config.max_model_len) if prefix else request

    with_prefix.of_phasequant = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = with_prefix


def put_before(request: Any, prefix: list[int], longest: int) -> Any:
    """The request with the prefix's ids before its own; `longest`: tokens of prompt and answer together."""
    ids = request.prompt_token_ids
    if ids is None or request.prompt_embeds is not None:
        raise ValueError("this checkpoint has a prefix of token ids: prompts come as text or token ids, not embeddings")
    if request.mm_features:
        raise ValueError("this checkpoint has a prefix of token ids: prompts come without images or sound")
    request.prompt_token_ids = [*prefix, *ids]
    room = longest - len(request.prompt_token_ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and with this checkpoint's prefix of {len(prefix)} that is more than "
            f"max_model_len={longest} leaves: shorten it, or start with a larger max_model_len"
        )
    params = request.sampling_params
    if params is not None and params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, room)
    return request
