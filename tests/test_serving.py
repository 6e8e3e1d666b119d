"""What of serving needs no vLLM: rules, prompts, the server's command and its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import make_model, make_tokenizer

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.nn import ModelLayout
from phasequant.serving import server as module
from phasequant.serving.prompts import prefix_of, put_before
from phasequant.serving.server import LOOK, Server, layout_of, run, server
from phasequant.serving.support import eager, refusals
from phasequant.source import wrap

SETS = ["calibration.sequences=2", "calibration.seqlen=32"]
PREFIX = ["prefix.method=tokens", "prefix.tokens=[256, 104]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")

    def tiny(name):
        return wrap(name, make_model(name), make_tokenizer())

    phasequant.quantize(tiny("llama"), "quarot", overrides=SETS).save(folder / "plain")
    phasequant.quantize(tiny("llama"), "quarot", overrides=[*SETS, *PREFIX]).save(folder / "prefixed")
    phasequant.quantize(tiny("mixtral"), "rtn", overrides=SETS).save(folder / "experts")
    return folder


@pytest.fixture
def with_vllm(monkeypatch):
    monkeypatch.setattr(module, "_check_python", lambda python: None)


def request(ids, **rest):
    params = SimpleNamespace(max_tokens=rest.pop("new", 8))
    return SimpleNamespace(prompt_token_ids=ids, prompt_embeds=None, mm_features=None, sampling_params=params, **rest)


def test_prompts_get_the_prefix():
    found = put_before(request([5, 6], new=100), [1, 2], 10)
    assert found.prompt_token_ids == [1, 2, 5, 6] and found.sampling_params.max_tokens == 6
    assert put_before(request([5], new=3), [1, 2], 10).sampling_params.max_tokens == 3


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"8 tokens.*prefix of 2.*max_model_len=10"):
        put_before(request([5] * 8), [1, 2], 10)
    with pytest.raises(ValueError, match="not embeddings"):
        put_before(request(None), [1, 2], 10)
    pictured = request([5])
    pictured.mm_features = ["an image"]
    with pytest.raises(ValueError, match="images"):
        put_before(pictured, [1, 2], 10)


def test_whose_prefix():
    ours = {"quant_method": "phasequant", "layout": {"prefix": {"tokens": [3, 4]}}}
    assert prefix_of(SimpleNamespace(quantization_config=ours)) == [3, 4]
    assert prefix_of(SimpleNamespace(quantization_config={**ours, "quant_method": "gptq"})) == []
    assert prefix_of(SimpleNamespace()) == []
    assert prefix_of(SimpleNamespace(quantization_config={**ours, "layout": {"prefix": None}})) == []


def test_rules(made):
    layout, model_map = layout_of(made / "plain")
    assert refusals(layout, model_map) == [] and eager(layout) is None
    assert "tensor_parallel_size=2" in refusals(layout, model_map, tensor_parallel=2)[0]
    assert refusals(ModelLayout(), model_map, pipeline_parallel=2) == []
    prefixed, _ = layout_of(made / "prefixed")
    assert "position" in eager(prefixed)
    assert "pipeline_parallel_size=2" in refusals(prefixed, model_map, pipeline_parallel=2)[0]
    assert "mixture of experts" in refusals(*layout_of(made / "experts"))[0]


@pytest.mark.usefixtures("with_vllm")
def test_the_command(made, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    found = server(made / "prefixed", port=8123, name="it", extra=["--max-model-len", "64"])
    words = " ".join(found.arguments)
    assert "--served-model-name it" in words and "--port 8123" in words and words.endswith("--max-model-len 64")
    assert "--dtype float32" in words and "--enforce-eager" in words  # on a CPU
    assert found.environment["VLLM_CPU_KVCACHE_SPACE"] == "1" and found.url == "http://127.0.0.1:8123"
    assert "float32" not in server(made / "plain", extra=["--dtype", "bfloat16"]).arguments
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    assert "--enforce-eager" not in server(made / "plain").arguments
    assert "--enforce-eager" in server(made / "prefixed").arguments


@pytest.mark.usefixtures("with_vllm")
def test_what_is_refused_before_anything_starts(made, tmp_path):
    with pytest.raises(PhaseQuantError, match="tensor_parallel_size=4"):
        server(made / "plain", extra=["--tensor-parallel-size=4"])
    with pytest.raises(PhaseQuantError, match="wants a number"):
        server(made / "plain", extra=["-tp"])
    with pytest.raises(PhaseQuantError, match="mixture of experts"):
        server(made / "experts")
    with pytest.raises(PhaseQuantError, match="not a PhaseQuant checkpoint"):
        server(tmp_path)


def test_a_python_without_vllm(made, monkeypatch, tmp_path):
    with pytest.raises(PhaseQuantError, match="cannot be run"):
        server(made / "plain", python=str(tmp_path / "python"))

    def told(text):
        monkeypatch.setattr(module, "LOOK", f"print('{text}')")

    told("[null, true]")
    with pytest.raises(PhaseQuantError, match="vLLM is not installed"):
        server(made / "plain")
    told('["0.32.0", false]')
    with pytest.raises(PhaseQuantError, match="but not phasequant"):
        server(made / "plain")
    told('["0.32.0", true]')
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(PhaseQuantError, match="leaves PhaseQuant's plugin out"):
        server(made / "plain")
    found = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert '"0.' in found.stdout or "null" in found.stdout


STUB = """
import http.server, os, signal, subprocess, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
if {stubborn}: signal.signal(signal.SIGINT, signal.SIG_IGN)
http.server.HTTPServer(("127.0.0.1", {port}), Answer).serve_forever()
"""


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return stat.read().split()[2] != "Z"


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_is_ready_and_ends_with_all_its_children(number, stubborn, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(module, "PATIENCE", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = tmp_path / "pids"
    code = STUB.format(port=port, stubborn=stubborn).replace(
        "print(child.pid, flush=True)", f"open({str(pids)!r}, 'w').write(str(child.pid))"
    )
    told = []

    def ready(found):
        told.append(found.url)
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    before = signal.getsignal(number)
    run(Server((sys.executable, "-c", code), "it", "127.0.0.1", port, dict(os.environ)), ready, patience=30)
    assert told == [f"http://127.0.0.1:{port}"] and signal.getsignal(number) is before
    child = int(pids.read_text())
    until = time.monotonic() + 5
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(child)


def test_a_server_that_dies_is_told():
    with pytest.raises(PhaseQuantError, match="status 3 before it was ready"):
        run(Server((sys.executable, "-c", "raise SystemExit(3)"), "it", "127.0.0.1", 1, dict(os.environ)), print)
