"""What `gradwire federate` trains on: scikit-learn's digits, the standard library by package, or a folder of files."""

import ast
import inspect
import itertools
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwire.bench.data import digits as digit_images
from gradwire.bench.data import python_files
from gradwire.bench.errors import UsageError
from gradwire.bench.model import ByteTransformer, nats_per_byte
from gradwire.federated import Clients, partition
from gradwire.federated.local_training import Loss
from gradwire.federated.partition import Partition

CONTEXT = 32
"""Bytes that are seen at once."""

_HELD_OUT_IMAGES = 360
_HELD_OUT_SHARE = 20  # one window in this many, the last ones of each client
_EVALUATED = 512
_KINDS = ("a-z", "A-Z", "0-9", "punctuation", "white space", "other bytes")


@final
@dataclass(frozen=True, eq=False)
class Task:
    """Examples, model and loss.

    Args:
        name: Of the data.
        train: Tensors of equal length, a row for every example.
        held_out: The same of what is held out.
        module: The model with its first weights.
        loss: Of the model and a batch.
        predict: Logits `[…, classes]` and targets `[…]` of a batch.
        labels: Class of every example; None where there are none.
        owners: Natural owner of every example; None where there is none.
        unit: Of `amounts`.
        kinds: Names of what they count.
        amounts: For the picture of what clients hold: of every example, how much of each kind, `[n, kinds]`.
        defaults: Of the command's options.
    """

    name: str
    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    module: Callable[[], nn.Module]
    loss: Loss
    predict: Callable[..., tuple[Tensor, Tensor]]
    labels: Tensor | None
    owners: list[int] | None
    unit: str
    kinds: tuple[str, ...]
    amounts: Tensor
    defaults: Mapping[str, Any]

    @property
    def num_examples(self) -> int:
        """Of the training examples, over all clients."""
        return len(self.train[0])

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy on what is held out."""
        device = next(module.parameters()).device
        logits, targets = self.predict(module, *(tensor.to(device) for tensor in self.held_out))
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        return {"loss": float(loss), "accuracy": float((logits.argmax(-1) == targets).float().mean())}

    def new_module(self, seed: int) -> nn.Module:
        """The model, its first weights drawn by the seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.module()

    def distribution(self, parts: Partition) -> Tensor:
        """How much of each kind every client has: `[clients, kinds]`."""
        return torch.stack([self.amounts[rows].sum(0) for rows in parts])

    def clients(self, parts: Partition) -> Clients:
        """The examples, dealt out."""
        return Clients(self.train, parts)


def load(data: str) -> Task:
    """Data by name.

    Args:
        data: "digits", "text", or a folder with one file per client.

    Raises:
        UsageError: there is no such thing, or scikit-learn is missing.
    """
    if data == "digits":
        return digits()
    if data == "text":
        return _text("Python standard library by package", *_packages())
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"--data: expected digits, text or a folder with one file per client, got {data!r}.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise UsageError(f"--data: expected a folder with one file per client, got {data!r}, which has no files.")
    return _text(folder.name, [path.name for path in files], [path.read_bytes() for path in files])


