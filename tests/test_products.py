"""Every product of a compressor, a feedback and an exchange: what is legal trains on real ranks, what is not says so.

Training takes a fraction of a second per product and there are hundreds, so each run of these tests trains some, among
which any two parts that are legal together meet. With `GRADWIRE_PRODUCTS=all` in the environment it trains all, as
`gradwire bench products` does with a larger model.
"""

import copy
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from ranks import run_ranks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gradwire import comm, compression
from gradwire.bench import data, products, report, specs
from gradwire.bench.cli import main
from gradwire.bench.products_table import legality_page
from gradwire.bench.representatives import COMPRESSORS, EXCHANGES, FEEDBACKS, RANKS, Product, cover, legal_products
from gradwire.bench.representatives import products as all_products
from gradwire.bench.train import Options, Trainer
from gradwire.comm.collectives import Collectives

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "results" / "products.json"
STEPS, SAVED = 50, 25
LEGAL = legal_products()
AVERAGED = [product for product in LEGAL if not product.exchange.scatters]  # tests/test_fsdp_shard.py trains the others
TRAINED = AVERAGED if os.environ.get("GRADWIRE_PRODUCTS") == "all" else cover(AVERAGED, together=2)
GROUPS = len(TRAINED) // 20  # new processes for each: threads of gloo's groups outlive what made them, and add up


# What there is.


def test_every_public_part_has_a_representative() -> None:
    parts = {
        "compressor": {type(part).__name__ for part in COMPRESSORS},
        "feedback": {type(part).__name__ for part in FEEDBACKS},
        "exchange": {type(Product(COMPRESSORS[0], FEEDBACKS[0], kind).exchange).__name__ for kind in EXCHANGES},
    }
    parts["exchange"].add("Simulated")  # of one process
    assert parts == {family: set(specs.catalogue()[family]) for family in parts}


def test_texts_give_the_same_communicators() -> None:
    for product in LEGAL:
        if product.attachable:
            assert repr(specs.parse(product.text).communicator(seed=0)) == repr(product.communicator(seed=0))


@pytest.mark.parametrize("together", [1, 2])
def test_a_cover_has_every_meeting_of_parts(together: int) -> None:
    def pairs(found: Sequence[Product]) -> set[tuple[str, ...]]:
        parts = [(spelled.compressor, spelled.feedback, spelled.kind) for spelled in found]
        return {(repr(some[i]), repr(some[j])) for some in parts for i in range(3) for j in range(i, i + together)
                if j < 3} | {(repr(some[0]), some[2]) for some in parts if together == 2}  # fmt: skip

    chosen = cover(LEGAL, together)
    assert pairs(chosen) == pairs(LEGAL)
    assert len(chosen) < len(LEGAL) / 3


# What is legal.


