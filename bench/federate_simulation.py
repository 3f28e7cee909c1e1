"""A simulation from the options of `gradwire federate`."""

from pathlib import Path
from typing import Any, Literal

from gradwire.bench import federate_method
from gradwire.bench.errors import UsageError
from gradwire.bench.federate_data import Task
from gradwire.bench.federate_method import Method
from gradwire.bench.federate_options import Options
from gradwire.bench.launch import local_device
from gradwire.federated import AsyncSimulation, Engine, LocalTraining, Simulation
from gradwire.federated.partition import Partition

AnySimulation = Simulation | AsyncSimulation

_VECTORIZE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "always": True, "never": False}


def make(options: Options, task: Task, parts: Partition, where: Engine, state: Path | None = None) -> AnySimulation:
    """A new simulation, in rounds or, if the method has a policy, of a server that does not wait.

    Args:
        options: Of the run.
        task: What is trained on.
        parts: Which examples are whose.
        where: Clients run.
        state: Folder for clients' vectors, if the options want them on disk.

    Raises:
        UsageError: parts do not fit one another.
    """
    method = federate_method.parse(options.method)
    common: dict[str, Any] = {
        "loss": task.loss,
        "uplink": method.uplink(),
        "server_lr": 1.0 if options.server_lr is None else options.server_lr,
        "server_optimizer": method.server_optimizer(options.server_lr),
        "evaluate": task.evaluate,
        "evaluate_every": options.eval_every,
        "dropout": options.dropout,
        "on_error": options.on_error,
        "times": federate_method.client_times(options.times, len(parts), options.seed),
        "store": state if options.state == "disk" else None,
        "seed": options.seed,
    }
    try:
        training = LocalTraining(
            lr=options.lr, epochs=options.epochs or 1, steps=options.local_steps, batch_size=options.batch or None
        )
        device = local_device()
        start = (task.new_module(options.seed).to(device), task.clients(parts).to(device), method.algorithm(), training)
        policy = method.policy()
        if policy is not None:
            _check(options, method, where)
            return AsyncSimulation(*start, policy=policy, concurrency=options.cohort, **common)
        return Simulation(
            *start,
            cohort_size=options.cohort,
            aggregator=method.aggregator(),
            downlink=None if options.downlink is None else federate_method.link(options.downlink, "--downlink"),
            deadline=options.deadline,
            stragglers=options.stragglers,
            engine=where,
            vectorize=_VECTORIZE[options.vectorize],
            **common,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def _check(options: Options, method: Method, where: Engine) -> None:
    """Raise UsageError if something is asked for that only rounds have."""
    asked = {
        "--engine torchrun": where.world_size > 1,
        "--downlink": options.downlink is not None,
        "--deadline": options.deadline is not None,
        "--aggregator": "aggregator" in method.terms,
        "--vectorize always": options.vectorize == "always",
    }
    for option, given in asked.items():
        if given:
            raise UsageError(f"{option}: expected rounds, got {options.method!r}, whose server does not wait for them.")
