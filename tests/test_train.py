"""`gradwire train` for real: under torchrun, alone, interrupted, compared, and with the user's mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel

from gradwire.bench import data
from gradwire.bench.cli import main, spread
from gradwire.bench.errors import UsageError
from gradwire.bench.model import ByteTransformer, _rotation, nats_per_byte
from gradwire.bench.runs import RunFolder
from gradwire.bench.train import Options, Trainer, train

TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4"]
SCRIPTS = Path(sys.executable).parent


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
    command = [str(SCRIPTS / launcher[0]), *launcher[1:], str(SCRIPTS / "gradwire"), "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def alone(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command as one process, here; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["gradwire", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def options(**changes: Any) -> Options:
    defaults: dict[str, Any] = {
        "configuration": "dense",
        "optimizer": "AdamW",
        "layers": 1,
        "width": 32,
        "heads": 2,
        "context": 16,
        "batch": 4,
        "steps": 12,
        "seed": 0,
        "lr": 1e-2,
        "warmup": 0.25,
        "dtype": "float32",
        "host": "ddp",
        "bucket_mb": 25.0,
        "eval_every": 6,
        "checkpoint_every": 0,
        "data": [],
    }
    return Options(**{**defaults, **changes})


def corpus() -> data.Corpus:
    """Counting bytes: easy to learn, and nothing to read."""
    text = (torch.arange(4096) % 61).to(torch.uint8)
    return data.Corpus("counting", text[:3500], text[3500:])


def contents(checkpoint: Path, target: Path) -> dict[str, Any]:
    """All entries of a checkpoint by path."""
    dcp_to_torch_save(checkpoint, target)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value

    walk("", torch.load(target, weights_only=False))
    return flat


# Whole commands, with real launchers.


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        ["--optimizer", "adamp(weight_decay=0.1)", "--compressor", "ChunkTopK(k=64, chunk=256)", "--feedback", "EF21"],
        ["--optimizer", "DeMo(k=8, values='sign', chunk=16)", "--host", "ddp"],
        ["--optimizer", "DeMo(k=8, chunk=16, form='overlapped')", "--host", "loop", "--dtype", "float16"],
        ["--optimizer", "OneBitAdam(warmup_steps=2)"],
    ],
    ids=["ef21", "demo", "overlapped", "one-bit"],
)
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(made: list[str], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = torchrun(*TINY, *made, "--steps", "8", "--checkpoint-every", "4", "--output", str(whole))
    assert run.returncode == 0, run.stderr
    assert "step 8/8" in run.stdout
    assert "validation loss" in run.stdout
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints", "loss.png", "metrics.jsonl", "options.json", "summary.json",
    }  # fmt: skip
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["ranks_equal"]
    assert summary["world_size"] == 2
    assert summary["compression_rate"] > 1.5

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-0000008")  # as if it had been stopped after step 4
    (cut / "checkpoints" / "step-0000008.partial").mkdir()  # in the middle of writing
    resumed = torchrun("--resume", str(cut))
    assert resumed.returncode == 0, resumed.stderr

    measured = {"seconds", "tokens_per_second"}
    before, after = RunFolder(whole).metrics(), RunFolder(cut).metrics()
    assert [record["step"] for record in after] == list(range(1, 9))
    for a, b in zip(before, after, strict=True):
        assert {k: v for k, v in a.items() if k not in measured} == {k: v for k, v in b.items() if k not in measured}
    saved = contents(RunFolder(whole).checkpoint(8), tmp_path / "a.pt")
    again = contents(RunFolder(cut).checkpoint(8), tmp_path / "b.pt")
    assert saved.keys() == again.keys()
    assert any("rank1" in key and "rows" in key for key in saved)
    groups, groups_again = saved.pop("/optimizer/param_groups"), again.pop("/optimizer/param_groups")
    for group, group_again in zip(groups, groups_again, strict=True):
        assert group == {key: group_again[key] for key in group}  # loading may add flags of torch's own
    for key, value in saved.items():
        assert torch.equal(value, again[key]) if isinstance(value, torch.Tensor) else value == again[key], key


@pytest.mark.slow
def test_compare_writes_table_picture_and_results(tmp_path: Path) -> None:
    import matplotlib.image

    configurations = ["dense", "ScaledSign + EF", "DeMo(k=8, chunk=16)"]
    output, results = tmp_path / "runs", tmp_path / "kept" / "train.json"
    run = torchrun(
        *TINY, "--steps", "4", "--host", "loop", "--compare", *configurations, "--output", str(output),
        "--results", str(results),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "ScaledSign + EF" in run.stdout
    assert "Validation loss" in run.stdout
    for number, name in enumerate(("dense", "scaledsign-ef", "demo-k-8-chunk-16"), 1):
        assert (output / f"{number}-{name}" / "summary.json").is_file()
    for picture in (output / "comparison.png", output / "1-dense" / "loss.png"):
        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.05  # not a blank page
    kept = json.loads(results.read_text())
    assert kept == json.loads((output / "comparison.json").read_text())
    assert kept["command"].startswith("torchrun --standalone --nproc-per-node 2 --no-python gradwire train")
    assert {"cpu", "torch", "date"} <= kept["machine"].keys()
    assert [run["configuration"] for run in kept["runs"]] == configurations
    dense, sign, demo = kept["runs"]
    assert dense["compression_rate"] == pytest.approx(1, rel=1e-2)
    assert sign["compression_rate"] > 10
    assert sign["bytes_per_step"] < dense["bytes_per_step"] / 10
    assert demo["compression_rate"] == pytest.approx(dense["bytes_per_step"] / demo["bytes_per_step"], rel=1e-2)
    assert demo["compression_rate"] > 5
    assert demo["ranks_equal"]
    assert [point["step"] for point in sign["curve"]] == [1, 2, 3, 4]
    table = (output / "comparison.md").read_text()
    assert table.count("\n") == 5
    assert "| `ScaledSign + EF` |" in table


@pytest.mark.slow
def test_a_wrong_name_is_said_once_under_torchrun(tmp_path: Path) -> None:
    run = torchrun("--compressor", "TopQ", "--output", str(tmp_path / "run"))
    assert run.returncode != 0
    assert "exitcode  : 2" in run.stderr
    assert run.stderr.count("gradwire: unknown name 'TopQ'. Did you mean TopK? There is compressor: BlockQuantize") == 1
    assert not (tmp_path / "run").exists()


# One process.


def test_one_process_trains_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_bytes(b"the same words again and again; " * 100)
    where = ["--output", str(tmp_path / "run"), "--data", *map(str, texts)]
    made = ["--lr", "0.01", "--communicator", "PowerSGD(matrix_rank=2)", "--steps", "30", "--checkpoint-every", "20"]
    assert alone(monkeypatch, "train", *TINY, *where, *made) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["name"] == "a.txt, b.txt"
    assert summary["validation_loss"] < 3  # log 256 = 5.5 at the start
    assert not dist.is_initialized()

    capsys.readouterr()
    assert alone(monkeypatch, "train", *TINY, *where) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert alone(monkeypatch, "train", "--resume", str(tmp_path / "run")) == 2
    assert "expected an unfinished run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000030")
    assert alone(monkeypatch, "train", "--resume", str(tmp_path / "run"), "--seed", "1") == 2
    assert "expected seed=0 as the run began, got seed=1" in capsys.readouterr().err
    assert alone(monkeypatch, "train", "--resume", str(tmp_path / "run"), "--eval-every", "1") == 0
    capsys.readouterr()
    assert alone(monkeypatch, "train", *TINY, *where, *made, "--elastic") == 0
    assert capsys.readouterr().out == f"all 30 steps are done; see {tmp_path / 'run'}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compressor", "ChunkTopK(k=0)"], "ChunkTopK: expected"),
        (["--feedback", "ScaledSign"], "unknown name 'ScaledSign'. There is feedback: "),
        (["--optimizer", "adamq"], "unknown name 'adamq'. Did you mean"),
        (["--optimizer", "AdamP(lr=-1.0)"], "lr"),
        (["--width", "30", "--heads", "4"], "--width: expected a multiple of 2 heads, got width=30 with heads=4."),
        (["--data", "/nowhere"], "--data: expected a file, got '/nowhere'."),
        (["--resume", "/nowhere"], "--resume: expected a run folder with a checkpoint, got '/nowhere'."),
        (["--elastic"], "--elastic: expected --output FOLDER with it, and neither --resume nor --compare."),
        (["--compare", "dense", "--compressor", "ScaledSign"], "--compare: expected whole configurations"),
        (["--compare", "dense", "Sign"], "unknown name 'Sign'"),
        (["--optimizer", "DeMo", "--feedback", "EF", "--compressor", "ScaledSign"], "DeMo: expected no compressor"),
        (["--optimizer", "DeMo", "--compare", "dense", "DeMo(k=8)"], "name another optimizer: 'dense + AdamW'"),
    ],
)
def test_mistakes_end_with_code_2_and_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert alone(monkeypatch, "train", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("gradwire: ")
    assert message in said
    assert said.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = "import sys; from gradwire.bench import cli; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_spread_repeats_an_option_for_each_value() -> None:
    given = ["train", "--compare", "a", "b", "--steps", "3", "--data", "x", "--resume", "y"]
    assert spread(given) == ["train", "--compare", "a", "--compare", "b", *given[4:]]


# The trainer, on forked ranks.


def _plain_ddp_and_ours() -> tuple[bool, bool]:
    """Weights after some steps: torch's own DDP and schedule by hand, our two hosts."""
    chosen, text = options(), corpus()
    torch.manual_seed(chosen.seed)
    model = ByteTransformer(chosen.layers, chosen.width, chosen.heads)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=chosen.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    rise = [chosen.lr * share for share in (0.25, 0.5, 0.75)]
    for step in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = rise[step] if step < 3 else cosine.get_last_lr()[0]
        x, y = text.batch(chosen.seed, step, dist.get_rank(), chosen.batch, chosen.context)
        torch.nn.functional.cross_entropy(ddp(x).transpose(1, 2), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            cosine.step()
    agree = []
    for host in ("ddp", "loop"):
        trainer = Trainer(options(host=host), text, torch.device("cpu"))
        for step in range(chosen.steps):
            trainer.step(step)
        pairs = zip(model.parameters(), trainer.model.parameters(), strict=True)
        agree.append(all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs))
    return agree[0], agree[1]


