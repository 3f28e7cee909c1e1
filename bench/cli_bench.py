"""The `gradwire bench` commands: what is measured, and kept. Heavy imports stand inside the commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(help="Measure, and keep what was measured.", no_args_is_help=True)


@bench.command()
def compression(
    numel: Annotated[int, typer.Option(min=1, help="Elements, float32.")] = 2**24,
    fused: Annotated[bool, typer.Option(help="Measure the compiled form, too.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Throughput of every compressor with feedback, against a memory copy."""
    from gradwire.bench.compression import main as measure

    measure(numel=numel, fused=fused, output=output, device=device)


@bench.command()
def optim(
    case: Annotated[
        list[str] | None, typer.Option(help="Only this one: matrix, gpt2 or small. May be repeated.")
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="Only this one: adamp, AdamW, … May be repeated.")] = None,
    rivals: Annotated[
        bool,
        typer.Option(
            help="Measure other packages where they are installed; bench/optim_rivals.py says how to install them."
        ),
    ] = True,
    fused: Annotated[bool, typer.Option(help="Measure gradwire's compiled form, too.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory on gpt2, in processes of their own: minutes.")
    ] = False,
    compile_times: Annotated[
        bool, typer.Option("--compile-times", help="First steps on gpt2, in processes of their own: minutes.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Whole training steps of 65,536 and 4,096 tokens, too: minutes.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny tensors: to see that it works.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a figure beside it.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
) -> None:
    """Step time of every optimizer, against torch's fused AdamW and a memory copy."""
    from gradwire.bench.optim import main as measure

    parts = {"rivals": rivals, "fused": fused, "memory": memory, "compile_times": compile_times, "training": training}
    options = parts | {"quick": quick}
    if not measure(case or (), optimizer or (), output=output, device=device, threads=threads, **options):
        raise typer.Exit(1)


@bench.command()
def sweep(
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...",
            help='The baseline first: AdamW "SGDP(momentum=0.9)" …; AdamW and all of gradwire\'s otherwise.',
        ),
    ] = None,
    lrs: Annotated[
        list[float] | None, typer.Option(metavar="FLOAT ...", help="The grid; 0.001 0.003 … 1 otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each run; 500 otherwise.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each pair, with seeds 0, 1, …; means are compared.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; one per core otherwise.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and few steps: to see that it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, run by run; runs that it holds are not repeated.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw PNG here; beside the JSON otherwise.")] = None,
) -> None:
    """Loss of every optimizer at each learning rate of one grid, against torch's AdamW."""
    from gradwire.bench.sweep import main as run

    counts: dict[str, Any] = {"steps": steps, "seeds": seeds, "workers": workers}
    run(optimizers or (), lrs or (), **counts, quick=quick, output=output, figure=figure)


@bench.command()
def exchange(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...",
            help='The baseline first: "dense + AdamW" "DeMo(k=32)" …; these two, PowerSGD, EF21 and more otherwise.',
        ),
    ] = None,
    world_sizes: Annotated[
        list[int] | None, typer.Option(metavar="INT ...", help="Numbers of ranks; 2 4 otherwise.")
    ] = None,
    lrs: Annotated[
        list[float] | None, typer.Option(metavar="FLOAT ...", help="The grid; 0.001 0.002 … 0.016 otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each run; 500 otherwise.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, …; means are compared.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and few steps: to see that it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, run by run; runs that it holds are not repeated.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw PNG here; beside the JSON otherwise.")] = None,
) -> None:
    """Validation loss over bytes sent, methods tuned by one sweep, real processes."""
    from gradwire.bench.exchange import main as run

    counts: dict[str, Any] = {"world_sizes": world_sizes or (), "steps": steps, "seeds": seeds}
    run(methods or (), lrs or (), **counts, quick=quick, output=output, figure=figure)


