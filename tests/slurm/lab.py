"""A real SLURM cluster of several nodes on this machine, in a folder of its own, for tests and measurements.

    python -m tests.slurm.lab --nodes 4 -- COMMAND ...     # runs COMMAND with SLURM_CONF set, then takes all down

Needs root, and the packages that tests/install-system.sh installs. Nothing outside the folder is used, and every port is a
free one, so several labs run side by side. A guardian process owns all daemons: as their subreaper it keeps every process
of every job among its descendants, and it ends them all when the pipe to whoever asked for the lab closes, for
whatever reason.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
START_TIMEOUT_S = 60
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
KillWait=30
MinJobAge=3600
JobRequeue=1
UnkillableStepTimeout=60
SlurmdParameters=config_overrides
FirstJobId={first_job}
PartitionName=batch  Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL             MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

_CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
"""Nothing here uses control groups, but with the default, to find out which kind there is, slurmd ends where it finds none."""


def missing() -> str | None:
    """Why no lab can run here; None if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} not found); tests/install-system.sh installs it"
    return "a SLURM of one's own needs root" if os.geteuid() else None


class Lab:
    """A running cluster. Node names are node1, node2, ..."""

    def __init__(self, folder: Path, nodes: int):
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to speak to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True, timeout: float = 60, cwd: Path | None = None) -> str:
        """Run a client command; its standard output."""
        environment = os.environ | self.environment
        for _ in range(5):
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=cwd)
            if result.returncode != -signal.SIGPIPE:  # a busy controller has hung up
                break
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)}: code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait(self, what: str, until: Callable[[], bool], timeout: float = 300) -> None:
        """Wait for `until`; AssertionError with the daemons' last words when it does not come true.

        A requeued job is held back for the lifetime of its credentials, 5 s here (121 s by default). Letting it go earlier
        (`scontrol update StartTime=now`) makes its node refuse it as revoked.
        """
        end = time.monotonic() + timeout
        while not until():
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout} s: {what}\n{self.run('squeue', '-t', 'all')}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        tails = [f"{file.name}:\n" + "\n".join(_lines(file)[-12:]) for file in sorted((self.folder / "log").iterdir())]
        return "\n".join(tails)

    def kill_node(self, name: str) -> None:
        """What a power cut does: the node's daemon and everything that it started, all at once, with SIGKILL."""
        daemon = psutil.Process(int((self.folder / f"slurmd.{name}.pid").read_text()))
        victims = [daemon, *daemon.children(recursive=True)]
        # steps are not children of the daemon, but have its environment
        for process in psutil.Process(self._guardian_pid()).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == name:
                    # the parent of a program is its slurmstepd, which has written its title over its environment
                    parent = process.parent()
                    victims += [process, *([parent] if parent is not None and parent.name().startswith("slurmstepd") else [])]
        # all at once: a step that outlives its program by a moment would tell the controller that the job has failed
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def start_node(self, name: str) -> None:
        """Start the daemon of a node that was killed; the guardian watches over it as before."""
        (self.folder / "start" / name).touch()
        self.wait(f"{name} idle", lambda: "idle" in self.run("sinfo", "-h", "-n", name, "-o", "%T"), 60)

    def _guardian_pid(self) -> int:
        return int((self.folder / "guardian.pid").read_text())