def digits() -> Task:
    """scikit-learn's 1797 images of 8 x 8 pixels, the same 360 always held out; a perceptron 64-32-10 with tanh.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    images, labels = digit_images("federate", ", or choose --data text")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-_HELD_OUT_IMAGES], order[-_HELD_OUT_IMAGES:]
    return Task(
        name="digits",
        train=(images[train], labels[train]),
        held_out=(images[held_out], labels[held_out]),
        module=lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
        loss=lambda module, x, y: F.cross_entropy(module(x), y),
        predict=lambda module, x, y: (module(x), y),
        labels=labels[train],
        owners=None,
        unit="examples",
        kinds=tuple(map(str, range(10))),
        amounts=F.one_hot(labels[train], 10),
        defaults={
            "clients": 100,
            "partition": "dirichlet(0.3)",
            "local_steps": 10,
            "batch": 32,
            "lr": 0.1,
            "rounds": 100,
        },
    )


def _text(name: str, owners: Sequence[str], texts: Sequence[bytes]) -> Task:
    """Predict the next byte of windows that follow one another in each owner's text."""
    train, held_out, owner_of = [], [], []
    for owner, (who, text) in enumerate(zip(owners, texts, strict=True)):
        count = (len(text) - 1) // CONTEXT
        if count < 2:
            raise UsageError(
                f"--data: expected at least {2 * CONTEXT + 1} bytes of every client, got {len(text)} of {who}."
            )
        stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        windows = stream[: count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
        cut = count - max(1, count // _HELD_OUT_SHARE)
        train.append(windows[:cut])
        held_out.append(windows[cut:])
        owner_of += [owner] * cut
    windows, kept = torch.cat(train), torch.cat(held_out)
    chosen = torch.linspace(0, len(kept) - 1, min(_EVALUATED, len(kept)), dtype=torch.float64).long()
    kind = _kind_of_bytes()

    def predict(module: nn.Module, window: Tensor) -> tuple[Tensor, Tensor]:
        window = window.long()
        return module(window[:, :-1]), window[:, 1:]

    return Task(
        name=name,
        train=(windows,),
        held_out=(kept[chosen],),
        module=lambda: ByteTransformer(layers=1, width=32, heads=2),
        loss=lambda module, window: nats_per_byte(*predict(module, window)),
        predict=predict,
        labels=None,
        owners=owner_of,
        unit="bytes",
        kinds=_KINDS,
        amounts=torch.stack([(kind == k)[windows[:, 1:].long()].sum(1) for k in range(len(_KINDS))], 1),
        defaults={
            "clients": len(owners),
            "partition": "by_id",
            "local_steps": 10,
            "batch": 16,
            "lr": 0.3,
            "rounds": 60,
        },
    )


def _packages() -> tuple[list[str], list[bytes]]:
    """Packages of the standard library with a few pages of source, and that source."""
    root = Path(sysconfig.get_path("stdlib"))
    by_package = itertools.groupby(
        sorted(path.relative_to(root).parts for path in python_files(root)), lambda parts: parts[0]
    )
    found = {}
    for name, parts in by_package:
        text = b"".join(root.joinpath(*part).read_bytes() for part in parts if len(part) > 1)
        if len(text) > 100 * CONTEXT:
            found[name] = text
    return list(found), list(found.values())


def _kind_of_bytes() -> Tensor:
    """The number in `_KINDS` of every byte."""
    kind = torch.full((256,), len(_KINDS) - 1)
    for byte in range(128):
        letter = chr(byte)
        tests = (letter.islower(), letter.isupper(), letter.isdigit(), letter.isprintable() and letter != " ")
        if any(tests):
            kind[byte] = tests.index(True)
        elif letter.isspace():
            kind[byte] = _KINDS.index("white space")
    return kind


def split(text: str, task: Task, clients: int, seed: int) -> Partition:
    """Deal a task's examples out.

    Args:
        text: "dirichlet(0.3)", "shards(2)", "iid", "by_id", …: a function of `gradwire.federated.partition` without its
            first arguments; or the path of a file that `partition.save` has written.
        task: What is dealt out.
        clients: How many get some.
        seed: Of the draw, unless the text gives one.

    Raises:
        UsageError: there is no such partition, or it does not fit.
    """
    if text.endswith(".json"):
        try:
            parts = partition.load(Path(text), num_examples=task.num_examples)
        except (OSError, ValueError) as error:
            raise UsageError(f"--partition: {error}") from None
        if len(parts) != clients:
            raise UsageError(f"--partition: expected {clients} clients, got {len(parts)} in {text!r}. Set --clients.")
        return parts
    name, args, keywords = _read(text)
    if name == "by_id":
        return _natural(task, clients)
    functions: dict[str, Callable[..., Partition]] = {"iid": partition.iid}
    if task.labels is not None:
        for function in (partition.dirichlet, partition.dirichlet_clients, partition.shards):
            functions[function.__name__] = function
    if name not in functions:
        known = [*functions, *["by_id"] * (task.owners is not None)]
        raise UsageError(f"--partition: expected {', '.join(known)} or a .json file for this data, got {text!r}.")
    first = task.num_examples if name == "iid" else task.labels
    keywords = {"seed": seed, **keywords}
    function = functions[name]
    try:
        inspect.signature(function).bind(first, clients, *args, **keywords)
    except TypeError as error:
        own = list(inspect.signature(function).parameters.values())[2:]
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in own)
        raise UsageError(f"--partition: {name}: {error}; expected {name}({takes}).") from None
    try:
        return function(first, clients, *args, **keywords)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--partition: {error}") from None


def _natural(task: Task, clients: int) -> Partition:
    """One client for every owner; those with the most examples where fewer are wanted."""
    if task.owners is None:
        raise UsageError(f"--partition: expected data with an owner of every example, got by_id of {task.name}.")
    parts = partition.by_id(task.owners)
    if clients > len(parts):
        raise UsageError(f"--clients: expected at most {len(parts)} for {task.name}, got {clients}.")
    largest = sorted(range(len(parts)), key=lambda client: -len(parts[client]))[:clients]
    return [parts[client] for client in sorted(largest)]


def _read(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name and literal arguments of a call; nothing is evaluated."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name):
            raise ValueError
        args = [ast.literal_eval(arg) for arg in call.args]
        keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
        if len(keywords) < len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError):
        raise UsageError(f"--partition: expected text such as 'dirichlet(0.3)', got {text!r}.") from None
    return call.func.id, args, keywords