def test_dense_is_plain_data_parallel_training() -> None:
    assert run_ranks(2, _plain_ddp_and_ours) == [(True, True)] * 2


def _train(folder: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        train(options(**change), corpus(), RunFolder(Path(folder)), torch.device("cpu"), resume=False, keep=False)
        for change in changes
    ]


def test_every_dtype_host_and_bucket_size_learns_and_ranks_agree(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"dtype": "bfloat16", "configuration": "BlockQuantize(bits=4) + EF + TwoPhase"},
        {"dtype": "float16", "configuration": "ScaledSign(width=64) + EF"},
        {"dtype": "float16", "host": "loop", "configuration": "PowerSGD(matrix_rank=2)"},
        {"bucket_mb": 0.01, "configuration": "ChunkTopK(k=32, chunk=256) + EF"},
        {"bucket_mb": 0.01, "host": "loop", "optimizer": "SGD(lr=0.5, momentum=0.9)"},
        {"configuration": "DeMo(k=8, chunk=16)"},
        {"configuration": "DeMo(k=8, chunk=16, values='sign')", "dtype": "float16", "host": "loop"},
        {"configuration": "DeMo(k=8, chunk=16, form='overlapped')", "dtype": "bfloat16", "bucket_mb": 0.01},
        {"configuration": "OneBitAdam(warmup_steps=10)", "dtype": "float16"},
        {"configuration": "OneBitLAMB(warmup_steps=10)", "host": "loop"},
        {"configuration": "ZeroOneAdam(warmup_steps=10, kappa=4, double_every=8, max_interval=4)"},
    ]
    changes = [{"steps": 40, **change} for change in changes]
    for summaries in run_ranks(2, _train, str(tmp_path), changes):
        for summary in summaries:
            assert summary["ranks_equal"], summary["configuration"]
            assert summary["validation_loss"] < 4.5, summary  # log 256 = 5.5 at the start