class _Training:
    """The README's first program, on data that stay."""

    def __init__(self, product: Product, ranks: Collectives, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = self.host = torch.nn.Linear(256, 256)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.communicator = product.communicator()
        self.communicator.join(ranks)
        self.attached = product.attachable
        if self.attached:
            self.host = DistributedDataParallel(self.model)
            comm.attach(self.host, self.communicator, optimizer=self.optimizer)

    def run(self, steps: int) -> list[float]:
        numbers = torch.Generator().manual_seed(dist.get_rank())
        inputs, labels = torch.randn(32, 256, generator=numbers), torch.randint(256, (32,), generator=numbers)
        losses = []
        for _ in range(steps):
            loss = cross_entropy(self.host(inputs), labels)
            loss.backward()
            if not self.attached:
                self.communicator.average_([p.grad for p in self.model.parameters()], ["weight", "bias"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "communicator": self.communicator}

    def saved(self) -> dict[str, Any]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in self.parts().items()}

    def load(self, saved: dict[str, Any]) -> None:
        for name, state in saved.items():
            self.parts()[name].load_state_dict(state)

    def digests(self) -> tuple[str, str]:
        return toy.digest(self.model.parameters()), toy.state_digest(self.communicator)


def _train(group: int) -> dict[str, tuple[tuple[str, str], tuple[str, str], float, float]]:
    """For each product the digests of a run and of one resumed halfway, and this rank's first and last loss."""
    ranks, results = Collectives(), {}
    for product in TRAINED[group::GROUPS]:
        through = _Training(product, ranks, seed=0)
        losses = through.run(SAVED)
        saved = through.saved()
        losses += through.run(STEPS - SAVED)
        resumed = _Training(product, ranks, seed=1)
        resumed.load(saved)
        resumed.run(STEPS - SAVED)
        assert through.communicator.stats.skipped == 0
        results[product.text] = through.digests(), resumed.digests(), losses[0], losses[-1]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_legal_products_train_and_resume(group: int) -> None:
    first, second = run_ranks(RANKS, _train, group, timeout_s=110)
    assert list(first) == [product.text for product in TRAINED[group::GROUPS]]
    for name, (through, resumed, start, end) in first.items():
        assert (name, through[0]) == (name, second[name][0][0]), "ranks differ"
        assert (name, through) == (name, resumed), "the resumed run differs on rank 0"
        assert (name, second[name][0]) == (name, second[name][1]), "the resumed run differs on rank 1"
        before, after = (start + second[name][2]) / 2, (end + second[name][3]) / 2
        assert math.isfinite(after), name
        assert after < _promised(name) * before, name


def _promised(name: str) -> float:
    """The share of the loss that is left at most: feedback whose needs are met converges; so does, slowly, what is
    unbiased without any; the rest promises nothing."""
    (product,) = (product for product in TRAINED if product.text == name)
    if product.feedback.requires != "any":
        return 0.75
    plain = isinstance(product.feedback, comm.NoFeedback) and product.exchange.merge == "mean"
    return 1.0 if plain and product.compressor.omega(1 << 20) is not None else math.inf


def _forget() -> tuple[tuple[str, str], tuple[str, str]]:
    """As above, but resumed without the communicator's state."""
    ranks = Collectives()
    product = Product(compression.ChunkTopK(k=16, chunk=256), comm.EF(), "AllGather")
    through = _Training(product, ranks, seed=0)
    through.run(3)
    saved = through.saved()
    through.run(3)
    resumed = _Training(product, ranks, seed=1)
    resumed.load({name: state for name, state in saved.items() if name != "communicator"})
    resumed.run(3)
    return through.digests(), resumed.digests()


def test_what_is_not_resumed_shows() -> None:
    for through, resumed in run_ranks(RANKS, _forget):
        assert through[0] != resumed[0]
        assert through[1] != resumed[1]


# What is not.


def test_illegal_products_name_a_legal_neighbour() -> None:
    names = {**vars(compression), **vars(comm)}
    illegal = [product for product in all_products() if product.refusal is not None]
    assert len(illegal) + len(LEGAL) == len(COMPRESSORS) * len(FEEDBACKS) * len(EXCHANGES)
    for product in illegal:
        sentence = product.refusal
        assert sentence is not None
        head, _, neighbour = sentence.partition(" Legal with all else as it is: ")
        assert re.fullmatch(r"\w+.*: expected .*, got .*\. .*\.", head), sentence
        changes = eval(f"dict({neighbour.removesuffix('.')})", names)
        assert 1 <= len(changes) <= 2, sentence
        asked = {"compressor": product.compressor, "feedback": product.feedback, "exchange": product.exchange}
        made = comm.Communicator(**{**asked, **changes})  # raises unless it is legal
        for name in asked.keys() - changes.keys() - {"feedback"}:
            assert repr(getattr(made, name)) == repr(asked[name])


def test_one_change_is_named_where_one_will_do() -> None:
    refusal = Product(compression.ChunkTopK(), comm.EF(), "AllReduce").refusal
    assert refusal is not None
    assert refusal.endswith("Legal with all else as it is: exchange=AllGather().")
    refusal = Product(compression.QSGD(), comm.EF(), "AllReduce").refusal
    assert refusal is not None
    assert refusal.endswith("exchange=AllGather(), compressor=Scaled(compressor=QSGD(levels=7, bucket=512)).")


# The page.


def _kept() -> dict[str, Any] | None:
    return json.loads(KEPT.read_text()) if KEPT.is_file() else None


def test_the_page_is_that_of_the_products() -> None:
    assert (ROOT / "docs" / "legality.md").read_text() == legality_page(_kept()), "run `gradwire report --write`"


def test_the_page_shows_losses_and_reasons() -> None:
    page = legality_page(_results({"ChunkTopK(k=16, chunk=256) + EF() + AllGather()": 2.3456}))
    section = page.partition("## EF\n")[2].partition("##")[0]
    (row,) = re.findall(r"^\| `ChunkTopK\(k=16, chunk=256\)` \| (.*) \|$", section, flags=re.MULTILINE)
    cells = dict(zip(EXCHANGES, row.split(" | "), strict=True))
    assert cells["AllGather"] == "2.35"
    assert cells["TwoPhase"] == "✓"
    assert re.search(rf"^{cells['AllReduce']}\. AllReduce: .* Legal with all else as it is: exchange=AllGather\(\)\.$",
                     page, flags=re.MULTILINE)  # fmt: skip
    assert "Of 1 runs 1 ended with equal ranks, and 1 came to the same weights and state when resumed" in page


def test_report_keeps_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("see docs/legality.md")
    assert list(report.stale_pages("nothing", tmp_path, tmp_path)) == []
    page = tmp_path / "docs" / "legality.md"
    monkeypatch.setattr("gradwire.bench.report.fill", lambda text, results: text)
    monkeypatch.setattr("gradwire.bench.plots.stale", lambda *args: {})
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert [_command(monkeypatch, "report", mode, *arguments) for mode in ("--check", "--write", "--check")] == [
        1,
        0,
        0,
    ]
    assert page.read_text() == legality_page()
    page.write_text("something else")
    assert list(report.stale_pages("nothing", tmp_path, tmp_path)) == [page]


# The command.


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gradwire", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def _record(name: str, loss: float | None) -> dict[str, Any]:
    checks = {"ranks_equal": True, "resume_exact": True, "skipped_steps": 0, "diverged": loss is None}
    return {
        "product": name,
        "first_loss": 5.5,
        "validation_loss": loss,
        "bytes_per_step": 10.0,
        "seconds": 1.0,
        **checks,
    }


def _results(losses: dict[str, float | None]) -> dict[str, Any]:
    return {
        "machine": {"torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire bench products"},
        "options": {"steps": 50, "batch": 4, "context": 64, "optimizer": "AdamW", "lr": 0.003},
        "parameters": 820_352,
        "data": {"name": "test text"},
        "world_size": 2,
        "runs": [_record(name, loss) for name, loss in losses.items()],
    }


def test_runs_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def fake(tasks: Sequence[Options]) -> Iterator[dict[str, Any]]:
        for task in tasks:
            trained.append(task.configuration)
            yield _record(task.configuration, None if "TernGrad" in task.configuration else 2.5)
            if len(trained) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(products, "_trained", fake)
    output = tmp_path / "products.json"
    with pytest.raises(KeyboardInterrupt):
        products.main(quick=True, output=output)
    products.main(quick=True, output=output)
    printed = capsys.readouterr().out
    runs = json.loads(output.read_text())["runs"]
    assert [run["product"] for run in runs] == trained
    assert len(set(trained)) == len(trained)
    assert {text.split(" + ")[1].partition("(")[0] for text in trained} == set(specs.catalogue()["feedback"])
    assert "3 of " in printed
    assert "inf" in printed


def _counting() -> data.Corpus:
    text = (torch.arange(4096) % 61).to(torch.uint8)
    return data.Corpus("counting", text[:3500], text[3500:])


OPTIONS = replace(products.QUICK_OPTIONS, configuration="ChunkTopK(k=8, chunk=64) + EF21() + TwoPhase()", steps=6)


def _run_once() -> tuple[dict[str, Any], bool]:
    record = products.train_once(OPTIONS, _counting(), torch.device("cpu"))
    one, other = (Trainer(OPTIONS, _counting(), torch.device("cpu")) for _ in range(2))
    for trainer, steps in ((one, 1), (other, 2)):
        for step in range(steps):
            trainer.step(step)
    return record, products._equal_everywhere(one, other)


def test_a_run_checks_ranks_and_resumes() -> None:
    (first, differing), (second, _) = run_ranks(RANKS, _run_once)
    assert not differing
    for record in (first, second):
        assert record["ranks_equal"]
        assert record["resume_exact"]
        assert record["validation_loss"] < record["first_loss"]
    assert first["bytes_per_step"] == second["bytes_per_step"] > 0


def _complaints(kept: dict[str, Any]) -> list[str]:
    """What keeps results from being those of all legal products, each of which trained, agreed and resumed."""
    runs = kept["runs"]
    if [run["product"] for run in runs] != [product.text for product in LEGAL if product.attachable]:
        return ["other products"]
    return [
        f"{run['product']}: {run}"
        for run in runs
        if not (run["ranks_equal"] and run["resume_exact"] and run["validation_loss"] < run["first_loss"])
        or run["skipped_steps"] != 0
    ]


def test_kept_results_must_be_of_all_legal_products() -> None:
    """None are kept until somebody has run the command for an hour; the check itself is tried on made-up ones."""
    good = {"ranks_equal": True, "resume_exact": True, "skipped_steps": 0, "first_loss": 5.5, "validation_loss": 2.5}
    runs = [{"product": product.text, **good} for product in LEGAL if product.attachable]
    assert _complaints({"runs": runs}) == []
    assert _complaints({"runs": runs[1:]}) == ["other products"]
    for bad in ({"ranks_equal": False}, {"resume_exact": False}, {"skipped_steps": 1}, {"validation_loss": 6.0}):
        (complaint,) = _complaints({"runs": [runs[0] | bad, *runs[1:]]})
        assert complaint.startswith(runs[0]["product"])
    kept = _kept()
    assert kept is None or _complaints(kept) == []
