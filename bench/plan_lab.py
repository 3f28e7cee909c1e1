"""Predictions held against the network lab: the step of every method on every network, predicted and measured.

What the lab has measured without communication is taken as the computation; compression and the cost of a collective
without a network are measured here, in as many processes as the lab has hosts, since these share the machine's cores.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from gradwire.bench import machine, plan, plan_measure, plan_power_sgd, plan_work
from gradwire.bench.errors import UsageError
from gradwire.bench.launch import leave_process_groups
from gradwire.bench.model import VOCABULARY, ByteTransformer, nats_per_byte
from gradwire.bench.network.links import title
from gradwire.bench.network.methods import NONE, POWER_SGD_HOOK, TORCH_RANK, Method, find
from gradwire.bench.network.table import network_rows
from gradwire.bench.plan_case import FRAMING, buckets
from gradwire.bench.plan_models import Model
from gradwire.bench.runs import Record, write_json
from gradwire.comm import planner
from gradwire.comm.planner import GLOO, Bucket, Call, Compute, Link, Network, Prediction
from gradwire.comm.planner_rehearsal import Shapes

WITHIN = 0.25
"""How far a prediction may be off, as a share of what is measured."""

_BYTES = 1 << 22  # of the all-reduce that shows what a collective takes without a network
_CALLS = 15
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")


def main(kept: Path, output: Path | None, measured: Path | None = None) -> None:
    """Measure, predict every cell of a kept `bench network`, print a table, write JSON if asked to.

    Args:
        kept: Results of `gradwire bench network`.
        output: The JSON.
        measured: An earlier one, whose measurements are taken in place of new ones.

    Raises:
        UsageError: There are no such results, or they lack the job without communication or a measurement.
    """
    lab = _read("--against", kept, "network", "gradwire bench network")
    if NONE.name not in lab["methods"]:
        raise UsageError(f"--against: expected results of `gradwire bench network` with {NONE.name!r}, got {kept}.")
    about = machine.describe() | {"threads": 1}
    if measured is None:
        inputs = _measured(lab)
    else:
        earlier = _read("--measured", measured, "plan", "gradwire plan --against")
        inputs, about = earlier["inputs"], earlier["machine"] | {"command": about["command"]}
    result = compare(lab, inputs) | {"machine": about}
    print(plan_lab_section(result))
    if output is not None:
        write_json(output, result)


def _read(option: str, path: Path, benchmark: str, made_by: str) -> Record:
    if not path.is_file():
        raise UsageError(f"{option}: expected results of `{made_by}`, got no file {str(path)!r}.")
    kept: Record = json.loads(path.read_text())
    if kept.get("benchmark") != benchmark:
        raise UsageError(f"{option}: expected results of `{made_by}`, got {path}.")
    return kept


def _measured(lab: Mapping[str, Any]) -> Record:
    """What `compare` needs, measured in as many processes as the lab has hosts: medians, since these are alike."""
    hosts, options = lab["options"]["hosts"], lab["options"]
    texts = sorted({text_of(method) for method in predicted(lab)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options, texts, hosts, str(Path(folder) / "store"))
        found: list[Record] = plan_measure.side_by_side(_inputs, arguments, hosts, threads=1)
    inputs = {name: statistics.median(one[name] for one in found) for name in found[0] if name != "work"}
    return inputs | {"work": {text: statistics.median(one["work"][text] for one in found) for text in texts}}


def predicted(lab: Mapping[str, Any]) -> list[Method]:
    """The lab's methods, but the one that sends nothing, whose step is what predictions start from."""
    return [method for name in lab["methods"] if (method := find(name)).kind != NONE.kind]


def text_of(method: Method) -> str:
    """The configuration whose work is measured, or the name of what torch has."""
    return method.text if method.ours else method.name if method.kind == POWER_SGD_HOOK.kind else plan_measure.PLAIN


