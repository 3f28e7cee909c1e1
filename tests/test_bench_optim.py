"""The optimizers' benchmark on tiny tensors: what it measures is right; how fast it is, is not asked."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.bench import optim as bench
from gradwire.bench import optim_rivals, optim_training, optim_workload
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError
from gradwire.bench.optim_rivals import RIVALS, Candidate, Rival, candidates, missing, own_classes
from gradwire.bench.optim_workload import CASES, QUICK_CASES, Workload, moved_bytes, peak_bytes, step_alone
from gradwire.bench.timing import measure
from gradwire.optim import DeMo

PACKAGE = """
import torch
class AdamP(torch.optim.AdamW): pass
class SGDP(torch.optim.SGD):
    def step(self): raise ZeroDivisionError("a bug of theirs")
"""
ALL, GRADWIRE_ADAMP = len(CASES), "gradwire AdamP, fused"


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package with one class that works and one that does not, one that does not import, one that is not there."""
    folder = tmp_path_factory.mktemp("rivals")
    (folder / "some_package.py").write_text(PACKAGE)
    (folder / "broken_package.py").write_text("import a_dependency_of_it\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield (
            Rival("some-package", "some_package", "AdamP"),
            Rival("some-package", "some_package", "SGDP"),
            Rival("broken-package", "broken_package", "AdamP"),
            Rival("absent-package", "absent_package", "AdamP"),
        )


@pytest.fixture(scope="module")
def measured(rivals: Sequence[Rival]) -> tuple[list[bench.Result], dict[str, str]]:
    return bench.run(candidates(rivals=rivals, fused=False), quick=True)


def test_every_class_is_measured_in_every_mode_on_every_case(measured: Any) -> None:
    results, _ = measured
    found = {(result.source, result.algorithm, result.mode, result.case) for result in results}
    assert len(found) == len(results)
    expected = {("gradwire", cls.__name__, mode) for cls in own_classes() for mode in ("default", "foreach")}
    expected |= {("torch", "AdamW", mode) for mode in ("loop", "foreach", "fused")}
    expected |= {("torch", "Adafactor", "foreach"), ("some-package", "AdamP", "default")}
    assert found == {(*key, case) for key in expected for case in CASES}
    for result in results:
        assert min(result.seconds, result.ratio, result.over_floor, result.us_per_tensor, result.reference_s) > 0
        assert result.us_per_tensor <= 1e6 * result.seconds / len(QUICK_CASES[result.case].shapes)


def test_compiled_forms_are_candidates_unless_refused() -> None:
    fused = {candidate.algorithm for candidate in candidates() if candidate.name.endswith("fused")}
    assert fused == {cls.__name__ for cls in own_classes()} | {"AdamW"}
    assert GRADWIRE_ADAMP not in [candidate.name for candidate in candidates(fused=False)]


def test_what_is_not_measured_is_listed(measured: Any, rivals: Sequence[Rival]) -> None:
    _, failed = measured
    assert missing(rivals) == {"absent-package": "not installed"}
    assert failed == {
        **{f"some-package SGDP, default, {case}": "ZeroDivisionError: a bug of theirs" for case in CASES},
        **{
            f"broken-package AdamP, default, {case}": "ModuleNotFoundError: No module named 'a_dependency_of_it'"
            for case in CASES
        },
    }


@pytest.mark.parametrize("package", sorted({rival.package for rival in RIVALS} - {"heavyball"}))  # which compiles
def test_installed_packages_step(package: str) -> None:
    rivals = [rival for rival in RIVALS if rival.package == package]
    if not rivals[0].installed:
        pytest.skip(f"compares with {package}, which gradwire does not need and is not installed here")
    for rival in rivals:
        (param,) = params = Workload(QUICK_CASES["matrix"], "cpu").parameters()
        before = param.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rival.build(params).step()
        assert not torch.equal(param, before), rival


