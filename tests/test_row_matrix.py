"""How the tensors of a bucket lie in one matrix of rows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwire.comm.feedback import StateTensor
from gradwire.comm.row_matrix import RowMatrix
from gradwire.comm.row_state import RowState
from gradwire.compression.tiles import Tile

SHAPES = [torch.Size(shape) for shape in ((3, 5), (), (0, 4), (2, 4), (17,))]
NAMES = ["a.weight", "scale", "empty", "b.weight", "bias"]


def layout(
    names: list[str] = NAMES,
    shapes: list[torch.Size] = SHAPES,
    *,
    width: int = 4,
    shards: int = 1,
    workers: int = 1,
    dtype: torch.dtype = torch.float32,
) -> RowMatrix:
    members = list(range(len(names)))
    return RowMatrix(
        names, shapes, members, dtype, Tile(width), shards=shards, workers=workers, device=torch.device("cpu")
    )


@given(
    numels=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    width=st.integers(1, 9),
    shards=st.integers(1, 5),
    workers=st.integers(1, 3),
)
def test_store_undoes_load(numels: list[int], width: int, shards: int, workers: int) -> None:
    names = [f"p{i}" for i in range(len(numels))]
    matrix = layout(names, [torch.Size([n]) for n in numels], width=width, shards=shards, workers=workers)
    lead = (workers,) if workers > 1 else ()
    grads = [torch.randn(*lead, n) for n in numels]
    x = matrix.load(grads, 1.0)
    assert x.shape == (workers * matrix.rows, width)
    assert matrix.rows == sum(-(-n // width) for n in numels)
    assert x.abs().sum() == pytest.approx(sum(float(g.abs().sum()) for g in grads), rel=1e-5)  # no entry twice
    rows = x.view(workers, matrix.rows, width)
    for worker in range(workers):
        back = [torch.full_like(grad, torch.nan) for grad in grads]
        matrix.store(rows[worker], back, 1.0)
        for got, grad in zip(back, grads, strict=True):
            expected = grad[worker].expand_as(got) if workers > 1 else grad
            assert torch.equal(got, expected)


def test_padding_is_zero_on_load_and_can_be_cleared() -> None:
    matrix = layout(workers=2)
    x = matrix.load([torch.ones(2, *shape) for shape in SHAPES], 1.0)
    entries = sum(shape.numel() for shape in SHAPES)
    assert matrix.padding.numel() == matrix.rows * 4 - entries
    assert x.sum() == 2 * entries
    assert torch.equal(matrix.clear_padding_(torch.ones_like(x)), x)


def test_factor_scales_both_ways() -> None:
    matrix = layout()
    grads = [torch.randn(shape) for shape in SHAPES]
    assert torch.equal(matrix.load(grads, 0.25), matrix.load(grads, 1.0) * 0.25)
    assert torch.equal(matrix.load(grads, torch.tensor(0.25)), matrix.load(grads, 0.25))
    back = [torch.empty_like(grad) for grad in grads]
    matrix.store(matrix.load(grads, 1.0), back, 4.0)
    assert all(torch.equal(got, 4 * grad) for got, grad in zip(back, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_float32_or_float64(dtype: torch.dtype) -> None:
    matrix = layout(dtype=dtype)
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    x = matrix.load(grads, 1.0)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    back = [torch.empty_like(grad) for grad in grads]
    matrix.store(x, back, 1.0)
    assert all(torch.equal(got, grad) for got, grad in zip(back, grads, strict=True))


def test_gradients_of_any_strides() -> None:
    grads = [torch.randn(6, 4).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(40)[::3]]
    before, strides = [grad.clone() for grad in grads], [grad.stride() for grad in grads]
    matrix = layout(["t", "conv", "slice"], [grad.shape for grad in grads], shards=3)
    x = matrix.load(grads, 1.0)
    for grad in grads:
        grad.zero_()
    matrix.store(x, grads, 1.0)
    assert [grad.stride() for grad in grads] == strides
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_owners_share_every_row_once(shards: int) -> None:
    matrix = layout(shards=shards)
    assert [0, *(matrix.block(owner).stop for owner in range(shards))] == matrix.bounds
    covered = {name: [] for name in NAMES}
    for piece in matrix.pieces:
        covered[piece.name] += range(piece.first, piece.last)
    assert {name: sorted(rows) for name, rows in covered.items()} == {
        name: list(range(-(-shape.numel() // 4))) for name, shape in zip(NAMES, SHAPES, strict=True)
    }


def test_work_is_spread_over_owners() -> None:
    names = [f"layer.{i}.bias" for i in range(400)]  # one row each: whose it is depends on the name
    matrix = layout(names, [torch.Size([4])] * len(names), shards=4)
    assert all(60 <= last - first <= 140 for first, last in pairwise(matrix.bounds))


def test_the_owner_of_a_row_does_not_depend_on_the_bucket() -> None:
    def owners(names: list[str], shapes: list[torch.Size]) -> dict[tuple[str, int], int]:
        matrix = layout(names, shapes, shards=3)
        blocks = [(owner, matrix.block(owner)) for owner in range(3)]
        return {
            (piece.name, piece.first + i): owner
            for piece in matrix.pieces
            for i in range(piece.last - piece.first)
            for owner, block in blocks
            if block.start <= piece.row + i < block.stop
        }

    together = owners(NAMES, SHAPES)
    assert owners(NAMES[::-1], SHAPES[::-1]) == together
    alone = [owners([name], [shape]) for name, shape in zip(NAMES, SHAPES, strict=True)]
    assert {key: owner for one in alone for key, owner in one.items()} == together


def test_keys_belong_to_name_and_row() -> None:
    def keys(matrix: RowMatrix) -> dict[tuple[str, int], int]:
        return {
            (piece.name, piece.first + i): int(matrix.keys[piece.row + i])
            for piece in matrix.pieces
            for i in range(piece.last - piece.first)
        }

    whole = keys(layout())
    assert len(set(whole.values())) == len(whole)
    assert keys(layout(shards=3)) == whole
    assert keys(layout(NAMES[::-1], SHAPES[::-1], shards=2)) == whole


def test_a_part_of_the_owners_is_a_part_of_the_matrix() -> None:
    matrix = layout(shards=4)
    x = matrix.load([torch.randn(shape) + 3 for shape in SHAPES], 1.0)  # no entry is zero
    part = matrix.owners(1, 3)
    rows = slice(matrix.bounds[1], matrix.bounds[3])
    assert part.rows == rows.stop - rows.start
    assert torch.equal(part.keys, matrix.keys[rows])
    assert part.bounds == [bound - rows.start for bound in matrix.bounds[1:4]]
    zeros = torch.nonzero(x[rows].flatten() == 0).flatten()
    assert torch.equal(part.padding, zeros)
    assert {(p.name, p.first, p.last) for p in part.pieces} == {
        (p.name, p.first, p.last) for p in matrix.pieces if rows.start <= p.row < rows.stop
    }
    assert matrix.owners(0, 4) is matrix
    assert matrix.owners(1, 3) is part
    nested = part.owners(1, 2)
    assert torch.equal(nested.keys, matrix.keys[matrix.block(2)])


def test_state_moves_between_buckets_by_name() -> None:
    declared = (StateTensor("residual"), StateTensor("mean", replicated=True))
    first = layout(workers=2)
    old = RowState(first, declared, first, ())
    old.stage({name: torch.randn_like(value) for name, value in old.feedback.items()})
    old.commit(torch.tensor(False))
    second = layout(NAMES[::-1], SHAPES[::-1], workers=2)
    new = RowState(second, declared, second, ())
    new.fill(old.rows())
    assert old.feedback["residual"].shape == (2 * first.rows, 4)
    assert old.feedback["mean"].shape == (first.rows, 4)
    rows = new.rows()
    assert rows.keys() == old.rows().keys()
    assert all(torch.equal(rows[key], value) for key, value in old.rows().items())


def test_staged_state_is_dropped_after_a_bad_step() -> None:
    matrix = layout()
    state = RowState(matrix, (StateTensor("residual", dtype=torch.bfloat16),), matrix, (StateTensor("second"),))
    ones = torch.ones(matrix.rows, 4)
    for bad, total in ((True, 0), (False, ones.numel())):
        state.stage({"residual": ones})
        state.stage_exchange({"second": ones})
        state.commit(torch.tensor(bad))
        assert state.feedback["residual"].sum(dtype=torch.float32) == total
        assert state.exchange["second"].sum() == total
    assert state.feedback["residual"].dtype == torch.bfloat16
    state.commit(torch.tensor(False))  # nothing staged, nothing changes
    assert state.exchange["second"].sum() == ones.numel()
