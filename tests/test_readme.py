"""The README is true: its program runs, its sessions print what they say, its commands work, its table adds up.

All `python` blocks, and the `diff` at the top with the change made, are one program, run by torchrun with 2 ranks.
`pycon` blocks are one doctest; `py` blocks, for packages that are not here, are only parsed. Every `gradwire` command
of an `sh` block runs as written, with `_SHORT` appended.
"""

import ast
import contextlib
import doctest
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

from gradwire import compression, optim

README = Path(__file__).parent.parent / "README.md"
_SHORT = {
    "gradwire train": " --steps 2 --layers 1 --width 32 --heads 2 --context 32 --batch 2",
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
