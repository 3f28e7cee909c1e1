"""The `gradwire` command. Heavy imports stand inside the commands, so that `--help` is quick."""

import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import gradwire
from gradwire.bench.cli_bench import bench
from gradwire.bench.cli_federate import federate
from gradwire.bench.cli_plan import plan
from gradwire.bench.errors import UsageError

app = typer.Typer(
    help="Train across slow links: optimizers, gradient compression and error feedback for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command()(federate)
app.command()(plan)

_MODEL, _GRADIENTS, _OUTPUT = "Model and data", "Gradients and weights", "Output"
_VARIADIC = (
    *("--compare", "--data", "--optimizers", "--lrs", "--methods", "--world-sizes", "--problems", "--claims"),
    *("--networks", "--works", "--simulators"),
)


@app.command()
def train(
    context: typer.Context,
    optimizer: Annotated[
        str,
        typer.Option(
            help='A class of gradwire.optim or torch.optim: adamp, "SGD(lr=0.1)", "DeMo(k=8)".',
            rich_help_panel=_GRADIENTS,
        ),
    ] = "AdamW",
    compressor: Annotated[
        str | None, typer.Option(help='What is sent: "ChunkTopK(k=32)".', rich_help_panel=_GRADIENTS)
    ] = None,
    feedback: Annotated[
        str | None, typer.Option(help="How what is not sent is remembered: EF, EF21.", rich_help_panel=_GRADIENTS)
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(help='How it travels: AllGather, "TwoPhase(second=BlockQuantize)".', rich_help_panel=_GRADIENTS),
    ] = None,
    communicator: Annotated[
        str | None,
        typer.Option(help='All three in one: "PowerSGD(matrix_rank=4)", Warmup.', rich_help_panel=_GRADIENTS),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...",
            help='Train each configuration on the same seed: "dense" "ScaledSign + EF" …; "default" names eight.',
            rich_help_panel=_GRADIENTS,
        ),
    ] = None,
    host: Annotated[
        Literal["ddp", "fsdp2", "hsdp", "deepspeed", "loop"],
        typer.Option(
            help="DistributedDataParallel; FSDP2 on all ranks; FSDP2 inside groups of ranks, the communicator across "
            "them; a DeepSpeed engine; a plain loop.",
            rich_help_panel=_GRADIENTS,
        ),
    ] = "ddp",
    shards: Annotated[
        int,
        typer.Option(
            min=0, help="Ranks in a group of hsdp; 0: those of a machine, or two.", rich_help_panel=_GRADIENTS
        ),
    ] = 0,
    zero_stage: Annotated[
        int, typer.Option(min=0, max=2, help="ZeRO stage of deepspeed.", rich_help_panel=_GRADIENTS)
    ] = 0,
    bucket_mb: Annotated[
        float, typer.Option(min=0.001, help="Size of a gradient bucket in MiB.", rich_help_panel=_GRADIENTS)
    ] = 25.0,
    lr: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate, if OPTIMIZER names none.", rich_help_panel=_GRADIENTS)
    ] = 3e-3,
    warmup: Annotated[
        float,
        typer.Option(min=0.0, max=0.99, help="Share of the steps over which it rises.", rich_help_panel=_GRADIENTS),
    ] = 0.1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Autocast to it; float16 with a loss scale.", rich_help_panel=_GRADIENTS),
    ] = "float32",
    layers: Annotated[int, typer.Option(min=1, help="Blocks.", rich_help_panel=_MODEL)] = 4,
    width: Annotated[int, typer.Option(min=2, help="Size of the hidden state.", rich_help_panel=_MODEL)] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.", rich_help_panel=_MODEL)] = 4,
    sequence: Annotated[int, typer.Option("--context", min=1, help="Bytes per sequence.", rich_help_panel=_MODEL)] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank and step.", rich_help_panel=_MODEL)] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=_MODEL)] = 500,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_MODEL)] = 0,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE ...",
            help="Text to train on; the Python standard library's source otherwise.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; runs/TIME otherwise.", rich_help_panel=_OUTPUT)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to continue, with its own options.", rich_help_panel=_OUTPUT),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic",
            help="Go on where the run in --output stands, if there is one: for torchrun with --max-restarts.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between evaluations; 0: a tenth of all.", rich_help_panel=_OUTPUT)
    ] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: at the end only.", rich_help_panel=_OUTPUT)
    ] = 0,
    results: Annotated[
        Path | None, typer.Option(help="Also write the comparison's JSON here.", rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Train a byte-level transformer, alone or on every rank of torchrun."""
    from gradwire.bench import session, specs

    terms = {"compressor": compressor, "feedback": feedback, "exchange": exchange, "communicator": communicator}
    values = {
        "configuration": specs.join({family: text for family, text in terms.items() if text is not None}, optimizer),
        "optimizer": optimizer,
        "layers": layers,
        "width": width,
        "heads": heads,
        "context": sequence,
        "batch": batch,
        "steps": steps,
        "seed": seed,
        "lr": lr,
        "warmup": warmup,
        "dtype": dtype,
        "host": host,
        "bucket_mb": bucket_mb,
        "shards": shards,
        "zero_stage": zero_stage,
        "eval_every": eval_every or max(1, steps // 10),
        "checkpoint_every": checkpoint_every,
        "data": [str(path.resolve()) for path in data or ()],
    }
    typed = {name for name in context.params if "COMMANDLINE" in str(context.get_parameter_source(name))}
    given = {"context" if name == "sequence" else "configuration" if name in terms else name for name in typed}
    if compare is not None and given & {"configuration", "resume"}:
        raise UsageError("--compare: expected whole configurations and a new run, without --compressor or --resume.")
    if resume is not None and given & {"output", "results"}:
        raise UsageError("--resume: expected neither --output nor --results; the run goes on in its own folder.")
    if elastic and (output is None or given & {"resume", "compare"}):
        raise UsageError("--elastic: expected --output FOLDER with it, and neither --resume nor --compare.")
    if elastic and output is not None:
        session.elastic(values, {name: value for name, value in values.items() if name in given}, output)
    elif resume is not None:
        options = session.resumed(resume, {name: value for name, value in values.items() if name in given})
        session.run(options, resume, resume=True)
    elif compare is None:
        session.run(session.checked(values), output, resume=False)
    else:
        session.compare(session.checked(values), specs.expand(compare), output, results, command=_command())


@app.command()
@bench.command()
def report(
    write: Annotated[bool, typer.Option("--write/--check", help="Write the README, or only compare.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = Path("README.md"),
    results: Annotated[Path, typer.Option(help="The folder of kept results.")] = Path("bench/results"),
) -> None:
    """Make the README's tables, figures and docs/legality.md; --check exits with 1 where they differ."""
    from gradwire.bench.plots import stale
    from gradwire.bench.report import fill, stale_pages

    if not readme.is_file():
        raise UsageError(f"report: expected a README, got no file {str(readme)!r}. Run it at the root of a checkout.")
    before = readme.read_text()
    after = fill(before, results)
    figures, pages = stale(after, results, readme.parent), stale_pages(after, results, readme.parent)
    if write:
        readme.write_text(after)
        for path, content in pages.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        for path, draw in figures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw()
    elif before != after or figures or pages:
        differing = [*[readme] * (before != after), *figures, *pages]
        print(f"{', '.join(map(str, differing))}: not of {results}. Run `gradwire report --write`.")
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(gradwire.__version__)
        raise typer.Exit


def spread(arguments: Sequence[str]) -> list[str]:
    """Write `--data a b` as `--data a --data b`, as the option parser wants it."""
    result: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            option = argument if argument in _VARIADIC else None
        elif option is not None and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result


def _command() -> str:
    """The command line that started this, launcher included."""
    world_size, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = (
        ["torchrun", "--standalone", "--nproc-per-node", local, "--no-python"] if world_size == local != "1" else []
    )
    return shlex.join([*launcher, "gradwire", *sys.argv[1:]])


def main() -> None:
    """Run the command; a mistake of the user is one sentence on rank 0 and exit code 2."""
    first_rank = os.environ.get("RANK", "0") == "0"
    said = io.StringIO()
    code: Any = 0
    with contextlib.nullcontext() if first_rank else contextlib.redirect_stderr(said):
        try:
            app(spread(sys.argv[1:]))
        except UsageError as error:
            print(f"gradwire: {error}", file=sys.stderr)
            code = 2
        except SystemExit as error:
            code = error.code
    if code == 2 and not first_rank:
        # The launcher ends all ranks when the first one ends, so rank 0 must be that one. If it found nothing wrong,
        # this rank is still here afterwards and has to speak.
        time.sleep(30)
        print(said.getvalue(), end="", file=sys.stderr)
    sys.exit(code)
