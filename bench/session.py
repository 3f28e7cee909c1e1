"""What `gradwire train` does: check everything, then train one configuration or several on all ranks."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gradwire.bench import comparison, data, specs
from gradwire.bench.errors import UsageError
from gradwire.bench.launch import process_group
from gradwire.bench.plots import plot_run
from gradwire.bench.progress import size
from gradwire.bench.runs import RunFolder
from gradwire.bench.train import Options, train

_MAY_CHANGE = ("eval_every", "checkpoint_every")
"""Options without influence on the weights: a resumed run may be given others."""


def checked(values: Mapping[str, Any]) -> Options:
    """Options, with the configuration and optimizer tried out."""
    options = Options(**values)
    specs.parse(options.configuration, options.optimizer)
    return options


def resumed(folder: Path, given: Mapping[str, Any]) -> Options:
    """The options of an earlier run.

    Args:
        folder: Its run folder.
        given: Options that the user has typed now.

    Raises:
        UsageError: there is nothing to resume, or an option differs.
    """
    run_folder = RunFolder(folder)
    newest = run_folder.newest_checkpoint()
    if newest is None:
        raise UsageError(f"--resume: expected a run folder with a checkpoint, got {str(folder)!r}.")
    saved = run_folder.options()
    if newest >= saved["steps"]:
        raise UsageError(f"--resume: expected an unfinished run, got {str(folder)!r}, whose {newest} steps are done.")
    for name, value in given.items():
        if name in _MAY_CHANGE:
            saved[name] = value
        elif value != saved.get(name, value):
            raise UsageError(
                f"--resume: expected {name}={saved[name]!r} as the run began, got {name}={value!r}. "
                "Leave the option out, or start a new run."
            )
    return checked(saved)


def run(options: Options, output: Path | None, *, resume: bool) -> None:
    """Train one configuration.

    Raises:
        UsageError: the folder holds an earlier run.
    """
    if not resume and output is not None and RunFolder(output).newest_checkpoint() is not None:
        raise UsageError(f"--output: expected a new folder, got {str(output)!r} with a run. Use --resume to go on.")
    corpus = _corpus(options)
    with process_group() as device:
        folder = RunFolder(_agree(output))
        summary = train(options, corpus, folder, device, resume=resume, keep=True)
        if dist.get_rank() == 0:
            plot_run(folder.metrics(), options.configuration, folder.path / "loss.png")
            loss = summary["validation_loss"]
            print(
                f"validation loss {loss:.4f}, {size(summary['bytes_per_step'])} per step and rank, "
                f"compression rate {summary['compression_rate']:.1f}; see {folder.path}"
            )


def elastic(values: Mapping[str, Any], given: Mapping[str, Any], output: Path) -> None:
    """Train, or go on where the run in `output` stands: what a launcher that starts ranks anew can call every time.

    Args:
        values: All options.
        given: Those that the user has typed.
        output: The run folder, the same at every start.

    Raises:
        UsageError: the run in the folder was made with other options.
    """
    folder = RunFolder(output)
    newest = folder.newest_checkpoint()
    if newest is None:  # also a run that ended before its first checkpoint
        run(checked(values), output, resume=False)
    elif newest < folder.options()["steps"]:
        run(resumed(output, given), output, resume=True)
    else:
        print(f"all {newest} steps are done; see {output}")


def compare(
    options: Options, configurations: Sequence[str], output: Path | None, results: Path | None, *, command: str
) -> None:
    """Train several configurations."""
    for text in configurations:
        specs.parse(text, options.optimizer)
    corpus = _corpus(options)
    with process_group() as device:
        comparison.compare(configurations, options, corpus, _agree(output), device, command=command, results=results)


def _corpus(options: Options) -> data.Corpus:
    if not options.data:
        return data.standard_library()
    return data.files([Path(path) for path in options.data], options.context)


def _agree(output: Path | None) -> Path:
    """One folder for all ranks; without a name, rank 0's clock gives it one."""
    names = [str(output or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))]
    dist.broadcast_object_list(names)
    return Path(names[0])
