"""Train a byte-level transformer on every rank, with gradients averaged by one communicator, or by the optimizer."""

import contextlib
import hashlib
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.bench.data import Corpus
from gradwire.bench.errors import UsageError
from gradwire.bench.hosts import HOSTS, whole
from gradwire.bench.model import ByteTransformer, nats_per_byte, num_parameters
from gradwire.bench.progress import Progress
from gradwire.bench.runs import Record, RunFolder, write_json
from gradwire.bench.specs import own_communicator, parse
from gradwire.comm import Stats
from gradwire.optim import DeMo, ZeroOneAdam

_HELD_OUT_WINDOWS = 256


@final
@dataclass(frozen=True)
class Options:
    """Everything that decides a run.

    Args:
        configuration: Compressor, feedback and exchange as text (`gradwire.bench.specs`), perhaps an optimizer; of an
            optimizer that exchanges gradients by itself, nothing else.
        optimizer: Optimizer as text, for a configuration that names none.
        layers: Blocks of the model, >= 1.
        width: Size of its hidden state, a multiple of 2 heads.
        heads: Attention heads, >= 1.
        context: Bytes per sequence, >= 1.
        batch: Sequences per rank and step, >= 1.
        steps: Optimizer steps, >= 1.
        seed: Of initial weights, order of the data and every random draw of compression.
        lr: Peak learning rate of an optimizer that does not name its own, > 0.
        warmup: Share of the steps over which it rises, 0 <= warmup < 1; a cosine brings it down to zero.
        dtype: Of matrix products (autocast); float16 comes with a loss scale.
        host: "ddp" for `DistributedDataParallel`, "fsdp2" for shards on all ranks, "hsdp" for FSDP2 inside groups of
            ranks and the communicator across them, "deepspeed" for a DeepSpeed engine, "loop" for a plain loop.
        bucket_mb: Size of a gradient bucket in MiB, > 0; FSDP2 has none.
        eval_every: Steps between evaluations, >= 1.
        checkpoint_every: Steps between checkpoints; 0 for one at the end only.
        data: Paths of files to train on; the standard library's source if empty.
        shards: Ranks in a group of "hsdp", >= 1; 0 for those of one machine, or two.
        zero_stage: Of "deepspeed": 0, 1 or 2.
    """

    configuration: str
    optimizer: str
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    seed: int
    lr: float
    warmup: float
    dtype: Literal["float32", "bfloat16", "float16"]
    host: Literal["ddp", "fsdp2", "hsdp", "deepspeed", "loop"]
    bucket_mb: float
    eval_every: int
    checkpoint_every: int
    data: list[str]
    shards: int = 0
    zero_stage: int = 0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise UsageError(
                f"--width: expected a multiple of 2 heads, got width={self.width} with heads={self.heads}."
            )
        if self.lr <= 0:
            raise UsageError(f"--lr: expected lr > 0, got lr={self.lr}.")


