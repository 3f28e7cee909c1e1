"""`docs/legality.md`: which products of a compressor, a feedback and an exchange are legal, and why others are not."""

import re
from collections.abc import Mapping
from typing import Any, final

from gradwire.bench.representatives import COMPRESSORS, EXCHANGES, FEEDBACKS, Product, products, spell

_NEIGHBOUR = " Legal with all else as it is: "


@final
class Reasons:
    """Numbers for the sentences that refuse products: one for all that differ in the names of their parts alone."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.sentences: list[str] = []
        """That of the first product for every number, from 1 on."""

    def number(self, product: Product, sentence: str) -> int:
        """The number of a product's sentence, a new one if it is the first of its kind."""
        kind = _kind(product, sentence)
        if kind not in self._numbers:
            self._numbers[kind] = len(self._numbers) + 1
            self.sentences.append(sentence)
        return self._numbers[kind]


def legality_page(results: Mapping[str, Any] | None = None) -> str:
    """The whole page; with results of `gradwire bench products`, losses in place of marks."""
    runs = {run["product"]: run for run in results["runs"]} if results is not None else {}
    reasons = Reasons()
    cells = {(p.feedback, p.compressor, p.kind): _cell(p, runs, reasons) for p in products()}
    legal = sum(not cell.isdecimal() for cell in cells.values())
    parts = (
        "A `Communicator` is a product of a compressor, a feedback and an exchange, and refuses at construction what "
    )
    parts += f"cannot work. Of the {len(cells)} products of the parts below, {legal} are legal."
    lines = [
        "# What works together",
        "",
        f"{parts} {_marks(results)} A whole number: refused, for the reason of that number at the end.",
        "",
        "A class stands here more than once where a setting changes what is legal. Exchanges, on 2 ranks:",
        "",
        *(f"- {kind}: {_exchange(kind)}" for kind in EXCHANGES),
        "",
    ]
    for feedback in FEEDBACKS:
        lines += [f"## {type(feedback).__name__}", "", f"| compressor | {' | '.join(EXCHANGES)} |"]
        lines.append("|---" + "|:-:" * len(EXCHANGES) + "|")
        for compressor in COMPRESSORS:
            row = (cells[feedback, compressor, kind] for kind in EXCHANGES)
            lines.append(f"| `{spell(compressor)}` | {' | '.join(row)} |")
        lines.append("")
    lines += [
        "## Reasons",
        "",
        "What the first product of each number raises. Others name their own parts, and change the same arguments.",
        "",
        *(f"{number}. {sentence}" for number, sentence in enumerate(reasons.sentences, start=1)),
        "",
        "Made by `gradwire report --write`, which constructs every one; `gradwire report --check` compares.",
    ]
    return "\n".join(lines) + "\n"


def _cell(product: Product, runs: Mapping[str, Mapping[str, Any]], reasons: Reasons) -> str:
    refusal = product.refusal
    if refusal is not None:
        return str(reasons.number(product, refusal))
    run = runs.get(product.text) if product.attachable else None
    if run is None:
        return "✓"
    return "not finite" if run["validation_loss"] is None else f"{run['validation_loss']:.2f}"


def _marks(results: Mapping[str, Any] | None) -> str:
    """What stands in the cells of legal products."""
    if results is None:
        return "✓: legal."
    options, machine, runs = results["options"], results["machine"], results["runs"]
    equal, exact = (sum(run[key] for run in runs) for key in ("ranks_equal", "resume_exact"))
    return (
        "A number with decimals: legal, and the validation loss in nats per byte of a transformer of "
        f"{results['parameters'] / 1e6:.2f} M parameters after {options['steps']} steps of "
        f"{options['batch'] * options['context']} bytes of the {results['data']['name']} on each of "
        f"{results['world_size']} ranks, with {options['optimizer']} at a rate of {options['lr']:g} for all. Of "
        f"{len(runs)} runs {equal} ended with equal ranks, and {exact} came to the same weights and state when resumed "
        f"halfway, both to the bit. ✓: legal, without a run. torch {machine['torch']}, {machine['date'][:10]}. Made by "
        f"`{machine['command']}`."
    )


def _exchange(kind: str) -> str:
    """How an exchange is made, for rows of 256 entries if that matters."""
    exchange = Product(COMPRESSORS[0], FEEDBACKS[0], kind).exchange
    alone = "" if exchange.consensus else "; for `average_` alone, since hosts need ranks that agree"
    if exchange.scatters:
        alone = "; for FSDP2 alone, since every rank has the mean of its shard"
    return f"`{spell(exchange)}`{alone}"


def _kind(product: Product, sentence: str) -> str:
    """A sentence without the names of the product's own parts, and of its neighbour what is to change alone."""
    problem, _, neighbour = sentence.partition(_NEIGHBOUR)
    exchange = product.exchange
    for part in (product.compressor, exchange, exchange.second or exchange, product.feedback):
        problem = problem.replace(repr(part), "…")
    problem = problem.removeprefix(type(product.feedback).__name__)
    changes = re.findall(r"(?:^|, )(exchange=\w+|feedback=\w+|compressor)", neighbour)
    return " ".join([problem, *changes])
