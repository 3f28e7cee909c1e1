"""gradwire inside transformers, accelerate and Lightning: the scripts of docs/trainers.md, under torchrun.

`make test-trainers` installs these packages and runs the scripts; where they are missing, that is skipped.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sorted((TESTS / "trainer_scripts").glob("*_*.py"))
PAGE = (TESTS.parent / "docs" / "trainers.md").read_text()
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


@pytest.mark.slow
@every_script
def test_script_compresses_and_goes_on_where_it_was(script: Path, tmp_path: Path) -> None:
    package = script.stem.partition("_")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: run `make test-trainers`")
    paths = [str(TESTS), str(script.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        through, resumed = rank["weights"]
        assert resumed == through
        assert through == ranks[0]["weights"][0]
        assert rank["residuals"][0] == rank["residuals"][1]
        assert rank["steps"] == [8, 8]
        assert rank["skipped"] == [0, 0]
        assert min(rank["rates"]) > 20, "as ChunkTopK(k=32) does: nothing of weight goes another way"
        assert min(rank["norms"]) > 0
    assert ranks[0]["residuals"] != ranks[1]["residuals"]


@every_script
def test_page_shows_what_the_script_runs(script: Path) -> None:
    """Every block of the page is a run of lines of one script, without its types and indentation."""
    shown = [_bare(block) for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)]
    assert shown
    inside = [block for block in shown if block in _bare(script.read_text())]
    assert inside, f"docs/trainers.md shows nothing of {script.name}"
    for block in shown:
        assert any(block in _bare(other.read_text()) for other in SCRIPTS), f"no script holds:\n{block}"


def _bare(code: str) -> str:
    """Code without annotations, comments, indentation and empty lines."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return "\n".join(line.strip() for line in ast.unparse(tree).splitlines() if line.strip())