@final
class Trainer:
    """One rank's model, optimizer and communicator, and the step that uses them.

    Args:
        options: The run.
        corpus: The text.
        device: Where to train.
    """

    def __init__(self, options: Options, corpus: Corpus, device: torch.device) -> None:
        self.options, self.corpus, self.device = options, corpus, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        configuration = parse(options.configuration, options.optimizer)
        torch.manual_seed(options.seed)  # every rank starts from the same weights
        self.model = ByteTransformer(options.layers, options.width, options.heads).to(device)
        host = HOSTS[options.host]
        self.host = host(
            self.model,
            bucket_mb=options.bucket_mb,
            shards=options.shards,
            zero_stage=options.zero_stage,
            batch=options.batch,
            dtype=options.dtype,
        )
        self.optimizer = configuration.optimizer(
            self.model.named_parameters(),
            options.optimizer,
            lr=options.lr,
            seed=options.seed,
            group=self.host.group,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
        self._peak_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        own = own_communicator(self.optimizer)
        self._exchanges_itself = own is not None
        if own is None:
            self.communicator = configuration.communicator(options.seed, self.host.group, host.exchange)
            try:
                self.host.attach(self.communicator, self.optimizer, self.scaler)
            except (TypeError, ValueError) as error:
                raise UsageError(str(error)) from None
        else:
            self.communicator = own
            self.host.keep_local(self.optimizer)

    def step(self, step: int) -> Tensor:
        """One optimizer step, counted from 0; returns this rank's loss."""
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * self._schedule(step)
        batch = self.corpus.batch(self.options.seed, step, self.rank, self.options.batch, self.options.context)
        loss = self._loss(self.host.forward, *batch)
        self.host.backward(loss, self.scaler)
        self.host.step(self.optimizer, self.scaler)
        return loss.detach()

    def wait(self) -> None:
        """Let an exchange that the optimizer has left in flight end, so that its counts are those of all steps."""
        if isinstance(self.optimizer, DeMo):
            self.optimizer.wait()

    def settle(self) -> None:
        """Apply what an exchange in flight brings, too, and end local steps."""
        if isinstance(self.optimizer, DeMo | ZeroOneAdam):
            self.optimizer.synchronize()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per byte over held-out windows, shared among the ranks."""
        with self.optimizer.returned() if isinstance(self.optimizer, DeMo) else contextlib.nullcontext():
            return self._evaluate()

    def _evaluate(self) -> float:
        inputs, targets = self.corpus.held_out(_HELD_OUT_WINDOWS, self.options.context, self.rank, self.world_size)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        most = -(-_HELD_OUT_WINDOWS // self.world_size)  # windows of any rank
        for first in range(0, most, self.options.batch):
            some = slice(first, first + self.options.batch)
            if windows := len(inputs[some]):
                total[0] += self._loss(self.model, inputs[some], targets[some]).double() * windows
                total[1] += windows
            elif self.host.sharded:
                self._loss(self.model, inputs[:1], targets[:1])  # other ranks need its shards once more
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def mean_over_ranks(self, losses: list[Tensor]) -> float:
        """Mean of these losses over all ranks."""
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return float(mean) / self.world_size

    def ranks_equal(self) -> bool:
        """Whether all ranks hold the same weights, to the bit."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self.model.parameters():
            digest.update(whole(parameter).cpu().flatten().view(torch.uint8).numpy().tobytes())
        digests: list[Any] = [None] * self.world_size
        dist.all_gather_object(digests, digest.hexdigest())
        return len(set(digests)) == 1

    def save(self, folder: RunFolder, step: int) -> None:
        """Write a checkpoint."""
        self.settle()
        self.host.save(folder.checkpoint(step), **self._state())

    def load(self, folder: RunFolder, step: int) -> None:
        """Continue from a checkpoint."""
        self.host.load(folder.checkpoint(step), **self._state())

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if not self._exchanges_itself:  # else it comes with the optimizer
            state["communicator"] = self.communicator
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler
        return state

    def _loss(self, model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        dtype = getattr(torch, self.options.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs.to(self.device, non_blocking=True))
        return nats_per_byte(logits, targets.to(self.device, non_blocking=True))

    def _schedule(self, step: int) -> float:
        """Share of the peak learning rate: a linear rise, then a cosine to zero."""
        rise = self.options.warmup * self.options.steps
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.options.steps - rise)))


