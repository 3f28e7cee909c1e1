"""The package as built: all folders listed, wheel and sdist alike, and an installed wheel that works elsewhere."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import gradwire

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command, return what it printed; its output is the message where it fails."""
    env = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _folders() -> list[Path]:
    """Every folder that holds Python files, below a top-level folder that is a package."""
    tops = [path.parent for path in ROOT.glob("*/__init__.py")]
    return sorted({file.parent.relative_to(ROOT) for top in tops for file in top.rglob("*.py")})


def test_every_folder_is_listed() -> None:
    expected = ["gradwire", *(".".join(("gradwire", *folder.parts)) for folder in _folders())]
    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)


def test_every_folder_is_a_package() -> None:
    assert [folder for folder in _folders() if not (ROOT / folder / "__init__.py").exists()] == []


def test_top_level_folders_are_mapped() -> None:
    expected = {f"gradwire.{folder}": str(folder) for folder in _folders() if len(folder.parts) == 1}
    assert SETUPTOOLS["package-dir"] == {"gradwire": "src/gradwire"} | expected


def test_layers_name_every_package() -> None:
    (contract,) = CONFIG["tool"]["importlinter"]["contracts"]
    assert sorted(contract["layers"]) == sorted(name for name in SETUPTOOLS["packages"] if name.count(".") == 1)


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("gradwire") == gradwire.__version__
    assert f"\n## {gradwire.__version__}" in changelog


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel from the tree and the wheel from the sdist, built from a copy of the tree."""
    tmp = tmp_path_factory.mktemp("build")
    hidden = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    tree = shutil.copytree(ROOT, tmp / "tree", ignore=hidden)
    build = (sys.executable, "-m", "build", "--no-isolation")
    _run(*build, "--sdist", "--wheel", "--outdir", tmp / "dist", tree, cwd=tmp)
    (sdist,) = (tmp / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    _run(*build, "--wheel", "--outdir", tmp / "dist2", unpacked, cwd=tmp)
    (wheel,), (wheel_of_sdist,) = (tmp / "dist").glob("*.whl"), (tmp / "dist2").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "wheel of sdist": wheel_of_sdist, "unpacked": unpacked}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target)
    _run(sys.executable, *install, built["wheel"], cwd=target)
    return target


def test_wheel_holds_every_file(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    expected = {f"gradwire/{file.relative_to(ROOT)}" for folder in _folders() for file in (ROOT / folder).glob("*.py")}
    assert expected | {"gradwire/__init__.py", "gradwire/py.typed"} <= names
    assert [name for name in names if name.startswith(("tests/", "compression/"))] == []


def test_wheel_of_sdist_holds_the_same(built: dict[str, Path]) -> None:
    wheels = [zipfile.ZipFile(built[name]) for name in ("wheel", "wheel of sdist")]
    first, second = ({info.filename: info.CRC for info in wheel.infolist()} for wheel in wheels)
    assert first == second


def test_sdist_holds_the_tests(built: dict[str, Path]) -> None:
    expected = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")} | {Path("Makefile")}
    assert [path for path in sorted(expected) if not (built["unpacked"] / path).exists()] == []


def test_installed_wheel_imports_elsewhere(installed: Path, tmp_path: Path) -> None:
    # The development install would answer for a missing package, so the files' places are compared.
    code = f"import importlib; [print(importlib.import_module(name).__file__) for name in {SETUPTOOLS['packages']}]"
    files = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    expected = [installed.joinpath(*name.split("."), "__init__.py") for name in SETUPTOOLS["packages"]]
    assert list(map(Path, files)) == expected


@pytest.mark.slow
def test_installed_command_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "gradwire"
    _run(command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    small = ("--steps", "1", "--layers", "1", "--width", "32", "--heads", "1", "--context", "16", "--batch", "1")
    _run(command, "train", *small, "--output", "run", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (tmp_path / "run" / "summary.json").exists()


def test_checkout_does_not_hide_the_standard_librarys_compression(tmp_path: Path) -> None:
    """From Python 3.14 on `gzip` imports `compression._common`; older versions get a stand-in of that folder."""
    common = tmp_path / "compression" / "_common"
    common.mkdir(parents=True)
    (tmp_path / "compression" / "__init__.py").touch()
    (common / "__init__.py").write_text("place = __file__\n")
    code = f"""
import sys, sysconfig
if sys.version_info < (3, 14):
    sysconfig.get_path = lambda name: {str(tmp_path)!r}
import compression, gzip
from compression import _common
import gradwire.compression
print(compression.__file__, _common.__file__, gradwire.compression.Compressor.__module__, sep="\\n")
"""
    ours, common_file, module = _run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH="").splitlines()
    assert Path(ours) == ROOT / "compression" / "__init__.py"
    if sys.version_info < (3, 14):
        assert Path(common_file) == common / "__init__.py"
    assert module == "gradwire.compression.base"
