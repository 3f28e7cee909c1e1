"""`Team`: one torchrun job over all hosts, whose ranks do what they are asked until the team is dismissed.

Ranks listen on a Unix socket, which lives in the file system and not in any network: what is measured there is the
job's own.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from gradwire.bench.network.namespaces import INTERFACE, Hosts
from gradwire.bench.runs import Record

_PORT = 29400
_SECONDS_TO_START = 90.0
_SECONDS_TO_END = 5.0
_LINES_OF_LOG = 15


@final
class Team:
    """The ranks of one job, in rank order.

    Args:
        agents: The torchrun of every host.
        channels: The socket of every rank.
        log: What agents and ranks have printed.
    """

    def __init__(self, agents: list["subprocess.Popen[bytes]"], channels: list[socket.socket], log: Path) -> None:
        self._agents, self._log = agents, log
        self._channels = channels
        self._files = [channel.makefile("rwb") for channel in channels]
        self.failed = False
        """Whether some command has failed: answers may then be in the way that belong to it."""

    def ask(self, command: Record, *, timeout: float) -> list[Record]:
        """Give all ranks a command and wait for their answers, in rank order.

        Raises:
            RuntimeError: a rank failed or ended, or did not answer in time; the team is then of no more use.
        """
        try:
            return self._ask(command, timeout)
        except RuntimeError:
            self.failed = True
            raise

    def _ask(self, command: Record, timeout: float) -> list[Record]:
        for file in self._files:
            with contextlib.suppress(OSError):  # one that has gone is noticed below, with the reason
                file.write(json.dumps(command).encode() + b"\n")
                file.flush()
        answers: dict[int, Record] = {}
        limit = time.monotonic() + timeout
        while len(answers) < len(self._channels):
            waiting = {self._channels[rank]: rank for rank in range(len(self._channels)) if rank not in answers}
            ready = select.select(list(waiting), [], [], max(0.0, limit - time.monotonic()))[0]
            if not ready:
                raise RuntimeError(f"bench network: ranks were silent for {timeout:.0f} s.\n{tail(self._log)}")
            for channel in ready:
                line = self._files[waiting[channel]].readline()
                if not line:
                    raise RuntimeError(f"bench network: a rank has ended.\n{tail(self._log)}")
                answer = answers[waiting[channel]] = json.loads(line)
                if "error" in answer:  # the others may wait for this rank for ever
                    raise RuntimeError(f"bench network: a rank failed: {answer['error']}\n{tail(self._log)}")
        return [answers[rank] for rank in range(len(self._channels))]


@contextlib.contextmanager
def team(hosts: Hosts, settings: Mapping[str, Any]) -> Iterator[Team]:
    """Start a job of one rank per host; its processes have ended after this block, however it ends.

    Args:
        hosts: Where.
        settings: What `gradwire.bench.network.job` is told.

    Raises:
        RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="gradwire-") as folder, contextlib.ExitStack() as stack:
        log = Path(folder) / "log"
        door = stack.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(str(Path(folder) / "door"))
        door.listen(hosts.count)
        output = stack.enter_context(log.open("wb"))
        agents: list[subprocess.Popen[bytes]] = []
        channels: dict[int, socket.socket] = {}
        try:
            for host in range(hosts.count):
                agents.append(_start(hosts, host, Path(folder) / "door", settings, output))  # noqa: PERF401 (one may fail)
            _meet(door, channels, agents, log)
            made = Team(agents, [channels[rank] for rank in range(hosts.count)], log)
            yield made
            if not made.failed:
                made.ask({"do": "end"}, timeout=30.0)
                for agent in agents:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        agent.wait(_SECONDS_TO_END)
        finally:
            _stop(agents)
            hosts.end_processes()
            for channel in channels.values():
                channel.close()


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:])


def _start(hosts: Hosts, host: int, door: Path, settings: Mapping[str, Any], output: Any) -> "subprocess.Popen[bytes]":
    """A torchrun agent of its own session, which a terminal's Ctrl-C does not reach: who started it ends it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "PYTHONSAFEPATH": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={hosts.count}", "--nproc-per-node=1", "--max-restarts=0", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={hosts.address(0)}:{_PORT}", f"--rdzv-id=gradwire-{os.getpid()}"),
        # The host's name leads to no address of its namespace: torchrun must be told both.
        *(f"--local-addr={hosts.address(host)}", f"--rdzv-conf=is_host={str(host == 0).lower()}"),
        *("-m", "gradwire.bench.network.job", str(door), json.dumps(dict(settings))),
    ]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    return subprocess.Popen(hosts.command(host, command), **streams, env=environment, start_new_session=True)


def _meet(
    door: socket.socket, channels: dict[int, socket.socket], agents: list["subprocess.Popen[bytes]"], log: Path
) -> None:
    """Wait for every rank to say who it is."""
    limit = time.monotonic() + _SECONDS_TO_START
    door.settimeout(0.2)
    while len(channels) < len(agents):
        if time.monotonic() > limit or any(agent.poll() is not None for agent in agents):
            raise RuntimeError(f"bench network: the job did not start.\n{tail(log)}")
        with contextlib.suppress(TimeoutError):
            channel, _ = door.accept()
            channel.settimeout(None)
            channels[int.from_bytes(channel.recv(4), "big")] = channel


def _stop(agents: list["subprocess.Popen[bytes]"]) -> None:
    """End agents, which end their ranks; those that do not are ended with their session, ranks with the namespace."""
    for agent in agents:
        if agent.poll() is None:
            agent.terminate()
    limit = time.monotonic() + _SECONDS_TO_END
    for agent in agents:
        try:
            agent.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