def compare(lab: Mapping[str, Any], inputs: Mapping[str, Any]) -> Record:
    """Predicted and measured seconds of every cell.

    Args:
        lab: Results of `gradwire bench network`.
        inputs: `backward_share` of a step without communication; by configuration the `work` that it adds, as a share
            of that step, too; and of a collective without a network its `overhead` and bytes per second (`loopback`).

    Raises:
        UsageError: The inputs lack a configuration.
    """
    options, rows = lab["options"], {row.method: row for row in network_rows(lab)}
    missing = {text_of(method) for method in predicted(lab)} - inputs.get("work", {}).keys()
    if missing:
        raise UsageError(f"--measured: expected measurements of {', '.join(sorted(missing))}, too. Measure anew.")
    shapes = shapes_of(options)
    cells = []
    for text, links in lab["networks"].items():
        rates = [rate for link in links for rate in (link["up"], link["down"]) if rate is not None]
        payload = min(rates, default=math.inf) / 8 / FRAMING
        network = Network(Link(0.0, min(payload, inputs["loopback"]), inputs["overhead"]), stretch=GLOO)
        step = rows[NONE.name].seconds[text]
        codecs = {name: share * step for name, share in inputs["work"].items()}
        compute = Compute(step, inputs["backward_share"] * step)
        cells += [
            {
                "method": method.name,
                "network": text,
                "measured": rows[method.name].seconds[text],
                "predicted": predict(method, shapes, options["hosts"], network, compute, codecs).step,
            }
            for method in predicted(lab)
        ]
    about = {"command": lab["machine"]["command"], "date": lab["machine"]["date"], "hosts": options["hosts"]}
    return {"benchmark": "plan", "lab": about, "inputs": dict(inputs), "cells": cells}