def test_cases_are_what_they_are_called() -> None:
    assert CASES["matrix"].numel == 4096**2
    assert (len(CASES["gpt2"].shapes), CASES["gpt2"].numel) == (148, 124_439_808)
    assert (len(CASES["small"].shapes), CASES["small"].numel) == (300, 300 * 4096)
    assert CASES.keys() == QUICK_CASES.keys()


def test_optimizers_share_weights_and_gradients() -> None:
    work = Workload(QUICK_CASES["gpt2"], "cpu")
    first, second = work.parameters(), work.parameters()
    assert [p.shape for p in first] == [torch.Size(shape) for shape in work.case.shapes]
    for p, q in zip(first, second, strict=True):
        assert p is not q
        assert p.data_ptr() == q.data_ptr()
        assert p.grad is not None
        assert p.grad is q.grad
    before = [p.grad.clone() for p in first if p.grad is not None]
    work.reference.step()
    work.copy()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(second, before, strict=True) if p.grad is not None)


@pytest.mark.parametrize(
    ("algorithm", "cls", "options", "per_weight"),
    [
        ("AdamW", torch.optim.AdamW, {}, 28),
        ("AdamP", torch.optim.AdamW, {}, 36),  # the passes are those of the algorithm, the state is what is there
        ("DiffGrad", torch.optim.AdamW, {"amsgrad": True}, 36),
        ("SGDP", torch.optim.SGD, {"momentum": 0.9}, 28),
        ("Adafactor", torch.optim.Adafactor, {}, 24),
        ("DeMo", DeMo, {}, 20),  # its momentum is the communicator's
    ],
)
def test_bytes_that_a_step_must_move(algorithm: str, cls: Any, options: dict[str, Any], per_weight: int) -> None:
    weight = nn.Parameter(torch.ones(200, 100))
    weight.grad = torch.ones(200, 100)
    optimizer = cls([weight], **options)
    optimizer.step()
    small = 2 * (200 + 100 + 1) * 4  # Adafactor's factors, and a step count
    assert 0 <= moved_bytes(algorithm, optimizer) - per_weight * weight.numel() <= small


def test_whole_training_steps_hold_gradients_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    accumulate = optim_training._accumulate

    def spy(model: nn.Module, *rest: Any) -> None:
        accumulate(model, *rest)
        seen.append(sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None))

    monkeypatch.setattr(optim_training, "_accumulate", spy)
    reference, *_ = candidates(rivals=())
    demo = next(candidate for candidate in candidates(rivals=()) if candidate.algorithm == "DeMo")
    steps = optim_training.training_steps([demo], reference, quick=True)
    assert [step["tokens"] for step in steps] == list(optim_training.QUICK_TOKENS)
    assert all(step["algorithm"] == "DeMo" and step["ratio"] > 0 < step["step_s"] for step in steps)
    assert len(seen) == 6  # a warm-up and two rounds, of each number of tokens
    assert all(total > 0 for total in seen)


def test_functions_take_turns() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure(
        functions, torch.device("cpu"), lambda second: {"a": 3, "b": 1} if min(second.values()) > 0 else {}
    )
    assert "".join(calls) == "aabb" + "ab" + "aa"
    assert {name: len(spans) for name, spans in seconds.items()} == {"a": 3, "b": 1}


def result(source: str, mode: str, case: str = "matrix", ratio: float = 2.0) -> bench.Result:
    return bench.Result(source, "AdamP", mode, case, 1.0, ratio, 1.5, 9.0, 0.5, 1e10)


def test_rivals_are_compared_with_our_fused_form() -> None:
    results = [
        *(result("gradwire", mode, ratio=ratio) for mode, ratio in (("loop", 9.0), ("fused", 1.5))),
        result("timm", "default", ratio=30.0),
        result("timm", "default", "gpt2", ratio=30.0),
    ]
    kept = bench.record(results, {}, quick=False, device="cpu")
    assert [row["over_ours"] for row in kept["results"]] == [None, None, 20.0, None]
    assert kept["cases"]["gpt2"] == {
        "title": "GPT-2 small",
        "tensors": 148,
        "parameters": 124_439_808,
        "reference_s": 0.5,
        "copy_bytes_per_s": 1e10,
    }


