"""Options of `gradwire federate`: all that decides a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from gradwire.bench import federate_method
from gradwire.bench.errors import UsageError
from gradwire.bench.federate_data import Task
from gradwire.bench.runs import RunFolder

_MAY_CHANGE = ("rounds", "eval_every", "checkpoint_every")
"""Options that a resumed run may be given anew: they have no influence on a round."""


@final
@dataclass(frozen=True)
class Options:
    """Everything that decides a run.

    Args:
        method: Algorithm, uplink, aggregator and server optimizer as text (`gradwire.bench.federate_method`).
        data: "digits", "text" or a folder.
        clients: In all, >= 1.
        partition: Which examples are whose, as text (`gradwire.bench.federate_data.split`).
        cohort: Clients of a round, 1 <= cohort <= clients.
        rounds: >= 1.
        local_steps: Batches of a client in a round, >= 1; None for `epochs`.
        epochs: Passes over its examples, >= 1; None for `local_steps`.
        batch: Examples in a batch, >= 1; 0 for all of a client's.
        lr: Of clients, > 0.
        server_lr: Of the server, > 0; None for 1, or the server optimizer's own.
        downlink: Compressor of what the server sends, as text; None for none.
        dropout: Probability that a client that was drawn does not answer, 0 <= dropout < 1.
        on_error: Whether an error in a client stops the run, or is counted and skipped.
        times: How long clients take, as text (`gradwire.bench.federate_method.client_times`).
        deadline: Virtual seconds after which a round goes on without those that are not done, > 0; None for none.
        stragglers: What they have done by then counts ("partial") or not ("drop").
        seed: Of weights, partition, cohorts, batches and compression.
        vectorize: Whether a cohort is trained as one batched model; "auto" where that is faster.
        state: Where clients' vectors lie.
        eval_every: Rounds between evaluations, >= 1.
        checkpoint_every: Rounds between checkpoints, >= 1.
    """

    method: str
    data: str
    clients: int
    partition: str
    cohort: int
    rounds: int
    local_steps: int | None
    epochs: int | None
    batch: int
    lr: float
    server_lr: float | None
    downlink: str | None
    dropout: float
    on_error: Literal["raise", "skip"]
    times: str
    deadline: float | None
    stragglers: Literal["drop", "partial"]
    seed: int
    vectorize: Literal["auto", "always", "never"]
    state: Literal["memory", "disk"]
    eval_every: int
    checkpoint_every: int


def checked(values: Mapping[str, Any], task: Task) -> Options:
    """Options, with what the data decides where the user says nothing, and with the method tried out.

    Raises:
        UsageError: a value is wrong.
    """
    chosen = dict(values)
    if chosen["local_steps"] is not None and chosen["epochs"] is not None:
        raise UsageError("--epochs: expected either --local-steps or --epochs, got both.")
    if chosen["local_steps"] is None and chosen["epochs"] is None:
        chosen["local_steps"] = task.defaults["local_steps"]
    for name in ("clients", "partition", "rounds", "batch", "lr"):
        chosen[name] = task.defaults[name] if chosen[name] is None else chosen[name]
    chosen["cohort"] = min(10, chosen["clients"]) if chosen["cohort"] is None else chosen["cohort"]
    chosen["checkpoint_every"] = chosen["checkpoint_every"] or max(1, chosen["rounds"] // 10)
    if chosen["cohort"] > chosen["clients"]:
        raise UsageError(f"--cohort: expected at most {chosen['clients']}, all clients, got {chosen['cohort']}.")
    federate_method.parse(chosen["method"])
    return Options(**chosen)


def resumed(path: Path, given: Mapping[str, Any]) -> Options:
    """The options of an earlier run.

    Args:
        path: Its run folder.
        given: Options that the user has typed now.

    Raises:
        UsageError: there is nothing to resume, or an option differs.
    """
    folder = RunFolder(path, "round")
    newest = folder.newest_checkpoint()
    if newest is None:
        raise UsageError(f"--resume: expected a run folder with a checkpoint, got {str(path)!r}.")
    saved = folder.options()
    for name, value in given.items():
        if name in _MAY_CHANGE:
            saved[name] = value
        elif value != saved.get(name, value):
            raise UsageError(
                f"--resume: expected {name}={saved[name]!r} as the run began, got {name}={value!r}. "
                "Leave the option out, or start a new run."
            )
    if newest >= saved["rounds"]:
        raise UsageError(
            f"--resume: expected more than the {newest} rounds that {str(path)!r} has, got --rounds {saved['rounds']}."
        )
    return Options(**saved)