def shapes_of(options: Mapping[str, Any]) -> Shapes:
    """The parameters of the lab's model."""
    with torch.device("meta"):
        model = ByteTransformer(options["layers"], options["width"], options["heads"])
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def predict(
    method: Method,
    shapes: Shapes,
    hosts: int,
    network: Network,
    compute: Compute,
    codecs: Mapping[str, float],
) -> Prediction:
    """A step of one of the lab's methods."""
    text = text_of(method)
    if method.kind == POWER_SGD_HOOK.kind:
        sent = plan_power_sgd.bucket(shapes, hosts, TORCH_RANK, codec=codecs[text])
        return planner.predict([sent], compute, network)
    if method.kind == "torch bf16":
        cut = buckets(text, shapes, hosts, codec=0.0, bucket_mb=method.bucket_mb)
        half = [Bucket(tuple(Call(c.kind, c.nbytes // 2, c.ranks) for c in b.calls), 0.0, b.ready) for b in cut]
        return planner.predict(half, compute, network)
    return plan.predict(
        text,
        shapes,
        world_size=hosts,
        network=network,
        compute=compute,
        codec=codecs[text],
        host=method.host,
        bucket_mb=method.bucket_mb,
        every=method.every,
    )


def plan_lab_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire plan --against`: predicted and measured steps, and how far they are apart."""
    cells, about, lab = results["cells"], results["machine"], results["lab"]
    networks = list(dict.fromkeys(cell["network"] for cell in cells))
    by_place = {(cell["method"], cell["network"]): cell for cell in cells}
    lines = ["| Method | " + " | ".join(title(network) for network in networks) + " |"]
    lines.append("|---" + "|---:" * len(networks) + "|")
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = [by_place[method, network] for network in networks]
        shown = [f"{1e3 * cell['predicted']:.0f}, {1e3 * cell['measured']:.0f}" for cell in row]
        lines.append(f"| `{method}` | " + " | ".join(shown) + " |")
    off = [abs(cell["predicted"] / cell["measured"] - 1) for cell in cells]
    worst = max(zip(off, cells, strict=True), key=lambda pair: pair[0])
    inputs = results["inputs"]
    return (
        "\n".join(lines) + "\n\n"
        f"Milliseconds of a step, predicted and measured, on {lab['hosts']} hosts: "
        f"{sum(share <= WITHIN for share in off)} of {len(off)} within {WITHIN:.0%}, half of them within "
        f"{statistics.median(off):.0%}; the farthest is `{worst[1]['method']}` on {title(worst[1]['network'])}, by "
        f"{worst[0]:.0%}. Predictions know the step without communication on the same links, of which backward is "
        f"{inputs['backward_share']:.0%}, each method's own work, measured in {lab['hosts']} processes at once, and a "
        f"collective without a network: {1e3 * inputs['overhead']:.2g} ms and {inputs['loopback'] / 1e6:.3g} MB/s; and "
        f"that gloo takes {GLOO.all_to_all:g} times as long for an all-to-all over a network as its bytes do, "
        f"{GLOO.all_gather:g} times for an all-gather, {GLOO.all_reduce:g} times for an all-reduce. "
        f"{about['cpu']}, torch {about['torch']}, {about['date'][:10]}. Made by `{about['command']}` from results of "
        f"`{lab['command']}`, {lab['date'][:10]}."
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Predicted over measured step times, one colour per network, as PNG; its description is the section's text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    cells = results["cells"]
    ends = [1e3 * pick(cell[key] for cell in cells for key in ("measured", "predicted")) for pick in (min, max)]
    span = [0.8 * ends[0], 1.25 * ends[1]]
    axis.plot(span, span, color=_COLOURS[0], linewidth=1)
    low, high = [(1 - WITHIN) * x for x in span], [(1 + WITHIN) * x for x in span]
    axis.fill_between(span, low, high, color="#E5E5E5", label=f"within {WITHIN:.0%}")
    for colour, network in zip(_COLOURS[1:], dict.fromkeys(cell["network"] for cell in cells), strict=False):
        some = [cell for cell in cells if cell["network"] == network]
        x, y = ([1e3 * cell[key] for cell in some] for key in ("measured", "predicted"))
        axis.plot(x, y, "o", color=colour, markersize=5, label=title(network))
    axis.set(xscale="log", yscale="log", xlim=span, ylim=span)
    axis.set(xlabel="measured step, ms", ylabel="predicted step, ms")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Predicted and measured steps on {results['lab']['hosts']} hosts", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": plan_lab_section(results)})


def _inputs(
    options: Mapping[str, Any], texts: Sequence[str], hosts: int, store: str, together: Callable[[], object]
) -> Record:
    """What `compare` needs, in one of the processes."""
    device = torch.device("cpu")
    text = torch.randint(VOCABULARY, (options["batch"], options["context"]))

    def make() -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
        module = ByteTransformer(options["layers"], options["width"], options["heads"])
        return module, lambda: nats_per_byte(module(text), text)

    model = Model("", shapes_of(options), None, ((make, 1.0),))
    compute = plan_measure.compute(model, device, together)
    ours = [text for text in texts if text != POWER_SGD_HOOK.name]
    work = plan_work.seconds(ours, model, compute, hosts, device, together)
    if POWER_SGD_HOOK.name in texts:
        with plan_power_sgd.training(model, TORCH_RANK, together) as step:
            work[POWER_SGD_HOOK.name] = compute.step * plan_work.added(step, model, device, together)
    overhead, rate = _loopback(store, hosts)
    together()
    return {
        "backward_share": compute.backward / compute.step,
        "work": {text: seconds / compute.step for text, seconds in work.items()},
        "overhead": overhead,
        "loopback": rate,
    }


def _loopback(store: str, size: int) -> tuple[float, float]:
    """Seconds of an all-reduce of one number, and bytes per second of a long one, on as many processes."""
    shared = FileStore(store, size)
    rank = shared.add("arrived", 1) - 1
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=size)

    def seconds(numel: int) -> float:
        x, spans = torch.zeros(numel), []
        for _ in range(_CALLS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)

    overhead, long = seconds(1), seconds(_BYTES // 4)
    dist.barrier()
    leave_process_groups()
    return overhead, 2 * (size - 1) / size * _BYTES / max(1e-9, long - overhead)
