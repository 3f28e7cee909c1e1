"""Which examples belong to which client: row numbers for `Clients`, by seed, and a file to publish them in.

Every function gives one sorted int64 tensor of row numbers per client. "Dirichlet" means two things in the literature:
`dirichlet` splits every class over clients, which get different amounts of data; `dirichlet_clients` draws every
client's mix of classes, and all get the same amount.
"""

import hashlib
import json
import math
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Partition = list[Tensor]
"""Row numbers of every client, sorted, int64."""

Labels = Tensor | NDArray[Any] | Sequence[int]

_DRAWS: Final = 1000
_FORMAT: Final = "gradwire partition 1"


def iid(num_examples: int, clients: int, *, seed: int = 0) -> Partition:
    """Deal rows out at random; sizes differ by one at most.

    Args:
        num_examples: Rows, >= clients.
        clients: >= 1.
        seed: Of the draw.

    Example:
        >>> [len(rows) for rows in iid(10, clients=4)]
        [3, 3, 2, 2]
    """
    _check_clients("iid", clients, num_examples)
    return _sorted(np.array_split(np.random.default_rng(seed).permutation(num_examples), clients))


def dirichlet(
    labels: Labels, clients: int, alpha: float, *, min_size: int = 1, balanced: bool = False, seed: int = 0
) -> Partition:
    """Split the rows of every class over clients, in shares drawn from Dir(alpha, …, alpha).

    The smaller alpha, the fewer classes a client has, and the more sizes differ. All is drawn again until the smallest
    client has `min_size` rows.

    Args:
        labels: Class of every row, `[n]`.
        clients: >= 1.
        alpha: > 0; infinity for equal shares.
        min_size: Rows of the smallest client, >= 0.
        balanced: Give clients that have n / clients rows already nothing of the classes that follow, as Li et al. do.
        seed: Of the draw.

    Raises:
        ValueError: an argument is out of range, or none of 1000 draws leaves every client with `min_size` rows.

    Example:
        >>> rows = dirichlet(torch.arange(100) % 2, clients=4, alpha=0.3)
        >>> sorted(torch.cat(rows).tolist()) == list(range(100))
        True

    Reference:
        Yurochkin, Agarwal, Ghosh, Greenewald, Hoang, Khazaeni. Bayesian Nonparametric Federated Learning of Neural
        Networks. ICML 2019. arXiv:1905.12022; Li, Diao, Chen, He. Federated Learning on Non-IID Data Silos: An
        Experimental Study. ICDE 2022. arXiv:2102.02079.
    """
    classes = _classes("dirichlet", labels)
    total = sum(map(len, classes))
    _check_clients("dirichlet", clients)
    _check_alpha("dirichlet", alpha, smallest="> 0")
    if not 0 <= min_size * clients <= total:
        raise ValueError(
            f"dirichlet: expected 0 <= min_size <= {total // clients}, the mean of {total} examples over {clients} "
            f"clients, got min_size={min_size}."
        )
    rng = np.random.default_rng(seed)
    smallest = 0
    for _ in range(_DRAWS):
        sizes = np.zeros(clients, np.int64)
        cuts = []
        for rows in classes:
            shares = _dirichlet(rng, np.full(clients, 1 / clients), alpha * clients)
            if balanced:
                shares = np.where(sizes * clients < total, shares, 0)
                if not shares.sum() > 0:
                    shares = np.asarray(sizes * clients < total, np.float64)
                shares = shares / shares.sum()
            cut = np.rint(shares.cumsum()[:-1] * len(rows)).astype(np.int64)
            sizes += np.diff(cut, prepend=0, append=len(rows))
            cuts.append(cut)
        if sizes.min() >= min_size:
            pieces = [np.split(rng.permutation(rows), cut) for rows, cut in zip(classes, cuts, strict=True)]
            return _sorted([np.concatenate(own) for own in zip(*pieces, strict=True)])
        smallest = max(smallest, int(sizes.min()))
    raise ValueError(
        f"dirichlet: expected a draw whose smallest client has min_size={min_size} examples, got at most {smallest} in "
        f"{_DRAWS} draws. Lower min_size, or take fewer clients, a larger alpha, balanced=True or dirichlet_clients."
    )


