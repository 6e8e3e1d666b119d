"""PhaseQuant's checkpoints in vLLM: the plugin that computes what was measured, and the server's start.

    plugin        what vLLM finds under `vllm.general_plugins`: registers the config, and the prompts' prefix
    config        `QuantizationConfig`: which layer is computed how; refuses what cannot be as promised (`support`)
    linears       fused q/k/v and gate/up, o, down: our kernels on our codes, online maps and branches before them
    attention     R3, the KV grid and the prefix's stored keys and values, before vLLM's own attention and cache
    prompts       the prefix's token ids before every prompt
    server        `phasequant serve`: vLLM's OpenAI-compatible server with the right flags

Only `support` and `server` can be imported without vLLM.
"""
