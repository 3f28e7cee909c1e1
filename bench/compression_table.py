"""The table of `gradwire bench compression`: what each compressor encodes and decodes in a second."""

from collections.abc import Mapping
from typing import Any

COLUMNS = ("Compressor", "Times fewer bytes", "Encode", "Encode, eager", "Decode", "Decode, eager")
_STAGES = ("encode fused", "encode eager", "decode fused", "decode eager")


def compression_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench compression`: throughput of all forms, and how it was measured."""
    about, dense = results["machine"], 4 * results["numel"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for result in results["results"]:
        name = f"`{result['name']}`" + (" of torch" if result["source"] != "gradwire" else "")
        seconds = [result["seconds"].get(stage) for stage in _STAGES]
        rates = ["" if value is None else f"{dense / value / 1e9:.2f}" for value in seconds]
        lines.append(f"| {name} | {result['compression_rate']:.1f} | {' | '.join(rates)} |")
    copies = sorted(dense / result["copy_s"] / 1e9 for result in results["results"])
    where = about.get("gpu", about["cpu"])
    return (
        "\n".join(lines) + "\n\n"
        f"GB of gradients per second, {results['numel']:,} float32 entries, beside a copy of them "
        f"({copies[len(copies) // 2]:.1f} GB/s). Encoding adds the residual, compresses, and keeps what is lost; "
        f"torch's quantisation and bf16 keep none. Columns without a word are of the compiled form, `fused=True`. "
        f"{where}, threads: {about['threads']}, torch {about['torch']}, {about['date'][:10]}. "
        f"Made by `{about['command']}`."
    )
