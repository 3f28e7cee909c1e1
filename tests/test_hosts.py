"""Every host of `gradwire train`: lossless as the host without gradwire, lossy it trains, on 2 and 4 real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_train import corpus, options
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradwire.bench import hosts
from gradwire.bench.errors import UsageError
from gradwire.bench.model import ByteTransformer, nats_per_byte
from gradwire.bench.runs import RunFolder
from gradwire.bench.train import Trainer, train

STEPS = 12
LOSSY = ("ChunkTopK(k=64, chunk=256) + EF21", "BlockQuantize(bits=8) + EF + TwoPhase")
SCATTERED = (LOSSY[0], "BlockQuantize(bits=8) + EF")  # in FSDP2's own reduce-scatter
HOSTS = sorted(hosts.HOSTS.keys() - {"deepspeed"})  # which is an extra: tests/test_deepspeed.py


def _without_gradwire(host: str) -> list[float]:
    """This rank's losses where torch alone averages."""
    chosen, text = options(), corpus()
    torch.manual_seed(chosen.seed)
    model = ByteTransformer(chosen.layers, chosen.width, chosen.heads)
    forward: Any = model
    if host == "ddp":
        forward = DistributedDataParallel(model)
    elif host == "fsdp2":
        hosts.shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    elif host == "hsdp":
        shape = (dist.get_world_size() // 2, 2)
        hosts.shard(model, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.lr)
    schedule = Trainer(chosen, text, torch.device("cpu"))._schedule
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = chosen.lr * schedule(step)
        x, y = text.batch(chosen.seed, step, dist.get_rank(), chosen.batch, chosen.context)
        loss = nats_per_byte(forward(x), y)
        loss.backward()
        if host == "loop":
            for p in model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _with(host: str) -> list[float]:
    trainer = Trainer(options(host=host), corpus(), torch.device("cpu"))
    return [trainer.step(step).item() for step in range(STEPS)]


def _losses(host: str) -> tuple[list[float], list[float]]:
    return _without_gradwire(host), _with(host)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("host", HOSTS)
def test_a_lossless_communicator_gives_the_losses_of_the_host_alone(host: str, ranks: int) -> None:
    for alone, ours in run_ranks(ranks, _losses, host):
        assert ours == pytest.approx(alone, rel=1e-5)  # sums of float32 in another order
        assert alone[-1] < 0.9 * alone[0]


def _train(folder: str, host: str) -> list[dict[str, Any]]:
    return [
        train(
            options(host=host, configuration=configuration, steps=40),
            corpus(), RunFolder(Path(folder)), torch.device("cpu"), resume=False, keep=False,
        )
        for configuration in (SCATTERED if host == "fsdp2" else LOSSY)
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("host", HOSTS)
def test_lossy_communicators_train_and_ranks_stay_equal(host: str, ranks: int, tmp_path: Path) -> None:
    summaries = run_ranks(ranks, _train, str(tmp_path), host)
    for summary in summaries[0]:
        assert summary["ranks_equal"]
        assert summary["validation_loss"] < 4.5  # log 256 = 5.5 at the start
        assert summary["compression_rate"] > 1 or (host == "hsdp" and ranks == 2)  # one replica sends nothing


def _resume(folder: str, host: str, configuration: str) -> bool:
    """Whether a run resumed in the middle ends with the weights of one that was not interrupted."""
    kept = RunFolder(Path(folder))
    chosen, text, device = options(host=host, configuration=configuration), corpus(), torch.device("cpu")
    whole = Trainer(chosen, text, device)
    for step in range(STEPS):
        if step == STEPS // 2:
            whole.save(kept, step)
        whole.step(step)
    again = Trainer(chosen, text, device)
    again.load(kept, STEPS // 2)
    for step in range(STEPS // 2, STEPS):
        again.step(step)
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    return all(torch.equal(hosts.whole(a), hosts.whole(b)) for a, b in pairs)


@pytest.mark.parametrize(
    ("host", "configuration"), [("hsdp", LOSSY[0]), ("hsdp", "DeMo(k=8, chunk=16)"), ("fsdp2", SCATTERED[0])]
)
def test_a_sharded_run_resumes_to_the_bit(host: str, configuration: str, tmp_path: Path) -> None:
    assert all(run_ranks(4, _resume, str(tmp_path), host, configuration))


def _mistakes(given: list[dict[str, Any]]) -> list[str]:
    said = []
    for changes in given:
        with pytest.raises(UsageError) as raised:
            Trainer(options(**changes), corpus(), torch.device("cpu"))
        said.append(str(raised.value))
    return said


def test_what_does_not_fit_a_host_is_refused() -> None:
    mistakes: dict[str, dict[str, Any]] = {
        "--shards: expected a divisor of 2 ranks, got shards=3.": {"host": "hsdp", "shards": 3},
        "--shards: expected --host hsdp with it, got shards=2.": {"host": "ddp", "shards": 2},
        "--zero-stage: expected --host deepspeed with it, got zero_stage=1.": {"host": "ddp", "zero_stage": 1},
        "Use --host hsdp.": {"host": "fsdp2", "configuration": "DeMo(k=8, chunk=16)"},
        "exchange=ReduceScatter()": {"host": "fsdp2", "configuration": "PowerSGD(matrix_rank=2)"},
    }
    for said in run_ranks(2, _mistakes, list(mistakes.values())):
        for expected, message in zip(mistakes, said, strict=True):
            assert expected in message
            assert "\n" not in message
