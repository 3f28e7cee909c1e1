"""Checks of communicators on DeepSpeed engines; `tests/test_deepspeed.py` runs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed_training import (
    Training,
    assert_agreed,
    assert_equal,
    check,
    error_of,
    int8,
    lossless,
    rank,
    sparse,
)
from torch import nn

from gradwire import comm, optim
from gradwire.compression import Identity

# Lossless: the same as without gradwire. Two numbers have one sum; with four, gloo adds in an order of its own.


def _lossless(stage: int, **options: Any) -> None:
    atol = 0.0 if torch.distributed.get_world_size() == 2 else 1e-5
    ours, theirs = Training(stage, lossless(), **options), Training(stage, **options)
    start = ours.flat()
    torch.testing.assert_close(ours.run(4), theirs.run(4), rtol=0.0, atol=atol)
    assert_equal(ours.flat(), theirs.flat(), atol)
    assert (ours.flat() - start).abs().max() > 1e-2
    assert_agreed(ours.flat())
    assert ours.communicator is not None
    assert ours.communicator.stats.steps == 4 * (ours.accumulate if stage == 2 else 1)


@check
def lossless_is_plain_at_stage_0() -> None:
    _lossless(0)
    _lossless(0, accumulate=2)


@check
def lossless_is_plain_at_stage_1() -> None:
    _lossless(1)
    _lossless(1, accumulate=2)


@check
def lossless_is_plain_at_stage_2() -> None:
    _lossless(2)
    _lossless(2, accumulate=2)


@check
def lossless_is_plain_in_16_bits() -> None:
    for stage in (0, 1, 2):
        _lossless(stage, bf16=True)


@check
def lossless_is_plain_with_many_buckets() -> None:
    """Some parameters are larger than a bucket, which DeepSpeed treats in another way."""
    for stage in (1, 2):
        _lossless(stage, zero={"reduce_bucket_size": 400})


@check
def lossless_is_plain_without_managed_accumulation() -> None:
    for stage in (0, 1, 2):
        _lossless(stage, managed_gradient_accumulation=False)


@check
def unused_parameters_take_part_with_zero() -> None:
    for stage in (0, 1, 2):
        training = Training(stage, lossless())
        training.model[2].forward = lambda x: x
        before = training.flat()
        training.run(1)
        assert_agreed(training.flat())
        assert not torch.equal(training.flat(), before)


# Lossy: it trains.


def _trains(make: Callable[[], comm.Communicator], stages: tuple[int, ...], rate: float) -> None:
    dense = Training(0).run(60)
    for stage in stages:
        training = Training(stage, make())
        losses = training.run(60)
        assert_agreed(training.flat())
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses
        assert sum(losses[-5:]) < sum(dense[-5:]) + 0.5, (losses[-5:], dense[-5:])
        assert training.communicator is not None
        # An all-gather sends as many payloads as there are other ranks.
        assert training.communicator.stats.compression_rate > rate * 2 / torch.distributed.get_world_size()


@check
def sparse_gradients_with_ef21_train() -> None:
    _trains(sparse, (0, 1, 2), 2.0)


@check
def int8_gradients_with_two_phases_train() -> None:
    _trains(int8, (0, 1, 2), 3.0)


# Faults.


@check
def inf_on_one_rank_skips_the_step_on_all() -> None:
    for stage in (0, 1, 2):
        for accumulate in (1, 2):
            training = Training(stage, sparse(), accumulate=accumulate)
            training.run(2)
            before = training.flat()
            training.run(1, lambda step, part: rank() == 1 and part == 0)
            assert_equal(training.flat(), before)
            assert training.communicator is not None
            assert training.communicator.stats.skipped == 1
            training.run(1)
            assert training.flat().isfinite().all()
            assert not torch.equal(training.flat(), before)
            assert_agreed(training.flat())


@check
def skipped_steps_leave_no_trace() -> None:
    for stage in (0, 1, 2):
        spoilt, whole = Training(stage, sparse()), Training(stage, sparse())
        spoilt.run(3)
        whole.run(3)
        spoilt.run(1, lambda step, part: rank() == 0)
        whole.batches.set_state(spoilt.batches.get_state())
        spoilt.run(3)
        whole.run(3)
        assert_equal(spoilt.flat(), whole.flat())


@check
def inf_in_16_bits_skips_the_step() -> None:
    for stage in (0, 1, 2):
        training = Training(stage, sparse(), bf16=True)
        training.run(2)
        before = training.flat()
        training.run(1, lambda step, part: rank() == 1)
        assert_equal(training.flat(), before)
        training.run(1)
        assert training.flat().isfinite().all()
        assert not torch.equal(training.flat(), before)


# Checkpoints.


@check
def resumes_exactly() -> None:
    for stage in (0, 1, 2):

        def adabelief(model: nn.Module) -> Any:
            return optim.AdaBelief(model.named_parameters(), lr=1e-2)

        through, first = (Training(stage, sparse(), optimizer=adabelief) for _ in range(2))
        through.run(6)
        first.run(3)
        folder = Path(f"resume-{stage}")
        first.engine.save_checkpoint(str(folder / "engine"))
        comm.checkpoint.save(folder / "gradwire", communicator=first.communicator)
        second = Training(stage, sparse(), optimizer=adabelief)
        second.engine.load_checkpoint(str(folder / "engine"))
        without = Training(stage, sparse(), optimizer=adabelief)
        without.engine.load_checkpoint(str(folder / "engine"))
        comm.checkpoint.load(folder / "gradwire", communicator=second.communicator)
        for training in (second, without):
            training.batches.set_state(first.batches.get_state())
            training.run(3)
        assert_equal(second.flat(), through.flat())
        assert not torch.equal(without.flat(), through.flat())


# What is refused, and what is given back.


def _refused(stage: int, *, zero: dict[str, Any] | None = None, **options: Any) -> str:
    training = Training(stage, zero=zero, **options)
    communicator = lossless()
    message = error_of(lambda: comm.attach(training.engine, communicator))
    assert not communicator.attached
    training.run(1)
    return message


@check
def what_is_not_supported_is_refused() -> None:
    native = "zero_quantized_gradients, zero_quantized_weights and zero_hpz_partition_size"
    assert "got stage 3" in (message := _refused(3))
    assert native in message
    assert "expected a DeepSpeed engine with reduce_scatter=False" in _refused(2, zero={"reduce_scatter": True})
    assert '"overlap_comm": false' in _refused(1, zero={"overlap_comm": True})
    assert '"contiguous_gradients": true' in _refused(2, zero={"contiguous_gradients": False})
    assert "gradient_allreduce_op='sum'" in _refused(0, gradient_allreduce_op="sum")
    wide = {"grad_accum_dtype": "fp32"}
    assert "got BF16_Optimizer without" in _refused(1, bf16=True, data_types=wide)


@check
def arguments_for_other_hosts_are_refused() -> None:
    training = Training(0)
    arguments: Any = {"optimizer": training.engine.basic_optimizer}
    message = error_of(lambda: comm.attach(training.engine, lossless(), **arguments), TypeError)
    assert "expected a DeepSpeed engine alone" in message
    communicator = lossless()
    handle = comm.attach(training.engine, communicator)
    assert "attached to nothing else" in error_of(lambda: comm.attach(training.engine, communicator))
    handle.detach()
    one = torch.distributed.new_group([rank()], use_local_synchronization=True)
    alone = comm.Communicator(Identity(), group=one)
    ranks = torch.distributed.get_world_size()
    assert f"expected a communicator of the engine's {ranks} data-parallel ranks, got one of 1" in error_of(
        lambda: comm.attach(training.engine, alone)
    )


@check
def detaching_gives_the_reduction_back() -> None:
    for stage in (0, 1, 2):
        ours, theirs = Training(stage, lossless()), Training(stage)
        assert ours.handle is not None
        assert ours.communicator is not None
        ours.run(2)
        ours.handle.detach()
        ours.run(2)
        theirs.run(4)
        assert_equal(ours.flat(), theirs.flat())
        assert ours.communicator.stats.steps == 2
        assert not ours.communicator.attached


@check
def documentation_is_true() -> None:
    text = (Path(__file__).parent.parent / "docs" / "deepspeed.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert blocks
    exec(compile("\n".join(blocks), "docs/deepspeed.md", "exec"), {})
