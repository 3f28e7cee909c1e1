"""Compressors on CUDA: the results of the CPU, eager and compiled, and no waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import COMPRESSORS

from gradwire.compression import Compressor, Payload, counter_rng
from gradwire.compression.fused import fuse

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # compilers warn

every_compressor = pytest.mark.parametrize(
    "compressor", [case.compressor for case in COMPRESSORS], ids=lambda compressor: repr(compressor)
)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """No two magnitudes are equal, so that what is kept of them does not depend on how ties are broken."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (x + x.sign() * torch.arange(x.numel()).view(shape) * 1e-6).to(dtype)


def assert_close(compressor: Compressor, ours: torch.Tensor, theirs: torch.Tensor, *, levels: bool = False) -> None:
    """Equal up to the last bits of a scale; with `levels`, one entry in a thousand may be rounded to the next level.

    A transform's products round differently, and may round a coefficient to its format's next value.
    """
    difference = (ours.double().cpu() - theirs.double()).abs()
    allowed = (2e-2 if compressor.changes_basis else 2e-6) * theirs.double().abs().amax().clamp(min=1e-30)
    share = (difference > allowed).double().mean().item()
    assert share <= (1e-3 if levels else 0.0), f"{compressor!r}: {share:.2%} of the entries differ"


@every_compressor
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (257, 300)], ids=str)
def test_cuda_gives_what_the_cpu_gives(compressor: Compressor, shape: tuple[int, ...]) -> None:
    x = gaussian(shape)
    payload = compressor.compress(x.cuda(), seed=5)
    expected = compressor.compress(x, seed=5)
    decoded = compressor.decompress(payload)
    assert all(part.is_cuda for part in payload.parts)
    assert decoded.is_cuda
    assert [part.shape for part in payload.parts] == [part.shape for part in expected.parts]
    if x.numel():
        assert_close(compressor, decoded, compressor.decompress(expected))


@every_compressor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_on_cuda(compressor: Compressor, dtype: torch.dtype) -> None:
    x = gaussian((4100,), torch.float32).to(dtype).cuda()
    decoded = compressor.decompress(compressor.compress(x))
    assert (decoded.dtype, decoded.shape, decoded.device) == (x.dtype, x.shape, x.device)
    assert decoded.isfinite().all()


@every_compressor
def test_a_payload_of_the_cpu_decodes_equally_on_cuda(compressor: Compressor) -> None:
    payload = compressor.compress(gaussian((257, 300)), seed=5)
    moved = Payload(
        tuple(part.cuda() for part in payload.parts),
        payload.shape,
        payload.dtype,
        None if payload.keys is None else payload.keys.cuda(),
    )
    ours, theirs = compressor.decompress(moved).cpu(), compressor.decompress(payload)
    assert torch.allclose(ours, theirs, atol=1e-5) if compressor.changes_basis else torch.equal(ours, theirs)


@pytest.mark.parametrize(  # one of each class: compiling takes seconds
    "compressor", list({type(case.compressor): case.compressor for case in COMPRESSORS}.values()), ids=repr
)
def test_the_compiled_form_gives_what_the_cpu_gives(compressor: Compressor) -> None:
    def through(rows: torch.Tensor, keys: torch.Tensor | None) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        parts = compressor.compress_rows(rows, torch.float32, keys)
        return parts, rows - compressor.decompress_rows(parts, rows.shape[1], keys)

    torch._dynamo.reset()
    rows = compressor.to_rows(gaussian((257, 300)))
    keys = None if compressor.randomness == "none" else counter_rng.row_keys(5, rows.shape[0])
    parts, residual = fuse(through)(rows.cuda(), None if keys is None else keys.cuda())
    decoded = compressor.decompress_rows(parts, rows.shape[1], None if keys is None else keys.cuda())
    # The compiler may divide with another last bit, which moves an entry that stands between two levels.
    expected = through(rows, keys)[1]
    assert_close(compressor, rows.cuda() - residual, rows - expected, levels=True)
    assert torch.allclose(rows.cuda() - decoded, residual, atol=1e-5)


@every_compressor
def test_nothing_waits_for_the_device(compressor: Compressor) -> None:
    x = gaussian((257, 300)).cuda()
    compressor.decompress(compressor.compress(x))  # the first call may load kernels
    torch.cuda.synchronize()
    with no_synchronization():
        compressor.decompress(compressor.compress(x))
