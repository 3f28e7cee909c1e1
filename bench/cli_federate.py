"""The `gradwire federate` command."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradwire.bench.errors import UsageError

_METHOD, _CLIENTS, _LOCAL, _RUN = "Method", "Clients", "Local training", "Run and output"


def federate(
    context: typer.Context,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help='FedAvg unless named: SCAFFOLD, "SCAFCOM(TopK(ratio=0.01))"; or "FedBuff(buffer=5)" and the like, '
            "whose server does not wait.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    uplink: Annotated[
        str | None, typer.Option(help='What clients send: "TopK(ratio=0.01) + EF".', rich_help_panel=_METHOD)
    ] = None,
    downlink: Annotated[
        str | None, typer.Option(help='What the server sends: "TopK(ratio=0.1)".', rich_help_panel=_METHOD)
    ] = None,
    aggregator: Annotated[
        str | None,
        typer.Option(help='In place of the weighted mean: CoordinateMedian, "Krum(2)".', rich_help_panel=_METHOD),
    ] = None,
    server_optimizer: Annotated[
        str | None,
        typer.Option(
            help='Of gradwire.federated, gradwire.optim or torch.optim: "FedAdam(lr=0.03)", "SGD(momentum=0.9)".',
            rich_help_panel=_METHOD,
        ),
    ] = None,
    server_lr: Annotated[
        float | None,
        typer.Option(min=0.0, help="1 for plain steps and SGD; an optimizer's own otherwise.", rich_help_panel=_METHOD),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...",
            help='Simulate each method on the same clients and draw all: FedAvg "FedAvg + QSGD(levels=15)" SCAFFOLD.',
            rich_help_panel=_METHOD,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="digits; text: the standard library, a client per package; or a folder with one file per client, "
            "for next-byte prediction.",
            rich_help_panel=_CLIENTS,
        ),
    ] = "digits",
    partition: Annotated[
        str | None,
        typer.Option(
            help='"dirichlet(0.3)", "dirichlet_clients(0.3)", "shards(2)", iid, by_id, or a partition.json of a run.',
            rich_help_panel=_CLIENTS,
        ),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="100 of digits, else all that there are.", rich_help_panel=_CLIENTS)
    ] = None,
    cohort: Annotated[int | None, typer.Option(min=1, help="Clients of a round; 10.", rich_help_panel=_CLIENTS)] = None,
    dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Chance that a client does not answer.", rich_help_panel=_CLIENTS)
    ] = 0.0,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="When a client raises an error.", rich_help_panel=_CLIENTS)
    ] = "raise",
    times: Annotated[
        str,
        typer.Option(
            help='How long clients take: devices, "ExponentialTimes(2.0)", a trace.csv.', rich_help_panel=_CLIENTS
        ),
    ] = "devices",
    deadline: Annotated[
        float | None,
        typer.Option(
            min=1e-3, help="Virtual seconds after which a round ends for all clients.", rich_help_panel=_CLIENTS
        ),
    ] = None,
    stragglers: Annotated[
        Literal["drop", "partial"],
        typer.Option(help="Whether what they have done by then counts.", rich_help_panel=_CLIENTS),
    ] = "drop",
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="Batches of a client in a round; 10.", rich_help_panel=_LOCAL)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="In their place, passes over its examples.", rich_help_panel=_LOCAL)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=0, help="Examples in a batch; 32, of text 16. 0: all.", rich_help_panel=_LOCAL)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Of clients; 0.1, of text 0.3.", rich_help_panel=_LOCAL)
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="100, of text 60.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_RUN)] = 0,
    engine: Annotated[
        Literal["serial", "torchrun"] | None,
        typer.Option(help="This process, or all that torchrun started; whichever it is.", rich_help_panel=_RUN),
    ] = None,
    vectorize: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(help="Train a cohort as one batched model.", rich_help_panel=_RUN),
    ] = "auto",
    state: Annotated[
        Literal["memory", "disk"], typer.Option(help="Where clients' vectors lie.", rich_help_panel=_RUN)
    ] = "memory",
    eval_every: Annotated[int, typer.Option(min=1, help="Rounds between evaluations.", rich_help_panel=_RUN)] = 1,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Rounds between checkpoints; 0: a tenth of all.", rich_help_panel=_RUN)
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Run folder; runs/TIME otherwise.", rich_help_panel=_RUN)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Run folder to continue, with its own options; --rounds may be raised.", rich_help_panel=_RUN
        ),
    ] = None,
) -> None:
    """Simulate federated learning: who holds what, who is asked, what is sent, and what comes of it."""
    typed = {name for name in context.params if "COMMANDLINE" in str(context.get_parameter_source(name))}
    families = {
        "algorithm": algorithm,
        "compressor": uplink,
        "aggregator": aggregator,
        "server optimizer": server_optimizer,
    }
    terms = {family: text for family, text in families.items() if text is not None}
    if compare is not None and (terms or resume is not None):
        raise UsageError(
            "--compare: expected whole methods and a new run, without --algorithm, --uplink, --aggregator, "
            "--server-optimizer or --resume."
        )
    if resume is not None and output is not None:
        raise UsageError("--resume: expected no --output; the run goes on in its own folder.")
    for name, value in (("--lr", lr), ("--server-lr", server_lr)):
        if value == 0:
            raise UsageError(f"{name}: expected a number > 0, got 0.")

    from gradwire.bench import federate as session
    from gradwire.bench import federate_data, federate_method, federate_options

    values = {
        "method": federate_method.join(terms),
        "data": data if data in ("digits", "text") else str(Path(data).resolve()),
        "clients": clients,
        "partition": str(Path(partition).resolve()) if partition and partition.endswith(".json") else partition,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "server_lr": server_lr,
        "downlink": downlink,
        "dropout": dropout,
        "on_error": on_error,
        "times": str(Path(times).resolve()) if times.endswith(".csv") else times,
        "deadline": deadline,
        "stragglers": stragglers,
        "seed": seed,
        "vectorize": vectorize,
        "state": state,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
    }
    if resume is not None:
        given = {name: value for name, value in values.items() if name in typed or (name == "method" and terms)}
        options = federate_options.resumed(resume, given)
        with session.engine(engine) as where:
            session.run(options, federate_data.load(options.data), resume, where, resume=True)
        return
    task = federate_data.load(data)
    options = federate_options.checked(values, task)
    with session.engine(engine) as where:
        if compare is None:
            session.run(options, task, output, where, resume=False)
        else:
            command = shlex.join(["gradwire", *sys.argv[1:]])
            session.compare(options, task, list(dict.fromkeys(compare)), output, where, command=command)