def _hosts(configuration: str, dtype: str) -> list[tuple[bool, float, float]]:
    """Weights of both hosts, and the residual's norm and the bytes that the optimizer's own communicator counts."""
    made = []
    for host in ("ddp", "loop"):
        trainer = Trainer(options(host=host, configuration=configuration, dtype=dtype), corpus(), torch.device("cpu"))
        for step in range(3):
            trainer.step(step)
        made.append(trainer)
    pairs = zip(made[0].model.parameters(), made[1].model.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    return [
        (
            equal and trainer.ranks_equal(),
            trainer.communicator.stats.residual_norm,
            trainer.communicator.stats.bytes_sent,
        )
        for trainer in made
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_of_an_optimizer_that_exchanges_by_itself_stay_local(dtype: str) -> None:
    first, second = run_ranks(2, _hosts, "DeMo(k=8, chunk=16)", dtype)
    for (equal, norm, sent), (equal_there, norm_there, sent_there) in zip(first, second, strict=True):
        assert equal
        assert equal_there
        assert norm != norm_there > 0  # of each rank's own momentum
        assert sent == sent_there > 0


def _inf_on_one_rank(configuration: str, dtype: str) -> tuple[list[float], bool, int]:
    trainer = Trainer(options(host="loop", configuration=configuration, dtype=dtype), corpus(), torch.device("cpu"))
    weight = next(trainer.model.parameters())
    before, scales = weight.clone(), []
    if dist.get_rank() == 1:
        weight.register_hook(lambda grad: grad * torch.inf)
    for step in range(2):
        trainer.step(step)
        scales.append(trainer.scaler.get_scale())
    return scales, torch.equal(weight, before), trainer.communicator.stats.skipped


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(dtype: str) -> None:
    first, second = run_ranks(2, _inf_on_one_rank, "DeMo(k=8, chunk=16)", dtype)
    assert first == second
    scales, unchanged, skipped = first
    assert unchanged
    assert skipped == 2
    assert scales == ([1.0, 1.0] if dtype == "float32" else [2.0**15, 2.0**14])


def _evaluate() -> float:
    return Trainer(options(), corpus(), torch.device("cpu")).evaluate()


def test_evaluation_does_not_depend_on_the_number_of_ranks() -> None:
    chosen, text = options(), corpus()
    torch.manual_seed(chosen.seed)
    model = ByteTransformer(chosen.layers, chosen.width, chosen.heads)
    x, y = text.held_out(256, chosen.context, 0, 1)
    expected = torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y).item()
    assert run_ranks(3, _evaluate) == pytest.approx([expected] * 3, rel=1e-5)


# Text and model.


def test_batches_are_a_function_of_seed_step_and_rank() -> None:
    text = corpus()
    x, y = text.batch(0, 5, 1, 4, 16)
    assert torch.equal(x, text.batch(0, 5, 1, 4, 16)[0])
    assert torch.equal(x[:, 1:], y[:, :-1])
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0)):
        assert not torch.equal(x, text.batch(*other, 4, 16)[0])


