"""`TraceTimes`: what clients' devices and links can do, and when they are there, from a CSV file."""

import csv
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from gradwire.compression import counter_rng
from gradwire.federated.client_times import ClientTimes, Job
from gradwire.federated.clock import to_seconds, to_ticks

COLUMNS = ("client", "seconds_per_example", "bytes_per_second_down", "bytes_per_second_up", "available")
"""Of the file, in any order; `available` may be left out."""
_MOST_CLIENTS = 10_000_000
_MOST_SECONDS = 1e9


@final
@dataclass(frozen=True)
class ClientTrace:
    """One client's device, link and hours.

    Args:
        seconds_per_example: Of training, 0 <= seconds_per_example <= 1e9.
        bytes_per_second_down: From the server, >= 1e-9; may be infinite.
        bytes_per_second_up: To the server, >= 1e-9; may be infinite.
        available: Intervals (start, end) in seconds, 0 <= start < end <= 1e9, in order and apart; none for always.
    """

    seconds_per_example: float
    bytes_per_second_down: float = math.inf
    bytes_per_second_up: float = math.inf
    available: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seconds_per_example <= _MOST_SECONDS:
            raise ValueError(f"ClientTrace: expected 0 <= seconds_per_example <= 1e9, got {self.seconds_per_example}.")
        for name in ("bytes_per_second_down", "bytes_per_second_up"):
            if not getattr(self, name) >= 1 / _MOST_SECONDS:
                raise ValueError(f"ClientTrace: expected {name} >= 1e-9, got {getattr(self, name)}.")
        last = 0.0
        for number, (start, end) in enumerate(self.available):
            apart = start > last or (number == 0 and start == 0)
            if not (apart and start + 1e-6 <= end <= _MOST_SECONDS):
                raise ValueError(
                    "ClientTrace: expected intervals from 0 to 1e9, in order, apart, each of a microsecond at least, "
                    f"got {start:g}-{end:g}."
                )
            last = end