@contextlib.contextmanager
def lab(
    nodes: int,
    *,
    slurmd_timeout: int = 10,
    node_prefix: Mapping[str, tuple[str, ...]] | None = None,
    conf: str = "",
    credential_s: int = 5,
) -> Iterator[Lab]:
    """A cluster of `nodes` idle nodes, taken down at the end.

    Args:
        nodes: their number; each claims 64 CPUs, whatever the machine has.
        slurmd_timeout: seconds of silence after which a node counts as lost.
        node_prefix: command that the daemon of a node is started through, such as `unshare --mount ...`.
        conf: further lines of slurm.conf.
        credential_s: seconds within which a step must have started on all nodes, and for which a requeued job waits.
    """
    folder = Path(tempfile.mkdtemp(prefix="lab."))
    folder.chmod(0o755)
    guardian = None
    try:
        _configure(folder, nodes, slurmd_timeout, credential_s, conf)
        guardian = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--guard", str(folder), str(nodes), json.dumps(dict(node_prefix or {}))],
            stdin=subprocess.PIPE,
            stdout=(folder / "log" / "guardian.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt on the terminal must not reach it
        )
        running = Lab(folder, nodes)
        running.wait(f"{nodes} idle nodes", lambda: _idle(running) == nodes, START_TIMEOUT_S + nodes)
        yield running
    finally:
        if guardian is not None:
            assert guardian.stdin is not None
            guardian.stdin.close()
            guardian.wait(60)
        shutil.rmtree(folder, ignore_errors=True)  # where there was no guardian yet


def _idle(running: Lab) -> int:
    return running.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split().count("idle")


def _configure(folder: Path, nodes: int, slurmd_timeout: int, credential_s: int, more: str) -> None:
    for name in ("state", "log", "start", *(f"spool/node{number}" for number in range(1, nodes + 1))):
        (folder / name).mkdir(parents=True)
    host, ports = socket.gethostname().split(".")[0], _free_ports(nodes + 1)
    # rendezvous ports follow from the job's number: labs side by side must not give out the same ones
    first_job = random.SystemRandom().randrange(1000, 60_000_000)
    settings = {"slurmd_timeout": slurmd_timeout, "credential_s": credential_s, "first_job": first_job}
    text = _CONF.format(folder=folder, host=host, port=ports[0], **settings) + more
    for number, port in enumerate(ports[1:], start=1):
        text += f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=500000\n"
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text(_CGROUP_CONF)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)


def _free_ports(count: int) -> list[int]:
    """Ports below the range from which the kernel itself hands out, where any client might take them again."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(5000, 12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()


# ---- the guardian


def guard(folder: Path, nodes: int, prefixes: dict[str, list[str]]) -> None:
    """Start all daemons, wait until standard input closes, then end every descendant."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    (folder / "guardian.pid").write_text(str(os.getpid()))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munge.seed"]
    names = [f"node{number}" for number in range(1, nodes + 1)]

    def node(name: str) -> None:
        command = [*prefixes.get(name, []), "slurmd", "-D", "-N", name]
        subprocess.Popen(
            command, env=environment | {"SLURMD_NODENAME": name}, stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_guardian
        )

    try:
        subprocess.Popen(munge, stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_guardian)
        while not (folder / "munge.socket").exists():
            time.sleep(0.01)
        subprocess.Popen(["slurmctld", "-D"], env=environment, stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_guardian)
        for name in names:
            node(name)
        while os.read(0, 1) if _readable() else True:
            for wish in (folder / "start").iterdir():
                wish.unlink()
                node(wish.name)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    finally:
        _end_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_the_guardian() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _readable() -> bool:
    return bool(select.select([0], [], [], 0.2)[0])


def _end_descendants() -> None:
    # daemons first, so that they start nothing more; SIGKILL, since nothing of the lab is kept
    for _ in range(100):
        victims = psutil.Process().children(recursive=True)
        if not victims:
            return
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def main() -> int:
    """Run a command on a cluster of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.lab", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--slurmd-timeout", type=int, default=10, metavar="S", help="silence after which a node counts as lost")
    parser.add_argument("--credential", type=int, default=5, metavar="S", help="within which a step must have started")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    command = [word for place, word in enumerate(options.command) if place or word != "--"] or ["bash"]
    with lab(options.nodes, slurmd_timeout=options.slurmd_timeout, credential_s=options.credential) as running:
        return subprocess.call(command, env=os.environ | running.environment)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guard"]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons are ended on this way out, too
        guard(Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        sys.exit(main())
