"""Tests that need vLLM: `make test-vllm`, in a virtual environment of their own. Skipped where it is not installed."""

import os

import pytest

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # what the engine raises reaches the test
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)
pytest.importorskip("vllm")