@bench.command()
def curvature(
    problems: Annotated[
        list[str] | None, typer.Option(metavar="TEXT ...", help="Of digits text; both otherwise.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help='Some of those in the table: "MKOR(SGD)" AdamW …; all otherwise.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, …; means are compared.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; one per core otherwise.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: to see that it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, run by run; runs that it holds are not repeated.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw PNG here; beside the JSON otherwise.")] = None,
) -> None:
    """Steps to a fixed loss with MKOR, its bases, K-FAC, LAMB and AdamW, and the time of a step."""
    from gradwire.bench.curvature import main as run

    run(problems or (), methods or (), seeds=seeds, workers=workers, quick=quick, output=output, figure=figure)


@bench.command()
def products(
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and few products: to see that it works.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, run by run; runs that it holds are not repeated.")
    ] = None,
) -> None:
    """Train every legal product of compressor, feedback and exchange on 2 ranks, and resume each."""
    from gradwire.bench.products import main as run

    run(quick=quick, output=output)


@bench.command()
def theory(
    claims: Annotated[
        list[str] | None, typer.Option(metavar="TEXT ...", help="Some of those in the table; all otherwise.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; one per core otherwise.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small forms: to see that it works.")] = False,
    output: Annotated[
        Path, typer.Option(help="Write JSON here; claims that it holds and that are not run now stay.")
    ] = Path("runs/theory/theory.json"),
    figures: Annotated[
        Path | None, typer.Option(help="Draw a PNG per claim in this folder; that of the JSON otherwise.")
    ] = None,
) -> None:
    """What theory says of error feedback, shown on small problems: a figure and a few numbers per claim."""
    from gradwire.bench.theory.run import main as run

    if not run(claims or (), quick=quick, workers=workers, output=output, figures=figures):
        raise typer.Exit(1)


@bench.command()
def network(
    methods: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="Names in the table, or configurations as for train; all otherwise."),
    ] = None,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...",
            help="Links: 100mbit unlimited, 10mbit/100mbit (up/down), 10mbit,100mbit (a slow host); six otherwise.",
        ),
    ] = None,
    hosts: Annotated[int, typer.Option(min=2, max=4, help="Network namespaces.")] = 4,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measurements of every network, whose median counts; 3 otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=4, help="Of the token budget; 300 otherwise.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two hosts, few methods and steps: under 5 minutes.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, run by run; runs that it holds are not repeated.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw PNG here; beside the JSON otherwise.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write Chrome traces of overlap in this folder.")] = None,
) -> None:
    """Step time, bytes and time to a loss over shaped links, between hosts of this machine (Linux, root)."""
    from gradwire.bench.network.run import main as run

    options: dict[str, Any] = {"host_count": hosts, "rounds": rounds, "steps": steps, "quick": quick}
    run(methods or (), networks or (), **options, output=output, figure=figure, trace=trace)


@bench.command()
def federated(
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Accuracy of federated algorithms on digits, not the speed of rounds.")
    ] = False,
    works: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...", help="Of speed: mlp-100 mlp-1000 lenet-100, model and clients; all otherwise."
        ),
    ] = None,
    simulators: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="Of speed: some of those in the table: gradwire pfl …; all otherwise."),
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="Of speed: through all rounds; 3 otherwise.")] = None,
    ranks: Annotated[bool, typer.Option(help="Of speed: measure two ranks against one, too.")] = True,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT ...", help='Of accuracy: some of those in the table: "SCAFFOLD()" …; all otherwise.'
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of accuracy: runs of each, with seeds 0, 1, ….")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of accuracy: processes of one thread each; one per core otherwise.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny work, few rounds: to see that it works.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here; runs of accuracy that it holds are not repeated.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Of accuracy: draw PNG here; beside the JSON otherwise.")] = None,
) -> None:
    """CPU time of a round against other simulators, which `make bench-federated` installs; or accuracy on digits."""
    if accuracy:
        from gradwire.bench.federated.accuracy import main as train

        train(methods or (), seeds=seeds, workers=workers, quick=quick, output=output, figure=figure)
        return
    from gradwire.bench.federated.speed import main as measure

    if not measure(works or (), simulators or (), passes=passes, ranks=ranks, quick=quick, output=output):
        raise typer.Exit(1)