def dirichlet_clients(
    labels: Labels,
    clients: int,
    alpha: float,
    *,
    num_examples: int | None = None,
    replace: bool = False,
    seed: int = 0,
) -> Partition:
    """Draw every client's mix of classes from Dir(alpha p), p the shares of all classes, and fill it to equal size.

    Args:
        labels: Class of every row, `[n]`.
        clients: >= 1.
        alpha: >= 0: 0 for one class per client, infinity for the shares of all data. p sums to 1, so that over C equal
            classes, alpha here is what Dir(alpha / C, …, alpha / C) is elsewhere.
        num_examples: Of every client, >= 1; n // clients by default.
        replace: Draw rows with replacement, so that clients share some, and a client may have a row twice. Otherwise
            each row belongs to one client at most, and a client whose classes are used up goes on with those that are
            left, in proportion to its mix.
        seed: Of the draw.

    Raises:
        ValueError: an argument is out of range, or there are too few rows without replacement.

    Example:
        >>> rows = dirichlet_clients(torch.arange(100) % 2, clients=4, alpha=0.3)
        >>> [len(own) for own in rows], len(set(torch.cat(rows).tolist()))
        ([25, 25, 25, 25], 100)

    Reference:
        Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification.
        2019. arXiv:1909.06335, section 3; with replacement as in Fraboni, Vidal, Kameni, Lorenzi. A General Theory for
        Federated Optimization with Asynchronous and Heterogeneous Clients Updates. JMLR 2023. arXiv:2206.10189.
    """
    classes = _classes("dirichlet_clients", labels)
    counts = np.array([len(rows) for rows in classes])
    total = int(counts.sum())
    _check_clients("dirichlet_clients", clients, total)
    _check_alpha("dirichlet_clients", alpha, smallest=">= 0")
    size = total // clients if num_examples is None else num_examples
    if size < 1 or (not replace and size * clients > total):
        limit = "" if replace else f" <= {total // clients}, as every row goes to one client"
        raise ValueError(f"dirichlet_clients: expected 1 <= num_examples{limit}, got num_examples={size}.")
    rng = np.random.default_rng(seed)
    mixes = [_dirichlet(rng, counts / total, alpha) for _ in range(clients)]
    if replace:
        drawn = [rng.multinomial(size, mix) for mix in mixes]
        return _sorted(
            [np.concatenate([rng.choice(rows, k) for rows, k in zip(classes, own, strict=True)]) for own in drawn]
        )
    pools = [rng.permutation(rows) for rows in classes]
    used = np.zeros(len(classes), np.int64)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for client in rng.permutation(clients).tolist():
        missing = size
        while missing:
            mix = np.where(used < counts, mixes[client], 0)
            if not mix.sum() > 0:
                mix = np.asarray(counts - used, np.float64)
            take = np.minimum(rng.multinomial(missing, mix / mix.sum()), counts - used)
            parts[client] += [pool[u : u + k] for pool, u, k in zip(pools, used, take, strict=True)]
            used += take
            missing -= int(take.sum())
    return _sorted([np.concatenate(own) for own in parts])


def shards(labels: Labels, clients: int, shards_per_client: int = 2, *, seed: int = 0) -> Partition:
    """Sort rows by class, cut them into equal shards, and deal so many to every client.

    With 2, most clients have two classes.

    Args:
        labels: Class of every row, `[n]`.
        clients: >= 1.
        shards_per_client: >= 1, with clients * shards_per_client <= n. Sizes of shards differ by one at most.
        seed: Of the order inside classes, and of the deal.

    Example:
        >>> labels = torch.arange(12) // 3
        >>> [labels[rows].unique().numel() for rows in shards(labels, clients=4, shards_per_client=1)]
        [1, 1, 1, 1]

    Reference:
        McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from
        Decentralized Data. AISTATS 2017. arXiv:1602.05629, section 3.
    """
    classes = _classes("shards", labels)
    if shards_per_client < 1:
        raise ValueError(f"shards: expected shards_per_client >= 1, got {shards_per_client}.")
    _check_clients("shards", clients, sum(map(len, classes)) // shards_per_client)
    rng = np.random.default_rng(seed)
    in_order = np.concatenate([rng.permutation(rows) for rows in classes])
    pieces = np.array_split(in_order, clients * shards_per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, shards_per_client)
    return _sorted([np.concatenate([pieces[piece] for piece in own]) for own in dealt.tolist()])


def by_id(ids: Sequence[Hashable] | Tensor) -> Partition:
    """One client for every id that rows bear: a writer, a phone, a package; in the order of sorted ids.

    Args:
        ids: Of every row, `[n]`: all numbers or all strings.

    Example:
        >>> by_id(["b", "a", "b"])
        [tensor([1]), tensor([0, 2])]
    """
    values = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"by_id: expected one id for every row, got an array of shape {list(values.shape)}.")
    if values.dtype == object:
        raise ValueError("by_id: expected ids that are all numbers or all strings, got others.")
    _, which = np.unique(values, return_inverse=True)
    return _sorted(_groups(which))


