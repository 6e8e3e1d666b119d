"""One greedy answer to one prompt."""

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from phasequant.api.arguments import Model, as_source
from phasequant.errors import PhaseQuantError
from phasequant.nn import prefix_tokens


@torch.no_grad()
def chat(
    model: Model,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: bool = False,
    device: str = "auto",
) -> str:
    """Greedy answer to one prompt, through the model's chat template where it has one; `stream` also prints it as it
    comes."""
    if not prompt.strip():
        raise PhaseQuantError("the prompt is empty: write something to answer")
    source = as_source(model, device, tokenizer)
    words = source.tokenizer
    content = prompt
    if words.chat_template:
        messages = [{"role": "user", "content": prompt}]
        content = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = words(content, return_tensors="pt", add_special_tokens=not words.chat_template)
    inputs = {key: value.to(source.device) for key, value in inputs.items() if key != "token_type_ids"}
    first = inputs["input_ids"][0, 0]
    if (
        int(first) == words.bos_token_id
        and int(first) in prefix_tokens(source.model)
        and inputs["input_ids"].shape[1] > 1
    ):
        inputs = {key: value[:, 1:] for key, value in inputs.items()}  # the prefix has begun the text already
    pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    printer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = source.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, streamer=printer
    )
    return words.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
