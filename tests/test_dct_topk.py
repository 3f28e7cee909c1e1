"""Tiles, orthonormal transforms and `DCTTopK`: against an FFT, a closed form, and the published table of bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import demo

from gradwire.comm import EF, Communicator, DecoupledMomentum, Plan, Simulated
from gradwire.compression import DCTTopK, sign_codes
from gradwire.compression.orthonormal import dct_matrix, random_matrix, transform_rows
from gradwire.compression.tiles import Tile, square_tile

SHAPES = [(96,), (7,), (), (128, 64), (10, 30), (16, 3, 3, 3), (65, 130), (5000,), (1, 4096), (50257, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", ["dct", "random"])
def test_transform_is_an_isometry_and_has_an_inverse(shape: tuple[int, ...], transform: str) -> None:
    dct_topk = DCTTopK(transform=transform)
    x = torch.randn(shape, dtype=torch.float64)
    tile = dct_topk.tile(x.shape)
    rows = dct_topk.to_rows(x)
    coefficients = dct_topk.transform_rows(rows, tile)
    torch.testing.assert_close(coefficients.norm(), x.norm(), rtol=1e-12, atol=0)
    back = dct_topk.from_rows(dct_topk.inverse_transform_rows(coefficients, tile), x.shape)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    assert rows.shape[0] == dct_topk.num_rows(x.shape)


@pytest.mark.parametrize("shape", [(96,), (5000,), (128, 64), (10, 30), (65, 130), (16, 3, 3, 3)], ids=str)
def test_coefficients_are_those_of_the_fft(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    dct_topk = DCTTopK()
    ours = dct_topk.transform_rows(dct_topk.to_rows(x), dct_topk.tile(x.shape))
    blocks = demo.cut(x.numpy(), chunk=64)
    expected = np.stack([demo.change_basis(block, x.ndim > 1).ravel() for block in blocks])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)


def test_matrices_are_orthonormal() -> None:
    for size in (1, 2, 33, 64):
        for matrix in (dct_matrix(size), random_matrix(size)):
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(random_matrix(8), random_matrix(8))


def test_a_smooth_tile_needs_few_coefficients() -> None:
    line = torch.linspace(-1, 1, 64)
    smooth = torch.outer(line, line) + 2.0
    dct_topk, entries = DCTTopK(k=8, values="fp32"), DCTTopK(k=8, values="fp32", transform="none")
    errors = [(c.decompress(c.compress(smooth)) - smooth).norm() / smooth.norm() for c in (dct_topk, entries)]
    assert errors[0] < 0.02 < 0.9 < errors[1]


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=4).map(tuple),
    side=st.integers(2, 20),
    workers=st.integers(1, 3),
)
def test_cut_and_join(shape: tuple[int, ...], side: int, workers: int) -> None:
    tile = square_tile(torch.Size(shape), side)
    lead = (workers,) if workers > 1 else ()
    x = torch.randn(lead + shape)
    rows = tile.cut(x, workers).view(workers, -1, tile.numel)
    assert max(tile.height, tile.width) <= side
    assert rows.shape[1] == tile.rows(torch.Size(shape))
    assert (rows != 0).sum() == x.numel()
    for worker in range(workers):
        assert torch.equal(tile.join(rows[worker], torch.Size(shape)), x[worker] if workers > 1 else x)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((128, 64), Tile(64, 64, matrix=True)),
        ((65, 64), Tile(64, 33, matrix=True)),  # two times 33, not 64 and 1
        ((50257, 768), Tile(64, 64, matrix=True)),
        ((16, 3, 3, 3), Tile(27, 16, matrix=True)),
        ((4096,), Tile(64, 64)),
        ((768,), Tile(64, 12)),
        ((10,), Tile(10, 1)),
        ((), Tile(1, 1)),
        ((0, 5), Tile(1)),
    ],
    ids=str,
)
def test_tiles_leave_little_padding(shape: tuple[int, ...], tile: Tile) -> None:
    assert square_tile(torch.Size(shape), 64) == tile


# What travels.

TILES = 287_296
"""Tiles of 64 x 64 of the published model of 1176.8 M parameters; its table is in MB of 10^6 bytes."""
PUBLISHED = {  # bytes of a coefficient that is packed to the bit, and MB for k = 1, 2, 4, 8, 16, 32
    "bf16": (3.5, (1.01, 2.01, 4.02, 8.04, 16.09, 32.18)),
    "sign": (1.625, (0.47, 0.93, 1.87, 3.73, 7.47, 14.94)),
}


@pytest.mark.parametrize("values", PUBLISHED)
def test_bytes_are_those_of_the_table(values: str) -> None:
    per_coefficient, table = PUBLISHED[values]
    for k, megabytes in zip((1, 2, 4, 8, 16, 32), table, strict=True):
        payload = DCTTopK(k=k, values=values).compress(torch.randn(128, 192))
        tile_bytes = sum(len(part.numpy().tobytes()) for part in _as_bytes(payload.parts)) / 6
        packed = k * per_coefficient
        assert tile_bytes == int(tile_bytes)
        assert packed <= tile_bytes < packed + 1  # rows end at whole bytes, which costs something below k = 8
        if k >= 8:
            assert tile_bytes == packed
            assert round(TILES * tile_bytes / 1e6, 2) == megabytes


def _as_bytes(parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [part.reshape(-1).view(torch.uint8) for part in parts]


def test_unpacked_bytes_are_the_papers() -> None:
    """The paper's figures are 12 bytes a coefficient: a 64-bit position and a float32."""
    for k, megabytes in ((32, 110.32), (16, 55.16), (2, 6.9)):
        assert round(12 * k * TILES / 1e6, 2) == pytest.approx(megabytes, abs=0.01)