def save(path: Path, partition: Sequence[Tensor], *, num_examples: int, made_by: str = "") -> None:
    """Write a partition as JSON, whole or not at all, so that others can use the very same one.

    Args:
        path: Where to.
        partition: Of the functions above, or rows of your own.
        num_examples: Rows of the data set.
        made_by: How it was drawn: "dirichlet(alpha=0.3, seed=0)".

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "partition.json"
        >>> save(path, iid(10, clients=4), num_examples=10, made_by="iid(seed=0)")
        >>> [len(rows) for rows in load(path, num_examples=10)]
        [3, 3, 2, 2]
    """
    rows = [own.tolist() for own in partition]
    _check_rows("save", rows, num_examples)
    content = {"format": _FORMAT, "made_by": made_by, "num_examples": num_examples, "digest": _digest(rows)}
    content["clients"] = rows
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    os.replace(partial, path)


def load(path: Path, *, num_examples: int | None = None) -> Partition:
    """Read what `save` wrote.

    Args:
        path: Of the file.
        num_examples: Rows of the data set that it is for; not compared if None.

    Raises:
        ValueError: it is no such file, was changed, or is for another data set.
    """
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"load: expected a partition as save() writes it, got {str(path)!r}: {error}.") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"load: expected a partition as save() writes it, got other content in {str(path)!r}.")
    rows: Any = content.get("clients")
    length = content.get("num_examples")
    if type(length) is not int:
        raise ValueError(f"load: expected num_examples, a number, in {str(path)!r}, got {length!r}.")
    if num_examples not in (None, length):
        raise ValueError(
            f"load: expected a partition of {num_examples} examples, got one of {length} in {str(path)!r}."
        )
    _check_rows("load", rows, length)
    if content.get("digest") != _digest(rows):
        raise ValueError(f"load: expected the digest {_digest(rows)} in {str(path)!r}, got {content.get('digest')!r}.")
    return [torch.tensor(own, dtype=torch.int64) for own in rows]


def _classes(who: str, labels: Labels) -> list[NDArray[np.int64]]:
    """The rows of every class."""
    values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "biu":
        raise ValueError(
            f"{who}: expected the class of every row as an integer, got an array of shape {list(values.shape)} and "
            f"dtype {values.dtype}."
        )
    return _groups(np.unique(values, return_inverse=True)[1])


def _groups(which: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows by number of their group."""
    return np.split(np.argsort(which, kind="stable"), np.bincount(which).cumsum()[:-1])


def _dirichlet(rng: np.random.Generator, mean: NDArray[np.float64], concentration: float) -> NDArray[np.float64]:
    """A draw from Dir(concentration mean): a point mass for 0, the mean for infinity."""
    if math.isinf(concentration):
        return mean
    if concentration == 0:
        return np.asarray(rng.multinomial(1, mean), np.float64)
    return rng.dirichlet(concentration * mean)


def _sorted(parts: Sequence[NDArray[np.int64]]) -> Partition:
    return [torch.from_numpy(np.sort(rows).astype(np.int64)) for rows in parts]


def _digest(rows: list[list[int]]) -> str:
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def _check_clients(who: str, clients: int, most: int | None = None) -> None:
    if clients < 1:
        raise ValueError(f"{who}: expected clients >= 1, got clients={clients}.")
    if most is not None and clients > most:
        raise ValueError(f"{who}: expected clients <= {most}, so that each has an example, got clients={clients}.")


def _check_alpha(who: str, alpha: float, *, smallest: str) -> None:
    if not (alpha > 0 or (alpha == 0 and smallest == ">= 0")):
        raise ValueError(f"{who}: expected alpha {smallest}, got alpha={alpha}.")


def _check_rows(who: str, rows: Any, num_examples: int) -> None:
    """Raise ValueError unless it is a list of lists of row numbers."""
    if not isinstance(rows, list) or not rows or not all(isinstance(own, list) for own in rows):
        raise ValueError(f"{who}: expected a list of row numbers for every client, got {type(rows).__name__}.")
    for client, own in enumerate(rows):
        for row in own:
            if type(row) is not int or not 0 <= row < num_examples:
                raise ValueError(
                    f"{who}: expected row numbers from 0 to {num_examples - 1}, got {row!r} for client {client}."
                )
