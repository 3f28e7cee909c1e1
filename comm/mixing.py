"""`choco_gossip_`: bring tensors of all ranks to consensus by compressed differences between neighbours."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwire.comm.communicator import Communicator
from gradwire.comm.exchange.gossip import Gossip
from gradwire.comm.feedback import EF21
from gradwire.comm.graph import metropolis_weights, neighbours


@torch.no_grad()
def choco_gossip_(tensors: Sequence[Tensor], names: Sequence[str], communicator: Communicator, gamma: float) -> None:
    """One step of CHOCO-Gossip, in place: move each rank's tensors towards those of its neighbours.

        h_i <- h_i + C(x_i - h_i);   x_i <- x_i + gamma (sum_j W_ij h_j - h_i)

    The mean over ranks stays what it was and, with a gamma that suits the compressor, distances to it shrink by a
    constant factor a step. Call it after a local step of the optimizer and it is CHOCO-SGD.

    Args:
        tensors: Parameters, floating point; they hold this rank's x_i and get the new one.
        names: Their names: on every rank the same, in the same order.
        communicator: `Communicator(compressor, feedback=EF21(), exchange=Gossip(graph), plan=Plan(min_ndim=0,
            min_numel=0))`: the maps of `EF21` track x_i by h_i and the neighbours' mean of the h_j. It averages nothing
            else.
        gamma: Step size, 0 < gamma <= 1; 1 is plain gossip if nothing is lost. `choco_stepsize` is always safe, and
            often 10 to 100 times too careful.

    Cost:
        `Gossip`'s, and a copy of the tensors. If any rank holds what is not finite, all ranks stay where they are.

    Example:
        >>> from gradwire.comm import EF21, Communicator, Plan
        >>> from gradwire.compression import Identity
        >>> everything = Plan(min_ndim=0, min_numel=0)
        >>> alone = Communicator(Identity(), feedback=EF21(), exchange=Gossip([[0]]), plan=everything)
        >>> x = torch.tensor([1.0, 2.0])
        >>> choco_gossip_([x], ["x"], alone, gamma=0.5)
        >>> x
        tensor([1., 2.])

    Reference:
        Koloskova, Stich, Jaggi. Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
        Communication. ICML 2019. arXiv:1902.00340, algorithm 1.
    """
    if not (isinstance(communicator.exchange, Gossip) and isinstance(communicator.feedback, EF21)):
        raise ValueError(
            f"choco_gossip_: expected a communicator with feedback=EF21() and exchange=Gossip(graph), got "
            f"{communicator.feedback!r} and {communicator.exchange!r}."
        )
    if not 0 < gamma <= 1:
        raise ValueError(f"choco_gossip_: expected 0 < gamma <= 1, got gamma={gamma}.")
    dense = [name for x, name in zip(tensors, names, strict=True) if communicator.plan.why_dense(name, x.shape)]
    if dense:
        raise ValueError(
            f"choco_gossip_: expected a plan that sends nothing dense, got {dense[0]!r} dense. "
            "Use Plan(min_ndim=0, min_numel=0)."
        )
    moves = [x.detach().clone() for x in tensors]
    communicator.average_(moves, names)  # sum_j W_ij h_j
    own = [torch.empty_like(x) for x in tensors]
    communicator.read_state("local", own, names)
    torch._foreach_sub_(moves, own)
    if communicator.found_inf is not None:
        moves = [torch.where(communicator.found_inf != 0, torch.zeros_like(move), move) for move in moves]
    torch._foreach_add_([x.detach() for x in tensors], moves, alpha=gamma)


def choco_stepsize(graph: Any, contraction: float) -> float:
    """The gamma for which CHOCO-Gossip is proven to contract, by 1 - spectral_gap^2 contraction / 82 a step or faster.

        gamma = r^2 a / (16 r + r^2 + 4 b^2 + 2 r b^2 - 8 r a)

    with r the spectral gap of W, b the norm of I - W and a the compressor's contraction; what contracts is
    sum_i |x_i - mean|^2 + |x_i - h_i|^2, in expectation.

    Args:
        graph: That of `Gossip`.
        contraction: Of the compressor, 0 < contraction <= 1: its `contraction(numel)`.

    Example:
        >>> import networkx
        >>> round(choco_stepsize(networkx.cycle_graph(4), 0.1), 5)
        0.00222

    Reference:
        Koloskova, Stich, Jaggi. ICML 2019. arXiv:1902.00340, theorem 2.
    """
    if not (math.isfinite(contraction) and 0 < contraction <= 1):
        raise ValueError(f"choco_stepsize: expected 0 < contraction <= 1, got contraction={contraction}.")
    eigenvalues = np.linalg.eigvalsh(metropolis_weights(neighbours(graph, "choco_stepsize")))
    gap = 1 - float(np.abs(eigenvalues[:-1]).max(initial=0.0))
    norm = 1 - float(eigenvalues[0])
    bottom = 16 * gap + gap**2 + 4 * norm**2 + 2 * gap * norm**2 - 8 * gap * contraction
    return gap**2 * contraction / bottom