def train(
    options: Options, corpus: Corpus, folder: RunFolder, device: torch.device, *, resume: bool, keep: bool
) -> Record:
    """Run all steps; every rank calls it.

    Args:
        options: The run.
        corpus: The text.
        folder: Where rank 0 writes metrics and summary, and every rank its part of the checkpoints.
        device: Where to train.
        resume: Continue from the folder's newest checkpoint.
        keep: Save a checkpoint at the end.

    Returns:
        The summary.
    """
    trainer = Trainer(options, corpus, device)
    start = (folder.newest_checkpoint() or 0) if resume else 0
    dist.barrier()  # everybody has looked before rank 0 begins to write
    if start:
        trainer.load(folder, start)
    speaks = trainer.rank == 0
    clock = _Clock(options.batch * options.context * trainer.world_size, trainer.communicator.stats)
    if speaks and resume:
        clock.continue_from(folder.continue_from(start))
    elif speaks:
        folder.start(asdict(options))

    record: Record = {}
    losses: list[Tensor] = []
    log_every = min(10, max(1, options.steps // 100))
    with Progress(options.configuration, options.steps, enabled=speaks) as progress:
        clock.resume()
        for step in range(start + 1, options.steps + 1):
            losses.append(trainer.step(step - 1))
            last = step == options.steps
            evaluates = last or step % options.eval_every == 0
            saves = (last and keep) or bool(options.checkpoint_every and step % options.checkpoint_every == 0)
            if not (evaluates or saves or step % log_every == 0):
                continue
            if last:
                trainer.settle()
            else:
                trainer.wait()
            train_loss = trainer.mean_over_ranks(losses)  # waits for the device
            clock.pause()
            record = {"step": step, "train_loss": train_loss, "validation_loss": None}
            record |= clock.read(trainer.communicator.stats, len(losses))
            record["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
            losses.clear()
            if evaluates:
                record["validation_loss"] = trainer.evaluate()
            if speaks:
                folder.append(record)
                progress.show(record)
            if saves:
                trainer.save(folder, step)
            clock.resume()
    summary = _summary(trainer, folder, record)
    trainer.host.close()
    return summary


def _summary(trainer: Trainer, folder: RunFolder, record: Record) -> Record:
    """What a finished run amounts to; rank 0 writes it down."""
    options, stats = trainer.options, trainer.communicator.stats
    summary = {
        "configuration": options.configuration,
        "communicator": repr(trainer.communicator),
        "validation_loss": record["validation_loss"],
        "train_loss": record["train_loss"],
        "steps": options.steps,
        "skipped_steps": stats.skipped,
        "bytes_per_step": record["bytes_sent"] / options.steps,
        "compression_rate": record["compression_rate"],
        "seconds": record["seconds"],
        "tokens": options.steps * trainer.world_size * options.batch * options.context,
        "parameters": num_parameters(trainer.model),
        "ranks_equal": trainer.ranks_equal(),
        "world_size": trainer.world_size,
        "data": {"name": trainer.corpus.name, "digest": trainer.corpus.digest},
        "options": asdict(options),
    }
    if trainer.rank == 0:
        write_json(folder.path / "summary.json", summary)
    return summary


@final
class _Clock:
    """Seconds spent on training (not on evaluation) and bytes sent, across resumed runs.

    Args:
        tokens_per_step: Bytes of text that all ranks together train on in one step.
        stats: The communicator's before the first step: loading a checkpoint may exchange something, too.
    """

    def __init__(self, tokens_per_step: int, stats: Stats) -> None:
        self._tokens_per_step = tokens_per_step
        self._loaded = stats
        self._earlier: Record = {"seconds": 0.0, "bytes_sent": 0.0, "dense_bytes": 0.0}
        self._before = self._earlier
        self._seconds, self._since = 0.0, 0.0

    def continue_from(self, record: Record | None) -> None:
        """Add to the totals of an earlier run."""
        if record is not None:
            self._earlier = self._before = record
            self._seconds = record["seconds"]

    def resume(self) -> None:
        """Training goes on."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Something else happens."""
        self._seconds += time.perf_counter() - self._since

    def read(self, stats: Stats, steps: int) -> Record:
        """Totals so far, and rates over the `steps` steps since the last reading."""
        bytes_sent = self._earlier["bytes_sent"] + stats.bytes_sent - self._loaded.bytes_sent
        dense_bytes = self._earlier["dense_bytes"] + stats.dense_bytes - self._loaded.dense_bytes
        seconds = self._seconds - self._before["seconds"]
        record = {
            "seconds": self._seconds,
            "bytes_sent": bytes_sent,
            "dense_bytes": dense_bytes,
            "compression_rate": dense_bytes / bytes_sent if bytes_sent else 1.0,
            "bytes_per_step": (bytes_sent - self._before["bytes_sent"]) / steps,
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "residual_norm": stats.residual_norm,
            "skipped_steps": stats.skipped,
        }
        self._before = record
        return record