def adamw(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params)


def test_what_would_run_uncompiled_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    class Fallback(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            warnings.warn("fused=True: torch.compile failed", stacklevel=1)
            return super().step(closure)

    candidate = Candidate("gradwire", "AdamP", "fused", Fallback)
    results, failed = bench.run([candidate], cases=["matrix"], quick=True)
    assert results == []
    assert failed == {f"{GRADWIRE_ADAMP}, matrix": "UserWarning: fused=True: torch.compile failed"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "candidates", lambda **options: [candidate])
        assert not bench.main(["matrix"], quick=True, rivals=False)
    assert f"not measured: {GRADWIRE_ADAMP}, matrix: UserWarning" in capsys.readouterr().out


def test_first_steps_are_taken_with_an_empty_and_with_a_filled_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def fake(candidate: Candidate, case: str, *, cache: str | None = None, **_: Any) -> dict[str, float]:
        assert case == "gpt2"
        assert cache is None or Path(cache).is_dir()
        seen.append((candidate.mode, cache))
        return {"first_step_s": 10.0 / len(seen), "peak_share": 0.25}

    monkeypatch.setattr(bench, "step_alone", fake)
    subjects = [Candidate("gradwire", "AdamP", mode, adamw) for mode in ("fused", "loop")]
    results, failed = bench.run(subjects, quick=True, memory=True, compile_times=True)
    assert not failed
    (_, cache), _, _ = seen
    assert cache is not None
    assert seen == [("fused", cache), ("fused", cache), ("loop", None)]
    whole = {result.mode: result for result in results if result.case == "gpt2"}
    assert (whole["fused"].first_step_cold_s, whole["fused"].first_step_warm_s) == (10.0, 5.0)
    assert (whole["loop"].first_step_cold_s, whole["loop"].peak_share) == (None, 0.25)
    assert all(result.peak_share is None for result in results if result.case != "gpt2")


def test_a_process_of_its_own() -> None:
    (candidate,) = [candidate for candidate in candidates() if candidate.name == "torch AdamW, loop"]
    found = step_alone(candidate, "gpt2", quick=True, device="cpu")
    assert found.keys() == {"first_step_s", "peak_share"}
    assert found["first_step_s"] > 0
    assert found["peak_share"] >= 0


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_workload.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        step_alone(Candidate("x", "x", "x", adamw), "gpt2", quick=True, device="cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="CPU memory is read from Linux's /proc")
def test_peak_memory_is_what_a_call_allocates() -> None:
    size = 64 << 20
    peak = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).add_(1), torch.device("cpu"))
    assert 0.95 * size < peak < 1.5 * size


def test_the_command_writes_json_a_figure_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optim_rivals, "RIVALS", ())
    output = tmp_path / "new" / "speed.json"
    options = ["--case", "small", "--case", "matrix", "--optimizer", "adamp", "--optimizer", "AdamW", "--quick"]
    command = ["gradwire", "bench", "optim", *options, "--no-fused", "--no-rivals", "--output", str(output)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    kept = json.loads(output.read_text())
    assert list(kept["cases"]) == ["matrix", "small"]
    assert {"date", "command", "torch", "gradwire", "cpu", "cores", "threads"} <= kept["machine"].keys()
    assert {row["algorithm"] for row in kept["results"]} == {"AdamP", "AdamW"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "measuring matrix: gradwire AdamP, default (4 of 5)" in printed
    assert "µs per" in printed
    assert "peak" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["nothing"]}, "--case: expected one of matrix, gpt2, small, got 'nothing'"),
        ({"optimizers": ["nothing"]}, "--optimizer: expected one of AdamW, .*, got 'nothing'"),
        ({"cases": ["small"], "memory": True}, "measured on gpt2. Add --case gpt2"),
        ({"device": "tpu"}, "--device: expected cpu, or cuda where there is a GPU, got 'tpu'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.main(**options)