def test_ranks_share_the_held_out_windows() -> None:
    text = corpus()
    shares = [text.held_out(10, 16, rank, 3)[0] for rank in range(3)]
    assert [len(share) for share in shares] == [4, 3, 3]
    whole = text.held_out(10, 16, 0, 1)[0]
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())


def test_the_standard_library_is_split_by_file() -> None:
    text = data.standard_library()
    held_out = bytes(text.validation.numpy())
    both = bytes(text.train.numpy()) + held_out
    assert 0.01 < len(held_out) / len(both) < 0.15
    for module in (json, shutil, subprocess):
        source = Path(module.__file__).read_bytes()
        assert (source in held_out) != (source in both[: len(text.train)])
    assert Path(pytest.__file__).read_bytes() not in both
    assert text.digest == data.standard_library().digest


def test_files_keep_the_end_of_each_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    text = data.files([path, path], context=8)
    assert bytes(text.train.numpy()) == bytes(range(190)) * 2
    assert bytes(text.validation.numpy()) == bytes(range(190, 200)) * 2
    with pytest.raises(UsageError, match=r"expected at least 258 bytes, got 200"):
        data.files([path], context=128)


def test_the_model_never_looks_ahead() -> None:
    model = ByteTransformer(layers=2, width=32, heads=2)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    assert nats_per_byte(before, tokens).item() == pytest.approx(5.5, abs=1)


def test_the_model_sees_relative_positions_only() -> None:
    model = ByteTransformer(layers=1, width=32, heads=2)
    block = model.blocks[0]
    h = model.bytes(torch.randint(256, (1, 11)))
    shifted = block(h, _rotation(20, 16, h.device)[:, 9:20])
    assert torch.allclose(block(h, _rotation(11, 16, h.device)), shifted, atol=1e-5)