@final
class TraceTimes(ClientTimes):
    """Times from what devices and links can do: the model's way down, training, and the message's way up.

        T = bytes_down / bytes_per_second_down + examples seconds_per_example + bytes_up / bytes_per_second_up

    A client works only while it is available, and goes on where it stopped when it is back.

    Args:
        clients: A `ClientTrace` each.
        period: Seconds after which the availability starts over, such as a week; no interval may end later.
            If None, clients are available after their last interval's end as if it had none.

    Cost:
        O(log of a client's intervals) for each job.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> trace = ClientTrace(seconds_per_example=0.5, available=((0.0, 2.0), (10.0, 12.0)))
        >>> times = TraceTimes([trace], period=20.0)
        >>> to_seconds(times.duration(Job(client=0, examples=6), seed=0))  # 2 seconds, 8 away, 1 second
        11.0

    Reference:
        What a trace says follows Lai, Dai, Singapuram, Liu, Zhu, Madhyastha, Chowdhury. FedScale: Benchmarking Model
        and System Performance of Federated Learning at Scale. ICML 2022. arXiv:2105.11367, section 3.
    """

    depends_on_work: ClassVar[bool] = True

    def __init__(self, clients: Sequence[ClientTrace], *, period: float | None = None) -> None:
        if period is not None and not 0 < period <= _MOST_SECONDS:
            raise ValueError(f"TraceTimes: expected 0 < period <= 1e9, got period={period}.")
        self.clients, self.period = list(clients), period
        self._period = None if period is None else to_ticks(period)
        self._calendars = []
        for client, trace in enumerate(self.clients):
            if period is not None and trace.available and trace.available[-1][1] > period:
                raise ValueError(
                    f"TraceTimes: expected intervals within period={period:g}, got one to {trace.available[-1][1]:g} "
                    f"of client {client}."
                )
            self._calendars.append(_Calendar(trace.available, self._period))
        self.always_available = not any(trace.available for trace in self.clients)  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        """Equal for equal traces, in every process."""
        return f"{counter_rng.fold(repr((self.clients, self.period))):016x}"

    @classmethod
    def from_csv(cls, path: Path | str, *, period: float | None = None) -> "TraceTimes":
        """Read a trace.

        The first line names the columns `client`, `seconds_per_example`, `bytes_per_second_down`,
        `bytes_per_second_up` and, if wanted, `available`, whose intervals read `0-3600;7200-9000.5`, in seconds; empty
        for always. Clients are numbered from 0 without gaps, in any order.

        Raises:
            ValueError: naming the line that is not as expected; nothing of the file is executed or guessed.
        """
        found: dict[int, ClientTrace] = {}
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            try:
                header = [name.strip() for name in next(reader, [])]
                if len(set(header)) != len(header) or not set(COLUMNS[:4]) <= set(header) <= set(COLUMNS):
                    raise ValueError(f"expected columns {', '.join(COLUMNS)}, got {', '.join(header) or 'none'}")
                for fields in reader:
                    line = reader.line_num
                    if not fields:
                        continue
                    if len(fields) != len(header):
                        raise ValueError(f"expected {len(header)} fields, got {len(fields)}")
                    row = dict(zip(header, fields, strict=True))
                    client = int(_number(row, "client"))
                    if client != _number(row, "client") or not 0 <= client < _MOST_CLIENTS:
                        raise ValueError(f"expected a client's number from 0 on, got {row['client'][:40]!r}")
                    if client in found:
                        raise ValueError(f"expected each client once, got client {client} again")
                    seconds, down, up = (_number(row, name) for name in COLUMNS[1:4])
                    found[client] = ClientTrace(seconds, down, up, _intervals(row.get("available", "")))
            except (ValueError, csv.Error, OverflowError) as error:
                raise ValueError(f"TraceTimes: {path}, line {line}: {str(error).rstrip('.')}.") from error
        if not found or max(found) != len(found) - 1:
            missing = next((client for client in range(len(found) + 1) if client not in found), 0)
            raise ValueError(f"TraceTimes: {path}: expected clients 0, 1, … without gaps, got no client {missing}.")
        return cls([found[client] for client in range(len(found))], period=period)

    def check(self, clients: int) -> None:
        """Raise ValueError if the trace has fewer clients."""
        if len(self.clients) < clients:
            raise ValueError(f"TraceTimes: expected a trace of {clients} clients, got one of {len(self.clients)}.")

    def _work(self, job: Job) -> tuple[int, int]:
        """Ticks that transfers and training take while the client is there."""
        trace = self.clients[job.client]
        transfer = job.bytes_down / trace.bytes_per_second_down + job.bytes_up / trace.bytes_per_second_up
        return to_ticks(transfer), to_ticks(job.examples * trace.seconds_per_example)

    def duration(self, job: Job, seed: int) -> int:
        """Transfers and training, and the time away between them."""
        return max(1, self._calendars[job.client].after(job.start, sum(self._work(job))) - job.start)

    def mean(self, job: Job) -> float | None:
        """The time itself, for clients that are always available."""
        return to_seconds(self.duration(job, 0)) if self.always_available else None

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        """Rounded up, for clients that are always available."""
        return float(-(-self.duration(job, 0) // interval)) if self.always_available else None

    def share_done(self, job: Job, seed: int, deadline: int) -> float:
        """What is left for training of the time there, once transfers are done."""
        transfer, training = self._work(job)
        left = self._calendars[job.client].between(job.start, job.start + deadline) - transfer
        return float(left >= 0) if not training else min(1.0, max(0.0, left / training))

    def available_from(self, client: int, tick: int) -> int:
        """Now, or the start of the client's next interval."""
        return self._calendars[client].after(tick, 1) - 1


@final
class _Calendar:
    """A client's intervals, in ticks, and how much time of them has gone by at their starts."""

    def __init__(self, intervals: Sequence[tuple[float, float]], period: int | None) -> None:
        self.starts = [to_ticks(start) for start, _ in intervals]
        self.ends = [to_ticks(end) for _, end in intervals]
        self.period = period
        self.gone = [0]
        for start, end in zip(self.starts, self.ends, strict=True):
            self.gone.append(self.gone[-1] + end - start)

    def _until(self, tick: int) -> int:
        """Time there, from 0 to a tick."""
        if not self.starts:
            return tick
        rounds, tick = divmod(tick, self.period) if self.period is not None else (0, tick)
        index = bisect_right(self.starts, tick) - 1
        there = 0 if index < 0 else self.gone[index] + min(tick, self.ends[index]) - self.starts[index]
        if self.period is None:
            there += max(0, tick - self.ends[-1])
        return rounds * self.gone[-1] + there

    def between(self, first: int, last: int) -> int:
        """Time there, from one tick to another."""
        return self._until(last) - self._until(first)

    def after(self, tick: int, work: int) -> int:
        """The first tick at which so much time there has gone by since `tick`."""
        if not self.starts or work == 0:
            return tick + work
        target = self._until(tick) + work
        if self.period is None:
            rounds = 0
            if target > self.gone[-1]:
                return self.ends[-1] + target - self.gone[-1]
        else:
            rounds = (target - 1) // self.gone[-1]
            target -= rounds * self.gone[-1]
        index = bisect_right(self.gone, target - 1) - 1
        return rounds * (self.period or 0) + self.starts[index] + target - self.gone[index]


def _number(row: dict[str, str], name: str) -> float:
    """A field as a number; NaN is none."""
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"expected a number in {name}, got {row[name][:40]!r}")
    return value


def _intervals(text: str) -> tuple[tuple[float, float], ...]:
    """Intervals of `0-3600;7200-9000`."""
    pairs = []
    for part in text.split(";") if text.strip() else []:
        start, dash, end = part.strip().partition("-")
        try:
            pairs.append((float(start), float(end)))
        except ValueError:
            dash = ""
        if not dash:
            raise ValueError(f"expected intervals like 0-3600;7200-9000 in available, got {part[:40]!r}")
    return tuple(pairs)
