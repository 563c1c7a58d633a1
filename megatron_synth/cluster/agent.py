"""torchrun, as the launchers start it: with the same arguments, but silent when it is stopped on request.

torchrun answers a signal that it was told to handle with a traceback of its own on every node. The ranks have said
what happened by then.

With `--local` first, the ranks are those of one machine. `torchrun --standalone` would listen on all networks, and unpickle
what it finds in its store. Here the rendezvous is the static one, which keeps no pickles, and listens on the loopback address
alone; so do gloo and NCCL, and the ranks share a secret (train/checkpoint/mailbox.py).
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from functools import partial

LOCAL = "--local"
_LOOPBACK = "127.0.0.1"
_SECRET = "MEGATRON_SYNTH_SECRET"


def main(argv: list[str]) -> int:
    """Run the ranks of this node. Returns 0 if all of them did, and 1 after a signal; raises what torchrun raises else."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    if argv[:1] == [LOCAL]:
        argv = [*_on_this_machine(), *argv[1:]]
    try:
        torchrun(argv)
    except SignalException:
        return 1
    return 0


def _on_this_machine() -> list[str]:
    """Arguments for ranks on one machine; their store listens on the loopback address from now on."""
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    listener = socket.socket()
    listener.bind((_LOOPBACK, 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    # the socket is handed over: the store closes it
    store = partial(static_tcp_rendezvous.TCPStore, master_listen_fd=listener.detach())
    static_tcp_rendezvous.TCPStore = store  # type: ignore[assignment, misc]
    os.environ[_SECRET] = secrets.token_hex(32)
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")
    return ["--nnodes", "1", "--node-rank", "0", "--master-addr", _LOOPBACK, "--master-port", str(port), "--max-restarts", "0"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
