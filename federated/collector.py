"""`Collector`: trains a cohort, in one process or several, and brings together what its clients send."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.federated.aggregators import Aggregator
from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.client_store import ClientStore
from gradwire.federated.engine import Engine
from gradwire.federated.round_record import Tally


@final
@dataclass
class Collector:
    """Has the clients of a cohort trained where the engine says, and their messages aggregated on every rank.

        fetch vectors --> train --> add up, on this rank and over ranks --> (the server's step) --> keep vectors

    Args:
        runner: Trains a client.
        aggregators: By message.
        engine: Deals clients out.
        store: Clients' vectors.
        on_error: Whether an error in a client stops the run, on all ranks, or is skipped.
    """

    runner: ClientRunner
    aggregators: Mapping[str, Aggregator]
    engine: Engine
    store: ClientStore
    on_error: Literal["raise", "skip"]
    _checks_each: bool = field(default=False, init=False)

    def collect(self, cohort: Sequence[int], number: int, start: Tensor, received: Mapping[str, Tensor]) -> Tally:
        """Train the clients of a round; their messages are in the aggregators then.

        Args:
            cohort: Clients that take part.
            number: Of the round.
            start: What they train from.
            received: What they receive beside it.
        """
        engine, linear = self.engine, all(aggregator.linear for aggregator in self.aggregators.values())
        loads = [self.runner.cost(client, number) for client in cohort]
        self._ranks = engine.deal(loads, [self.store.owner(client) for client in cohort] if self.store.sizes else None)
        self._fetch(cohort)
        several = engine.world_size > 1
        gathers = several and (engine.exact or not linear)
        checks = self._checks_each or gathers or not linear
        tally, kept = self._train(cohort, number, start, received, checks=checks, gathers=gathers)
        if not checks and not all(math.isfinite(a.sums.sum().item()) for a in self.aggregators.values()):
            self._checks_each = True  # nothing was kept yet: the same again, but for those that are not finite
            tally, kept = self._train(cohort, number, start, received, checks=True, gathers=gathers)
        sums = [] if gathers else [a.sums for a in self.aggregators.values() if a.linear]
        engine.sum_([tally.pack(), *(sums if several else [])])
        tally.unpack(engine)
        if gathers:
            self._gather(kept, tally, start)
        return tally

    def _train(
        self,
        cohort: Sequence[int],
        number: int,
        start: Tensor,
        received: Mapping[str, Tensor],
        *,
        checks: bool,
        gathers: bool,
    ) -> tuple[Tally, dict[str, list[Tensor]]]:
        """Train the clients that run here, and add their messages up, or keep them to be gathered.

        Sums show whether any message was not finite, at one look a round; with `checks` every message is looked at.
        """
        runner, several = self.runner, self.engine.world_size > 1
        counters = 0 if runner.buffers is None else runner.buffers.sent_counters
        tally = Tally(cohort, runner.algorithm.scalars, counters)
        for name, aggregator in self.aggregators.items():
            numel, dtype = self._form(name, start)
            aggregator.reset(numel, dtype, start.device)
        kept: dict[str, list[Tensor]] = {name: [] for name in self.aggregators}
        positions = [position for position, rank in enumerate(self._ranks) if rank == self.engine.rank]
        messages = runner.run([cohort[position] for position in positions], number, start, received)
        for position, message in zip(positions, messages, strict=True):
            if isinstance(message, Exception):
                if self.on_error == "raise" and not several:
                    raise message
                tally.fail(position, message, raised=self.on_error == "raise")
                if self.on_error == "raise":
                    break
                continue
            if not message.sound or (checks and not message.finite):
                tally.drop(position, message.nbytes)
                continue
            tally.take(position, message)
            if message.state:
                tally.pending.append(message)
            for name, aggregator in self.aggregators.items():
                vector = message.vectors.pop(name)
                if gathers:
                    kept[name].append(vector.clone())
                else:
                    aggregator.add(vector, message.weight)
        return tally, kept

    def keep(self, tally: Tally, settled: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Store the new vectors of the clients that ran here, where they belong."""
        self.store.lent.clear()
        if self.store.sizes:
            engine, store = self.engine, self.store
            moves = self._moves(tally.cohort, tally.accepted)
            for client, row in self._travel([(client, source, owner) for client, owner, source in moves], settled):
                store.put(client, store.split(row))
            for client, vectors in settled.items():
                if store.owner(client) == engine.rank:
                    store.put(client, vectors)

    def _form(self, name: str, start: Tensor) -> tuple[int, torch.dtype]:
        """Entries and dtype of a message."""
        buffers = self.runner.buffers
        if buffers is not None and name == buffers.message:
            return buffers.numel, torch.float64
        return start.numel(), start.dtype

    def _gather(self, kept: dict[str, list[Tensor]], tally: Tally, start: Tensor) -> None:
        """Add all ranks' messages in the order of the cohort."""
        accepted = [rank for rank, ok in zip(self._ranks, tally.accepted, strict=True) if ok]
        weights = [weight for weight, ok in zip(tally.weights, tally.accepted, strict=True) if ok]
        counts = [accepted.count(rank) for rank in range(self.engine.world_size)]
        for name, aggregator in self.aggregators.items():
            numel, dtype = self._form(name, start)
            rows = torch.stack(kept[name]) if kept[name] else torch.empty((0, numel), dtype=dtype, device=start.device)
            kept[name] = []
            parts = [iter(part) for part in self.engine.gather(rows, counts)]
            for rank, weight in zip(accepted, weights, strict=True):
                aggregator.add(next(parts[rank]), weight)

    def _moves(self, cohort: Sequence[int], which: Sequence[bool] | None = None) -> list[tuple[int, int, int]]:
        """Clients that do not train where their vectors lie: (client, its owner, the rank that it trains on)."""
        found = []
        for position, client in enumerate(cohort):
            owner, rank = self.store.owner(client), self._ranks[position]
            if owner != rank and (which is None or which[position]):
                found.append((client, owner, rank))
        return found

    def _fetch(self, cohort: Sequence[int]) -> None:
        """Lend the vectors of clients to the ranks that they train on."""
        store = self.store
        if not store.sizes or self.engine.world_size == 1:
            return
        moves = self._moves(cohort)
        own = {client: store.get(client) for client, owner, _ in moves if owner == self.engine.rank}
        store.lent = {client: store.split(row) for client, row in self._travel(moves, own)}

    def _travel(
        self, moves: Sequence[tuple[int, int, int]], vectors: Mapping[int, Mapping[str, Tensor]]
    ) -> list[tuple[int, Tensor]]:
        """Send vectors of (client, from, to), in one all-to-all; returns the clients and rows that come here."""
        if not moves:
            return []
        engine, store = self.engine, self.store
        ranks, me, empty = range(engine.world_size), engine.rank, torch.empty(0, dtype=store.dtype)
        out = [[store.row(vectors[client]) for client, *way in moves if way == [me, rank]] for rank in ranks]
        coming = [[client for client, *way in moves if way == [rank, me]] for rank in ranks]
        parts = engine.exchange(
            [torch.cat(rows) if rows else empty for rows in out], [len(clients) * store.numel for clients in coming]
        )
        found: list[tuple[int, Tensor]] = []
        for clients, part in zip(coming, parts, strict=True):
            found += zip(clients, part.view(-1, store.numel).clone() if clients else [], strict=True)
        return found
