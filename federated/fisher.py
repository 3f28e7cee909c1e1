"""`FisherAveraging`: a mean in which every client counts where its examples tell something."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from gradwire.federated.algorithm import Algorithm, LocalWork, Round, Vectors, Weighting
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.local_training import Loss

Outputs = Callable[..., Tensor]
"""`outputs(module, *batch)`: the logits `[batch, …, classes]`, or the means of Gaussians `[batch, …]`."""
Distribution = Literal["categorical", "gaussian"]

_BLOCK_ENTRIES = 1 << 22  # gradients of so many entries at a time


@final
@dataclass(frozen=True)
class FisherAveraging(Algorithm):
    """Clients train as for FedAvg, and the server averages by entry, weighted by diagonal Fisher information.

        F_i = mean over examples of E[(d log p(label) / d y_i)^2]
        x <- x - lr_server sum_i p_i F_i (x - y_i) / (floor + sum_i p_i F_i),  with sum_i p_i = 1

    This is the mode of the product of Gaussians around the clients' models. For a linear model with one feature per
    example, the result after whole local training is the least-squares solution of all examples together. Best with
    few rounds, long local training and clients that differ; a round takes two sums, so it can be secure.

    Args:
        outputs: The model's outputs, for the exact diagonal, the expectation over the model's own labels; by default
            the empirical one, from the gradient of the simulation's loss at each example.
        distribution: Of labels given outputs: "categorical", or "gaussian" with variance 1.
        max_examples: Of a client, drawn anew in every round, >= 1; all by default. 256 are often enough.
        normalize: Divide F_i by its norm. It forgets how much a client's examples tell, so it is off.
        floor: What the server's own model counts in every entry, >= 0. Entries of much less information stay.
        weighting: p_i: "samples", "uniform", or a function of (client, num_examples).

    Shapes:
        Any model; F_i `[numel]`.

    Cost:
        Two vectors up and one down per client and round. A backward pass per example, or one per example and output
        for the exact diagonal.

    State:
        None.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> algorithm = FisherAveraging(outputs=lambda module, x, y: module(x), max_examples=256)
        >>> algorithm.messages
        ('fisher', 'fisher_pseudo_gradient')

    Reference:
        Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022. arXiv:2111.09832, section 3.

    Differences from the paper:
        No normalisation by default, and weights by samples. As the authors' floor, which only the target model gets,
        `floor` keeps entries of which no client knows anything: here the target is the server's model.
    """

    outputs: Outputs | None = None
    distribution: Distribution = "categorical"
    max_examples: int | None = None
    normalize: bool = False
    floor: float = 0.0
    weighting: Weighting = "samples"

    def __post_init__(self) -> None:
        if self.distribution not in ("categorical", "gaussian"):
            raise ValueError(
                f"FisherAveraging: expected distribution categorical or gaussian, got {self.distribution!r}."
            )
        if self.max_examples is not None and not self.max_examples >= 1:
            raise ValueError(f"FisherAveraging: expected max_examples >= 1, got max_examples={self.max_examples}.")
        if not self.floor >= 0:
            raise ValueError(f"FisherAveraging: expected floor >= 0, got floor={self.floor}.")

    @property
    def messages(self) -> tuple[str, ...]:
        """F, and F (x - y)."""
        return ("fisher", "fisher_pseudo_gradient")

    @property
    def measures(self) -> bool:
        """F."""
        return True

    def measure(self, model: FlatModel, loss: Loss, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        """F at the client's model."""
        if self.max_examples is not None and self.max_examples < examples[0].shape[0]:
            drawn = torch.randperm(examples[0].shape[0])[: self.max_examples].sort().values
            examples = [tensor[drawn.to(tensor.device)] for tensor in examples]
        if self.outputs is None:
            return {"fisher": empirical_fisher(model.module, loss, examples)}
        return {"fisher": exact_fisher(model.module, self.outputs, examples, distribution=self.distribution)}

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """F, and F times the pseudo-gradient."""
        fisher = work.measured["fisher"]
        if self.normalize:
            norm = torch.linalg.vector_norm(fisher, dim=-1, keepdim=True)
            fisher = fisher / torch.where(norm > 0, norm, 1.0)
        return {"fisher": fisher, "fisher_pseudo_gradient": fisher * work.pseudo_gradient}

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The mean weighted by F; zero where there is none."""
        total = mean["fisher"] + self.floor
        return torch.where(total > 0, mean["fisher_pseudo_gradient"] / total, 0.0)


def empirical_fisher(module: nn.Module, loss: Loss, examples: Sequence[Tensor]) -> Tensor:
    """The mean over examples of the squared gradient of the loss at the example's own label.

    Args:
        module: Taken in `eval()` mode.
        loss: `loss(module, *batch)`, called with batches of one example; a negative log-likelihood.
        examples: Tensors of equal length, as `loss` takes them.

    Returns:
        `[numel]`, in the order of the module's trainable parameters.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(linear.weight)
        >>> def loss(module, x, y):
        ...     return 0.5 * (module(x) - y).square().mean()
        >>> empirical_fisher(linear, loss, (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1)))
        tensor([0.5000, 2.0000])
    """

    def squared(losses: Tensor, gradient: Tensor) -> Tensor:
        return gradient.square()

    return _mean_of_squares(module, loss, examples, squared)


def exact_fisher(
    module: nn.Module, outputs: Outputs, examples: Sequence[Tensor], *, distribution: Distribution = "categorical"
) -> Tensor:
    """The mean over examples of the expected squared gradient of log p(label), over labels that the model draws.

        categorical:  sum_c p_c (d log p_c / dw)^2;   gaussian, of variance 1:  sum_k (d output_k / dw)^2

    Args:
        module: Taken in `eval()` mode.
        outputs: `outputs(module, *batch)`, called with batches of one example: logits `[1, …, classes]`, or means.
        examples: Tensors of equal length, as `outputs` takes them.
        distribution: Of labels.

    Returns:
        `[numel]`, in the order of the module's trainable parameters.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> exact_fisher(linear, lambda module, x: module(x), (inputs,), distribution="gaussian")
        tensor([0.5000, 2.0000])
    """
    if distribution not in ("categorical", "gaussian"):
        raise ValueError(f"exact_fisher: expected distribution categorical or gaussian, got {distribution!r}.")

    def terms(module: nn.Module, *batch: Tensor) -> Tensor:
        found = outputs(module, *batch)
        return torch.log_softmax(found, -1).flatten() if distribution == "categorical" else found.flatten()

    def expected(values: Tensor, jacobian: Tensor) -> Tensor:
        squares = jacobian.square()
        return values.exp() @ squares if distribution == "categorical" else squares.sum(0)

    return _mean_of_squares(module, terms, examples, expected)


class _Call(nn.Module):
    """A function of a module, as a module, whose parameters can be replaced."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *batch: Tensor) -> Tensor:
        """Call it."""
        return self.function(self.module, *batch)


