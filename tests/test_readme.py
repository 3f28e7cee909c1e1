"""The README is true: its program runs, its sessions print what they say, its commands work, its table adds up.

All `python` blocks, and the `diff` at the top with the change made, are one program, run by torchrun with 2 ranks.
`pycon` blocks are one doctest; `py` blocks, for packages that are not here, are only parsed. Every `gradwire` command
of an `sh` block runs as written, with `_SHORT` appended.
"""

import ast
import contextlib
import doctest
import inspect
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradwire import comm, compression, federated, optim
from gradwire.bench import specs
from gradwire.comm.planner_rehearsal import Rehearsal, rehearse

README = Path(__file__).parent.parent / "README.md"
_SHORT = {
    "gradwire train": " --steps 2 --layers 1 --width 32 --heads 2 --context 32 --batch 2",
    "gradwire federate": " --data text --rounds 2 --local-steps 1 --clients 6 --cohort 2",
    "gradwire plan": " --parameters 100k --tokens 64 --methods Cast 'ChunkTopK + EF'",
    "gradwire bench compression": " --numel 65536 --no-fused",
    "gradwire bench optim": " --quick --no-fused --no-rivals",
    "gradwire bench sweep": " --quick",
    "gradwire bench exchange": " --quick --methods 'dense + AdamW' 'DeMo(k=32)'",
    "gradwire bench curvature": " --quick --problems text --methods AdamW",
    "gradwire bench theory": " --quick --claims saddle walk",
}


def _lines(language: str) -> list[str]:
    """The README with everything blanked that is not in a block of this language, so that line numbers stay."""
    inside, kept = False, []
    for line in README.read_text().splitlines():
        if line.startswith("```"):
            inside = line == f"```{language}"
        kept.append(line if inside and not line.startswith("```") else "")
    return kept


def _program() -> str:
    after_the_change = ["" if line.startswith("-") else line[1:] for line in _lines("diff")]
    return "\n".join(python or diff for python, diff in zip(_lines("python"), after_the_change, strict=True))


def _commands() -> list[str]:
    joined = "\n".join(_lines("sh")).replace("\\\n", " ")
    return [_short(line) for line in joined.splitlines() if "gradwire" in line]


def _short(command: str) -> str:
    (options,) = [options for name, options in _SHORT.items() if name in command]
    return command + options


def _run(*commands: list[str], cwd: Path, **environment: str) -> list[str]:
    """Run commands side by side, the i-th with NODE=i, and return what they printed; none outlives the call."""
    env = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with contextlib.ExitStack() as stack:
        running = []
        for node, command in enumerate(commands):
            process = subprocess.Popen(command, cwd=cwd, env=env | {"NODE": str(node)}, text=True, **pipes)
            stack.enter_context(process)
            stack.callback(process.terminate)  # torchrun ends its workers, too; does nothing to what has ended
            running.append(process)
        printed = [process.communicate(timeout=100)[0] for process in running]
    failed = [(process.args, text) for process, text in zip(running, printed, strict=True) if process.returncode]
    assert not failed, "\n".join(f"{command} failed:\n{text}" for command, text in failed)
    return printed


@pytest.mark.slow
def test_program_runs_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(_program())
    (printed,) = _run(["torchrun", "--standalone", "--nproc-per-node", "2", "readme.py"], cwd=tmp_path)
    assert re.search(r"\d+ bytes sent, \d+ times fewer", printed)


def test_change_is_two_lines() -> None:
    added = [line for line in _lines("diff") if line.startswith("+")]
    removed = [line for line in _lines("diff") if line.startswith("-")]
    assert (len(added), removed) == (2, [])
    ast.parse("\n".join(line[1:] for line in _lines("diff") if not line.startswith("+")))


def test_sessions_print_what_they_say() -> None:
    examples = doctest.DocTestParser().get_doctest("\n".join(_lines("pycon")), {}, "README", str(README), 0)
    assert examples.examples
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert report == []


