"""torchrun, as the launchers start it: with the same arguments, but silent when it is stopped on request.

torchrun answers a signal that it was told to handle with a traceback of its own on every node. The ranks have said
what happened by then.

With `--local` first, the ranks are those of one machine. `torchrun --standalone` would listen on all networks, and unpickle
what it finds in its store. Here the rendezvous is the static one, which keeps no pickles, and listens on the loopback address
alone; so do gloo and NCCL, and the ranks share a secret (train/checkpoint/mailbox.py).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_synth.config.errors import EXIT_RANK_LOST, EXIT_STOPPED, EXIT_USER_ERROR
from megatron_synth.core.log import show

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LOCAL = "--local"
_LOOPBACK = "127.0.0.1"
_SECRET = "MEGATRON_SYNTH_SECRET"


def main(argv: list[str]) -> int:
    """Run the ranks of this node. Returns 0 if all did well, 1 after a signal, else what `_code_of` makes of their codes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if "LOGLEVEL" not in os.environ:  # which is torch's own: a line for each rank that a signal is passed on to
        for name in ("agent.server.api", "multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    if argv[:1] == [LOCAL]:
        argv = [*_on_this_machine(), *argv[1:]]
    try:
        torchrun(argv)
    except SignalException:
        return 1
    except ChildFailedError as error:
        show(f"error: {_words(error)}", error=True)
        return _code_of([failure.exitcode for failure in error.failures.values()])
    return 0


def _code_of(codes: Sequence[int]) -> int:
    """One exit code for those of ranks, of which torchrun knows some: it ends the others when it sees the first.

    What only a user can mend comes first. A rank that a signal ended is one that is gone.
    """
    if EXIT_USER_ERROR in codes:
        return EXIT_USER_ERROR
    if EXIT_RANK_LOST in codes or any(code < 0 for code in codes):
        return EXIT_RANK_LOST
    return EXIT_STOPPED if set(codes) == {EXIT_STOPPED} else 1


def _words(error: ChildFailedError) -> str:
    """Which ranks ended how."""
    ends = []
    for rank, failure in sorted(error.failures.items()):
        how = f"ended with exit code {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        ends.append(f"rank {rank} {how}")
    return f"{', '.join(ends[:8])}{' ...' if len(ends) > 8 else ''}; what ranks printed is above"


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
