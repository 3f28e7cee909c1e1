"""`Hosts`: network namespaces joined by a bridge, and nothing else of this machine's network touched.

    host 0 [eth0 10.77.0.1] ---- [p0 |        |
    host 1 [eth0 10.77.0.2] ---- [p1 | switch |
    ...                              |        |

Every namespace is named after this process. Both ends of a link are created inside of the namespaces where they belong;
none ever stands among the machine's own interfaces.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, final

from gradwire.bench.errors import UsageError
from gradwire.bench.network.links import Network, tbf

INTERFACE = "eth0"
"""The one interface of every host, beside its loopback."""

_NAME = "gradwire-{process}-{place}"
_SWITCH = "switch"
_PATTERN = re.compile(r"gradwire-(\d+)-(?:switch|h\d+)")
_SECONDS_TO_END = 3.0


@final
class Hosts:
    """Namespaces of this process with one link each; `hosts()` makes and removes them.

    Args:
        count: Hosts, from 2 to 250.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.names = [_NAME.format(process=os.getpid(), place=f"h{host}") for host in range(count)]
        self._switch = _NAME.format(process=os.getpid(), place=_SWITCH)

    def address(self, host: int) -> str:
        """Its address on the bridge."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """A command as it runs on this host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def shape(self, network: Network) -> None:
        """Limit what every host sends and receives, also while connections are open."""
        segments = "1" if network.counts_frames else "65535"
        for host, link in enumerate(network.links):
            for namespace, device, rate in (
                (self.names[host], INTERFACE, link.up),
                (self._switch, f"p{host}", link.down),
            ):
                _ip("-n", namespace, "link", "set", device, "gso_max_segs", segments)
                if rate is None:
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                else:
                    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *tbf(rate))

    def build(self) -> None:
        """Create namespaces, bridge and links, unshaped."""
        for name in (self._switch, *self.names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host, name in enumerate(self.names):
            port = f"p{host}"
            ends = ("netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("link", "add", INTERFACE, *ends)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")

    def end_processes(self) -> None:
        """End every process that is left in the namespaces."""
        _end_inside(self.names)

    def remove(self) -> None:
        """The same, and delete the namespaces, with their links."""
        _remove([*self.names, self._switch])


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Namespaces that are gone after this block, however it ends; SIGTERM ends it as an exception would.

    Args:
        count: Hosts.

    Raises:
        UsageError: this machine or user cannot make namespaces.
    """
    if (why := why_not()) is not None:
        raise UsageError(f"bench network: {why}")
    sweep()
    made = Hosts(count)
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # not in the main thread: nobody to tell
        signal.signal(signal.SIGTERM, _end)
    try:
        made.build()
        yield made
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
        made.remove()


def why_not() -> str | None:
    """Why namespaces cannot be made here, as a sentence, or None if they can."""
    if not sys.platform.startswith("linux"):
        return f"expected Linux, whose network namespaces it is made of, got {sys.platform}."
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"expected the command {tool}, found none. Install iproute2."
    if os.geteuid() != 0:
        return f"expected root, which network namespaces need, got user {os.geteuid()}. Use sudo."
    probe = _NAME.format(process=os.getpid(), place="h0")
    made = _run("ip", "netns", "add", probe, check=False)
    if made.returncode:
        return f"expected to be allowed to make network namespaces, got {made.stderr.strip()!r}."
    entered = _run("ip", "netns", "exec", probe, "true", check=False)
    _ip("netns", "delete", probe)
    if entered.returncode:
        return f"expected to be allowed to enter network namespaces, got {entered.stderr.strip()!r}."
    return None


def sweep() -> None:
    """Remove namespaces of this kind whose process has ended without it."""
    _remove([name for name, process in standing().items() if not Path(f"/proc/{process}").exists()])


def standing() -> dict[str, int]:
    """Namespaces of this kind on the machine, and the process that made each."""
    listed = _run("ip", "netns", "list").stdout.splitlines()
    found = {line.split()[0]: _PATTERN.fullmatch(line.split()[0]) for line in listed if line}
    return {name: int(match[1]) for name, match in found.items() if match}


def _remove(names: Sequence[str]) -> None:
    existing = standing()
    names = [name for name in names if name in existing]
    _end_inside(names)
    for name in names:
        _ip("netns", "delete", name)


def _end_inside(names: Sequence[str]) -> None:
    limit = time.monotonic() + _SECONDS_TO_END
    stop = signal.SIGTERM
    while inside := [int(line) for name in names for line in _run("ip", "netns", "pids", name).stdout.split()]:
        for process in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, stop)
        if time.monotonic() > limit:
            stop = signal.SIGKILL
        time.sleep(0.05)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, check: bool = True) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"bench network: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done