def test_what_is_shown_without_being_run_is_python() -> None:
    assert ast.parse("\n".join(_lines("py"))).body


def test_table_of_optimizers_is_complete() -> None:
    table = README.read_text().partition("| optimizer |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)\(\)` \|", table, flags=re.MULTILINE)
    classes = {cls for cls in vars(optim).values() if isinstance(cls, type)} - {optim.Optimizer}
    assert sorted(named) == sorted(cls.__name__ for cls in classes)


def test_tables_of_federated_classes_are_complete() -> None:
    for header, base in (("| algorithm |", federated.Algorithm), ("| aggregator |", federated.Aggregator)):
        table = README.read_text().partition(header)[2].partition("\n\n")[0]
        named = {
            name for row in re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE) for name in row.split("`")[1::2]
        }
        classes = {cls for cls in vars(federated).values() if isinstance(cls, type) and issubclass(cls, base)}
        assert named == {cls.__name__ for cls in classes if not inspect.isabstract(cls)}


def test_table_of_compressors_adds_up() -> None:
    table = README.read_text().partition("| compressor |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(.+?)` \| ([\d.]+) \| ", table, flags=re.MULTILINE)
    shape = torch.Size([1 << 20])
    computed = {}
    for text, _ in rows:
        compressor = eval(text, vars(compression))
        computed[text] = round(compressor.payload_bytes(shape, torch.float32) / shape.numel(), 3)
    assert computed == {text: float(said) for text, said in rows}
    kinds = {cls.__name__ for cls in vars(compression).values() if isinstance(cls, type)}
    kinds -= {"Compressor", "Part", "Payload", "PayloadError"}
    assert {text.partition("(")[0] for text, _ in rows} == kinds


def _entries(table: str) -> list[tuple[str, int]]:
    """The first cell and the bytes of the second one, where that is a number of bytes."""
    text = README.read_text().partition(f"| {table} |")[2].partition("\n\n")[0]
    return [(name, int(said)) for name, said in re.findall(r"^\| `(.+?)` \| (\d+) bytes \|", text, flags=re.MULTILINE)]


_NUMEL = 64 * 1024


@pytest.mark.parametrize(("text", "said"), _entries("feedback"))
def test_feedback_holds_as_many_bytes_as_the_table_says(text: str, said: int) -> None:
    feedback = eval(text.replace("...", "(1.0, 1.0)"), vars(comm))
    compressor = compression.QSGD() if feedback.requires == "unbiased" else compression.ChunkTopK(k=32)
    communicator = comm.Communicator(compressor, feedback=feedback)
    rehearse(communicator, [[("weight", (64, 1024))]], world_size=2, steps=3, device="cpu")
    assert communicator.state_bytes / _NUMEL == said


@pytest.mark.parametrize(("text", "said"), _entries("optimizer"))
def test_optimizers_hold_as_many_bytes_as_the_table_says(text: str, said: int) -> None:
    cls: Any = getattr(optim, text.removesuffix("()"))
    short = {"warmup_steps": 1} if "warmup_steps" in inspect.signature(cls).parameters else {}
    weight = torch.nn.Parameter(torch.randn(64, 1024))
    optimizer = cls([("weight", weight)], lr=1e-3, **short)
    own = specs.own_communicator(optimizer)
    if own is not None:
        own.join(Rehearsal(1024))  # what is divided among ranks is next to nothing

    def loss() -> torch.Tensor:
        return weight.square().sum()

    for _ in range(4):
        if "MASHA" in text:
            optimizer.step(loss)
        else:
            weight.grad = torch.randn_like(weight)
            optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held = sum(value.numel() * value.element_size() for value in tensors) + (own.state_bytes if own else 0)
    assert held / _NUMEL == pytest.approx(said, abs=0.2)


