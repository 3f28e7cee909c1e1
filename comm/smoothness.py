"""`estimate_smoothness`: how fast a worker's gradient changes, for step sizes and for the weights of `EF21W`."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradwire.compression import counter_rng


def estimate_smoothness(
    loss_or_gradient: Tensor | Sequence[Tensor], parameters: Iterable[Tensor], *, iterations: int = 20, seed: int = 0
) -> float:
    """The largest magnitude of an eigenvalue of a loss's Hessian, at the present parameters, by power iteration.

        v <- H v / |H v|,   L ~ |H v|

    For a quadratic that is its smoothness constant; elsewhere it is the local one, which a step size must not exceed
    the inverse of. The estimate is never above the truth and grows with the iterations: its square is short by a factor
    of 1 - O((l2 / l1)^(2 iterations)), where l1 and l2 are the two largest magnitudes.

    Every worker calls it with its own data; `EF21W` takes the values of all, in the order of ranks.

    Args:
        loss_or_gradient: A 0-d loss whose graph is still there; or its gradient, one tensor per parameter, computed
            with `create_graph=True`.
        parameters: The parameters, in the order of the gradient.
        iterations: Hessian-vector products, >= 1.
        seed: Fixes the first v.

    Returns:
        L >= 0. 0 if the gradient does not depend on the parameters.

    Raises:
        ValueError: there is no parameter, or the loss or gradient is none of these.

    Cost:
        One backward pass through the gradient for each iteration, and two copies of the parameters. It waits for the
        device once, at its end.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> round(estimate_smoothness((torch.tensor([1.0, -3.0]) * x.square()).sum(), [x]), 4)
        6.0

    Reference:
        Pearlmutter. Fast Exact Multiplication by the Hessian. Neural Computation 6, 1994.
    """
    parameters = list(parameters)
    if not parameters or iterations < 1:
        raise ValueError(
            "estimate_smoothness: expected at least one of parameters and iterations >= 1, "
            f"got {len(parameters)} and iterations={iterations}."
        )
    gradient = _gradient(loss_or_gradient, parameters)
    varying = [position for position, part in enumerate(gradient) if part.requires_grad]
    if not varying:
        return 0.0
    keys = counter_rng.row_keys(counter_rng.fold("estimate_smoothness", seed), len(parameters))
    v = [
        counter_rng.uniform(key[None], parameter.numel()).sub_(0.5).view(parameter.shape).to(parameter)
        for key, parameter in zip(keys, parameters, strict=True)
    ]
    length = _norm(v)
    for _ in range(iterations):
        # The Hessian is symmetric, so that a product from the left is one from the right.
        products = torch.autograd.grad(
            [gradient[position] for position in varying],
            parameters,
            [v[position] / length.to(v[position]) for position in varying],
            retain_graph=True,
            materialize_grads=True,
        )
        v = list(products)
        norm = _norm(v)
        length = torch.where(norm == 0, 1, norm)
    return float(norm)


def _gradient(loss_or_gradient: Tensor | Sequence[Tensor], parameters: list[Tensor]) -> Sequence[Tensor]:
    if isinstance(loss_or_gradient, Tensor):
        if loss_or_gradient.dim() != 0 or not loss_or_gradient.requires_grad:
            raise ValueError(
                "estimate_smoothness: expected a 0-d loss that depends on the parameters, "
                f"got shape {tuple(loss_or_gradient.shape)}, requires_grad={loss_or_gradient.requires_grad}."
            )
        return torch.autograd.grad(loss_or_gradient, parameters, create_graph=True, materialize_grads=True)
    found, expected = [part.shape for part in loss_or_gradient], [parameter.shape for parameter in parameters]
    if found != expected:
        raise ValueError(
            f"estimate_smoothness: expected a gradient of shapes {[tuple(shape) for shape in expected]}, "
            f"got {[tuple(shape) for shape in found]}."
        )
    return loss_or_gradient


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries, on the first one's device."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total
