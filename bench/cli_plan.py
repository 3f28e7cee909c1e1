"""The `gradwire plan` command."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gradwire.bench.errors import UsageError

_LINKS, _MODEL, _GRADIENTS = "Links, measured under torchrun", "Model", "Gradients"


def plan(
    bandwidth: Annotated[
        str | None, typer.Option(help="Of a machine's link: 100Mbit, 25Gb/s, 1.5GB/s.", rich_help_panel=_LINKS)
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="One way: 0.5ms, 40ms; 0.1ms otherwise.", rich_help_panel=_LINKS)
    ] = None,
    world_size: Annotated[int | None, typer.Option(min=2, help="Ranks.", rich_help_panel=_LINKS)] = None,
    backend: Annotated[
        Literal["gloo", "nccl"] | None,
        typer.Option(help="How long its collectives take is known, not measured.", rich_help_panel=_LINKS),
    ] = None,
    ranks_per_host: Annotated[
        int, typer.Option(min=1, help="Ranks that share a machine and its link.", rich_help_panel=_LINKS)
    ] = 1,
    parameters: Annotated[str, typer.Option(help="Of a transformer: 125M, 7B.", rich_help_panel=_MODEL)] = "10M",
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:function in its place; it returns a module, or a module and a function that returns "
            "its loss.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Of a step on one rank: 8k.", rich_help_panel=_MODEL)] = "2048",
    compute: Annotated[
        str | None,
        typer.Option(help="A step without communication, 350ms; measured otherwise.", rich_help_panel=_MODEL),
    ] = None,
    backward: Annotated[
        str | None, typer.Option(help="Its backward pass; two thirds otherwise.", rich_help_panel=_MODEL)
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help='Some of your own: "ChunkTopK(k=8) + EF" …', rich_help_panel=_GRADIENTS),
    ] = None,
    host: Annotated[
        Literal["ddp", "loop"], typer.Option(help="As for `gradwire train`.", rich_help_panel=_GRADIENTS)
    ] = "ddp",
    bucket_mb: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Size of a gradient bucket in MiB; the host's own otherwise.", rich_help_panel=_GRADIENTS
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Results of `gradwire bench network`: predict its steps instead, and show how far off."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="With --against: an earlier output, whose measurements are taken once more.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
) -> None:
    """Say whether compression pays on these links, which, and up to where; measure what options do not say."""
    from gradwire.bench import plan_units
    from gradwire.bench.plan import main
    from gradwire.bench.plan_case import Options

    if against is not None:
        from gradwire.bench.plan_lab import main as compare

        compare(against, output, measured)
        return
    if measured is not None:
        raise UsageError("--measured: expected --against with it, got --measured alone.")
    times = {
        name: None if text is None else plan_units.seconds(text, f"--{name}")
        for name, text in (("latency", latency), ("compute", compute), ("backward", backward))
    }
    if times["backward"] is not None and times["compute"] is None:
        raise UsageError("--backward: expected --compute with it, got --backward alone.")
    if times["compute"] is not None and (times["backward"] or 0) > times["compute"]:
        raise UsageError(f"--backward: expected at most --compute={compute}, got {backward}.")
    main(
        Options(
            parameters=plan_units.count(parameters, "--parameters"),
            model=model,
            tokens=plan_units.count(tokens, "--tokens"),
            bandwidth=None if bandwidth is None else plan_units.bandwidth(bandwidth),
            latency=times["latency"],
            world_size=world_size,
            ranks_per_host=ranks_per_host,
            compute=times["compute"],
            backward=times["backward"],
            methods=methods or (),
            host=host,
            bucket_mb=bucket_mb,
            backend=backend,
            output=output,
        )
    )
