"""One model in llama.cpp, for `peer.Runtime`: requests as JSON lines in, answers as JSON lines out.

python peer_process.py FILE CONTEXT [LORA]
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request


def tokenize(address: str, body: dict) -> dict:
    """The server's own answer to /tokenize."""
    request = urllib.request.Request(
        f"{address}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main(path: str, context: str, adapter: str = "") -> None:
    """Load, say so, then answer until the input ends."""
    # The library writes its log to both: answers need a stream to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel = int(context), 1
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        settings.lora_adapters = [lora]
    server = xllamacpp.Server(settings)
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "tokenize" in request:
            answer = tokenize(server.listening_address, request["tokenize"])
        else:
            answer = server.handle_completions(request["completions"])
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # no destructors: see peer.py


if __name__ == "__main__":
    main(*sys.argv[1:])