def _mean_of_squares(
    module: nn.Module,
    function: Callable[..., Tensor],
    examples: Sequence[Tensor],
    squared: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The mean over examples of `squared(values, their derivatives [*values, numel])`."""
    count = examples[0].shape[0]
    call = _Call(module, function)
    named = [(name, value) for name, value in call.named_parameters() if value.requires_grad]
    shapes = [value.shape for _, value in named]
    vector = torch.cat([value.detach().reshape(-1) for _, value in named])

    def values_at(vector: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        values = {name: part.view(shape) for (name, _), part, shape in zip(named, parts, shapes, strict=True)}
        found: Tensor = torch.func.functional_call(call, values, tuple(tensor[None] for tensor in batch))
        return found, found

    def of_example(*batch: Tensor) -> Tensor:
        derivative, values = torch.func.jacrev(values_at, has_aux=True)(vector, batch)
        return squared(values, derivative)

    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        first = torch.func.functional_call(call, {}, tuple(tensor[:1] for tensor in examples))
        size = max(1, _BLOCK_ENTRIES // (vector.numel() * max(1, first.numel())))
        total = torch.zeros_like(vector)
        for block in zip(*(torch.split(tensor, size) for tensor in examples), strict=True):
            total += torch.func.vmap(of_example)(*block).detach().sum(0)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return total.div_(max(1, count))