# Signs.


def test_signs_say_zero() -> None:
    rows = torch.zeros(4, 64)
    rows[1, 5] = -2.0  # one entry that is not zero, in a row of eight that are sent
    rows[2] = torch.randn(64)
    rows[3, :3] = torch.tensor([1.0, -1e-30, 0.0])
    dct_topk = DCTTopK(k=8, chunk=8, values="sign", transform="none")
    arrives = dct_topk.decompress_rows(dct_topk.compress_rows(rows, torch.float32), 64)
    assert torch.equal(arrives[[0, 1, 3]], rows[[0, 1, 3]].sign())
    assert arrives[2].abs().sum() == 8
    single = DCTTopK(k=1, chunk=8, values="sign", transform="none")
    assert torch.equal(single.decompress_rows(single.compress_rows(rows[:2], torch.float32), 64), rows[:2].sign())


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [1, 2, 30, 64, 4096])
def test_codes_keep_positions_and_signs(k: int, width: int) -> None:
    k = min(k, width)
    rows = torch.randn(50, width) * (torch.rand(50, width) < 0.5)
    indices = rows.abs().topk(k).indices
    packed = sign_codes.pack_codes(rows.gather(1, indices), indices, width)
    assert packed.shape[1] == sign_codes.code_part(k, width).columns
    expected = torch.zeros_like(rows).scatter_(1, indices, rows.gather(1, indices).sign())
    assert torch.equal(sign_codes.signs(packed, k, width), expected)


def test_hostile_positions_are_refused() -> None:
    values, indices = DCTTopK(k=4, chunk=8, values="fp32").compress(torch.randn(8, 8)).parts
    with pytest.raises(ValueError, match="DCTTopK: expected every index once in a row, got one twice"):
        DCTTopK(k=4, chunk=8, values="fp32").check_parts((values, torch.zeros_like(indices)), 64)
    with pytest.raises(ValueError, match=r"DCTTopK: expected indices in \[0, 48\)"):
        DCTTopK(k=4, chunk=8, values="fp32").check_parts((values[:, :3], indices[:, :3] | 255), 48)
    with pytest.raises(ValueError, match="DCTTopK: expected codes <= 95, got one above"):
        DCTTopK(k=4, chunk=8, values="sign").check_parts((torch.full((1, 3), 255, dtype=torch.uint8),), 48)


# In a communicator.


@pytest.mark.parametrize("shape", [(3, 20, 36), (3, 40), (3, 6, 5, 2)], ids=str)
def test_feedback_conserves_what_it_is_given(shape: tuple[int, ...]) -> None:
    """What was sent and what is kept add up to what came in, although state is in the coefficients' basis."""
    plan = Plan(min_ndim=0, min_numel=0)
    communicator = Communicator(DCTTopK(k=8, chunk=16), feedback=EF(), exchange=Simulated(3), plan=plan)
    came, sent = torch.zeros(shape[1:]), torch.zeros(shape[1:])
    for _ in range(20):
        grads = torch.randn(shape)
        came += grads.mean(0)
        communicator.average_([grads], ["w"])
        sent += grads[0]
    kept = torch.zeros(shape)
    communicator.read_state("residual", [kept], ["w"])
    torch.testing.assert_close(came, sent + kept.mean(0), rtol=1e-4, atol=1e-4)
    assert (kept.flatten(1).norm(dim=1) > 1).all()
    assert not torch.equal(kept[0], kept[1])


def test_state_is_read_in_entries() -> None:
    communicator = Communicator(DCTTopK(k=4096, values="fp32"), feedback=DecoupledMomentum(0.5, alpha=0.0))
    grads = [torch.randn(70, 64), torch.randn(3)]
    expected = grads[0].clone()
    communicator.average_([grad.clone() for grad in grads], ["w", "b"])
    read = [torch.full_like(grad, torch.nan) for grad in grads]
    communicator.read_state("momentum_buffer", read, ["w", "b"])
    torch.testing.assert_close(read[0], expected, rtol=0, atol=1e-5)
    assert not read[1].any()  # sent dense


def test_contributors_alone_are_counted() -> None:
    grads = torch.zeros(3, 64, 64)
    grads[0, 0, 0], grads[1, 0, 1], grads[2, 0, 1] = 3.0, 2.0, 4.0
    for merge, expected in (("mean", (1.0, 2.0)), ("contributors", (3.0, 3.0))):
        compressor = DCTTopK(k=2, transform="none", values="fp32")
        communicator = Communicator(compressor, exchange=Simulated(3, merge=merge))
        mine = grads.clone()
        communicator.average_([mine], ["w"])
        assert mine[0, 0, :2].tolist() == list(expected)
        assert mine[0].count_nonzero() == 2


def test_transform_in_blocks_is_the_transform() -> None:
    x = torch.randn(200, 4096, dtype=torch.float64)
    tile = Tile(64, 64, matrix=True)
    matrix = dct_matrix(64)
    expected = matrix @ x.view(-1, 64, 64) @ matrix.T
    torch.testing.assert_close(transform_rows(x, tile, "dct"), expected.view(-1, 4096), rtol=0, atol=1e-12)
