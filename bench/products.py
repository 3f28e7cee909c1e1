"""`gradwire bench products`: every legal product of a compressor, a feedback and an exchange, trained on real ranks.

A run is that of `gradwire train` on gloo processes of one thread each. Halfway it is saved; at its end a second run,
begun from that checkpoint by new objects, must have come to the same weights and the same state of its communicator, to
the bit.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gradwire.bench import data, machine, sweep
from gradwire.bench.grid import Grid, check_alone
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.representatives import RANKS, cover, legal_products
from gradwire.bench.runs import Record, RunFolder
from gradwire.bench.teams import deal
from gradwire.bench.train import Options, Trainer

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = Options(
    configuration="",
    optimizer="AdamW",
    layers=4,
    width=128,
    heads=4,
    context=64,
    batch=4,
    steps=50,
    seed=0,
    lr=3e-3,
    warmup=0.1,
    dtype="float32",
    host="ddp",
    bucket_mb=25.0,
    eval_every=50,
    checkpoint_every=0,
    data=[],
)
"""A run, but for its product."""

QUICK_OPTIONS = replace(sweep.QUICK_OPTIONS, host="ddp")

_KEYS = ("product",)


def main(*, quick: bool = False, output: Path | None = None) -> None:
    """Train each product, print what came of each feedback's, and write JSON if `output` is given.

    Those of `Gossip` are left out: it does not bring ranks to agree, so no host takes it; and so are those of
    `ReduceScatter`, which FSDP2 alone takes.

    Args:
        quick: A tiny model, few steps, and few products that have every part in one of them.
        output: The JSON. Runs that it holds already are not repeated.

    Raises:
        UsageError: `output` holds something else.
    """
    check_alone("bench products")
    base = QUICK_OPTIONS if quick else OPTIONS
    found = [product for product in legal_products() if product.attachable]
    if quick:
        found = cover(found, together=1)
    tasks = {(product.text,): replace(base, configuration=product.text) for product in found}
    corpus = data.standard_library()
    kept: Record = {
        "benchmark": "products",
        "machine": machine.describe() | {"threads": 1},
        "options": {name: value for name, value in asdict(base).items() if name != "configuration"},
        "parameters": num_parameters(ByteTransformer(base.layers, base.width, base.heads)),
        "data": {"name": corpus.name, "digest": corpus.digest},
        "world_size": RANKS,
        "runs": [],
    }
    Grid("check of products", kept, _KEYS, tasks, _title).run(_trained, table=table, output=output)


def train_once(options: Options, corpus: data.Corpus, device: torch.device) -> Record:
    """One run and its second half again, on every rank."""
    start = time.perf_counter()
    half = options.steps // 2
    through = Trainer(options, corpus, device)
    first = through.evaluate()
    with _shared_folder() as folder:
        for step in range(half):
            through.step(step)
        through.save(folder, half)
        resumed = Trainer(options, corpus, device)
        resumed.load(folder, half)
    for trainer in (through, resumed):
        for step in range(half, options.steps):
            trainer.step(step)
    loss, stats = through.evaluate(), through.communicator.stats
    return {
        "product": options.configuration,
        "first_loss": round(first, 5),
        "validation_loss": round(loss, 5) if math.isfinite(loss) else None,
        "diverged": not math.isfinite(loss),
        "bytes_per_step": stats.bytes_sent / options.steps,
        "skipped_steps": stats.skipped,
        "ranks_equal": through.ranks_equal(),
        "resume_exact": _equal_everywhere(through, resumed),
        "seconds": round(time.perf_counter() - start, 2),
    }


def table(kept: Record) -> "Table":
    """A record for a terminal: by feedback, how many products were trained and how they fared."""
    from rich import box
    from rich.table import Table

    rendered = Table(
        title=f"Legal products after {kept['options']['steps']} steps on {kept['world_size']} ranks",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for title in ("feedback", "products", "ranks equal", "resume exact", "loss fell", "best", "median", "worst"):
        rendered.add_column(title, justify="left" if title == "feedback" else "right")
    by_feedback: dict[str, list[Record]] = {}
    for run in kept["runs"]:
        by_feedback.setdefault(_feedback(run), []).append(run)
    for name, runs in by_feedback.items():
        counts = [len(runs), *(sum(run[key] for run in runs) for key in ("ranks_equal", "resume_exact"))]
        losses = [math.inf if run["validation_loss"] is None else run["validation_loss"] for run in runs]
        counts.append(sum(loss < run["first_loss"] for loss, run in zip(losses, runs, strict=True)))
        losses.sort()
        shown = (f"{losses[place]:.3f}" for place in (0, len(losses) // 2, -1))
        rendered.add_row(name, *map(str, counts), *shown)
    return rendered


def _feedback(run: Record) -> str:
    """The class of a run's feedback, from its text."""
    return str(run["product"]).split(" + ")[1].partition("(")[0]


@contextlib.contextmanager
def _shared_folder() -> Iterator[RunFolder]:
    """A folder that rank 0 makes, and removes when all ranks have come to the end."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext() as made:
        names = [made]
        dist.broadcast_object_list(names)
        assert names[0] is not None
        yield RunFolder(Path(names[0]))
        dist.barrier()


def _equal_everywhere(one: Trainer, other: Trainer) -> bool:
    """Whether, on every rank, both hold the same weights and the same state of their communicators, to the bit."""
    ours, theirs = ({**dict(t.model.named_parameters()), **t.communicator.state_rows()} for t in (one, other))
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    votes = torch.tensor(float(equal))
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def _trained(tasks: Sequence[Options]) -> Iterator[Record]:
    """Train one after the other; yields each run as it ends."""
    yield from deal(tasks, train_once, teams=1, ranks=RANKS, title=lambda task: task.configuration)


def _title(run: Record) -> str:
    return str(run["product"])
