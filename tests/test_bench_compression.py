"""The compression benchmark on small tensors: what it measures is right; how fast it is, is not asked."""

import json
from pathlib import Path

import pytest
import torch
from cases import COMPRESSORS

from gradwire.bench import compression as bench
from gradwire.compression import BlockQuantize, Chain, ChunkTopK, Compressor, DCTTopK, Identity, ScaledSign


@pytest.fixture(scope="module")
def results() -> list[bench.Result]:
    return bench.run(2**14, fused=False)


def test_every_compressor_and_every_rival_is_measured(results: list[bench.Result]) -> None:
    names = [result.name for result in results]
    assert len(set(names)) == len(names)
    assert {type(case.compressor) for case in COMPRESSORS} == {type(compressor) for compressor in bench.COMPRESSORS}
    assert {result.source for result in results} == {"gradwire", "torch"}
    for result in results:
        assert result.seconds
        assert all(value > 0 for value in (*result.seconds.values(), *result.bandwidth.values(), result.copy_s))


def test_compression_rate_is_that_of_the_payload(results: list[bench.Result]) -> None:
    by_name = {result.name: result for result in results}
    assert by_name["Identity(width=64)"].compression_rate == 1
    assert by_name["BlockQuantize(bits=8)"].compression_rate == pytest.approx(4 * 256 / (256 + 4))
    assert by_name["ScaledSign(width=1024)"].compression_rate == pytest.approx(4 * 1024 / (128 + 4))


def test_the_ratio_compares_with_the_copy() -> None:
    result = bench.Result("x", "gradwire", 2.0, copy_s=1.0, seconds={"encode eager": 4.0}, bandwidth={})
    assert result.ratio("encode eager") == 0.25
    assert result.ratio("encode fused") is None


@pytest.mark.parametrize(
    "compressor",
    [
        *(Identity(), ScaledSign(), BlockQuantize(bits=2, stochastic=True), Chain(ChunkTopK(), ScaledSign(32))),
        DCTTopK(values="fp32"),
    ],
    ids=repr,
)
def test_what_is_timed_is_encoding_with_feedback(compressor: Compressor) -> None:
    subject = bench.Subject(compressor, torch.randn(3 * 4096), fused=False)
    subject.residual.normal_()
    subject.encode()
    subject.decode()
    tile = compressor.tile(torch.Size([3, 4096]))
    target = compressor.transform_rows(subject.rows, tile) + subject.residual
    expected = compressor.compress_rows(target, torch.float32, subject.keys)
    assert all(torch.equal(part, other) for part, other in zip(subject.parts, expected, strict=True))
    arrives = compressor.decompress_rows(expected, target.shape[1], subject.keys)
    assert torch.equal(subject.out, compressor.inverse_transform_rows(arrives, tile))
    assert torch.equal(subject.new_residual, target - arrives)
    assert subject.out.any()


def test_the_command_writes_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "speed.json"
    bench.main(2**12, fused=False, output=output)
    kept = json.loads(output.read_text())
    assert kept["numel"] == 2**12
    assert {"date", "command", "torch", "gradwire", "cpu", "cores", "threads"} <= kept["machine"].keys()
    assert [row["name"] for row in kept["results"]][:2] == ["Identity(width=64)", "Cast(dtype='bfloat16')"]
    assert kept["results"][0]["ratio"].keys() == {"encode eager", "decode eager"}
    printed = capsys.readouterr().out
    assert "BlockQuantize(bits=4)" in printed
    assert "topk of the whole tensor" in printed