def test_thresholds_are_as_near_as_the_table_says() -> None:
    (said,) = re.findall(r"`ThresholdTopK.*up to (\d+) % of the smallest magnitude", README.read_text())
    assert round(100 * 2 ** -compression.ThresholdTopK().mantissa_bits) == int(said)


_EXPLAINED = {
    "up to 3 %": "the width of a bin of `ThresholdTopK`; computed above",
    "a factor of 2 is enough": "what bfloat16 saves by its definition",
    "to save a factor of 80": "what the row's k was chosen for, not what it was found to do",
    "a tenth of all": "advice on a hyper-parameter",
    "an omega of 1/8": "a closed form",
    "until 0.19.6": "a version",
}
"""What looks like a measurement in the README and is none, each with what it is."""

_NUMBER = r"(?:\b(?:two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|hundred)|\d[\d.,]*)"
_UNIT = r"(?:[mµun]?s|min|seconds?|minutes?|hours?|times|per ?cent|[kMG]i?B|[kMG]bit)\b"
_PART = r"(?:half|third|quarter|fifth|tenth|twentieth|hundredth|thousandth)"
_MEASURED = re.compile(rf"{_NUMBER} ?(?:%|\u00d7|{_UNIT})|\bfactors? of {_NUMBER}|\ba {_PART}\b|\b1/\d|[-+]?\b0\.\d\d+")


def _prose() -> str:
    """The README without what reports fill in, code, links' targets and numbers of bytes in tables, checked above."""
    text = re.sub(r"<!-- results:([\w-]+) -->.*?<!-- /results:\1 -->", "", README.read_text(), flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|<[^>]*>", "", text)
    return re.sub(r"^\| *\|[^|]*\|", "", text, flags=re.MULTILINE)


def measured_looking(prose: str) -> list[str]:
    """Numbers that look as if somebody had measured them, with what stands around, but for those explained."""
    for known in _EXPLAINED:
        prose = prose.replace(known, "")
    return [prose[max(0, found.start() - 30) : found.end() + 30] for found in _MEASURED.finditer(prose)]


def test_no_measured_number_is_typed_by_hand() -> None:
    assert measured_looking(_prose()) == [], "let `gradwire report` write it, or leave the number out"
    assert [known for known in _EXPLAINED if known not in _prose()] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "MKOR saves 29 % of the steps.",
        "It takes 10 to 20 s to compile.",
        "It sends a hundredth of it.",
        "All of it takes two minutes.",
        "It is 2.5 times faster, or 4 \u00d7 in all.",
        "Seeds differ by 0.022 at most.",
        "A copy moves 34 GB/s.",
        "The loss is -0.05 better.",
        "It saves a factor of 12.",
    ],
)
def test_measured_numbers_are_found(sentence: str) -> None:
    assert len(measured_looking(sentence)) >= 1


def test_definitions_are_no_measurements() -> None:
    prose = "Two workers on 4 ranks with torch 2.13 and Python 3.11, in 8 bits, 12 bytes per entry, 500 steps, k = 32."
    assert measured_looking(prose) == []


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in _commands() if "$NODE" not in command])
def test_command_runs(command: str, tmp_path: Path) -> None:
    _run(shlex.split(command), cwd=tmp_path)
    assert "train" not in command or list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_command_for_several_machines_runs(tmp_path: Path) -> None:
    (command,) = [command for command in _commands() if "$NODE" in command]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shell = ["bash", "-c", f"exec {command}"]
    _run(shell, shell, cwd=tmp_path, HEAD="127.0.0.1", PORT=port)
    assert list(tmp_path.rglob("summary.json"))


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_first_screen_is_short() -> None:
    screen, _, _ = README.read_text().partition("\n## ")
    outside_the_table = re.sub(r"<!-- results:train -->.*<!-- /results:train -->", "", screen, flags=re.DOTALL)
    assert len(outside_the_table.splitlines()) <= 32  # and about eight rows
