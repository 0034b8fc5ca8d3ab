"""llama.cpp's own server in this process (the package xllamacpp), over HTTP."""

from __future__ import annotations

import contextlib
import json
import urllib.request

import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")


class Served:
    """A GGUF file that llama.cpp has opened, on the CPU alone."""

    def __init__(self, path, *, context: int = 256):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.fit_params, params.port = False, False, 0
        # Several would wait for each other in a loop: workers of pytest share the cores.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str, *, with_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": with_special, "parse_special": True}
        return self._post("tokenize", body)["tokens"]

    def greedy(self, ids: list[int], n_tokens: int) -> list[dict]:
        """The tokens that follow, each with its `id` and the most likely ones, `top_logprobs`."""
        body = {
            "prompt": ids,
            "n_predict": n_tokens,
            "temperature": 0,
            "n_probs": 4,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        return self._post("completion", body)["completion_probabilities"]

    def _post(self, path, body):
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with contextlib.closing(urllib.request.urlopen(request)) as answer:
            return json.load(answer)
