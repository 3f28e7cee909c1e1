"""`SCAFFOLD`: control variates against client drift."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.federated.algorithm import Correction, LocalWork, Round, Vectors, Weighting
from gradwire.federated.control_variates import ControlVariates
from gradwire.federated.local_training import LocalTraining

Form = Literal["textbook", "one variable", "zero overhead"]


@final
@dataclass(frozen=True)
class SCAFFOLD(ControlVariates):
    """Correct every local gradient by the difference between the mean gradient and the client's own.

        y <- y - lr (g - c_i + c), K times
        option II: c_i+ = c_i - c + (x - y) / (lr K);  option I: c_i+ = grad f_i(x)
        x <- x - lr_server mean_S (x - y_i);  c <- c + S/N mean_S (c_i+ - c_i)

    It converges to the minimum of the mean loss, however clients differ, also if few take part in a round; c_i goes
    stale where they do so rarely.

    Three forms give the same x and differ in what travels:

    - "textbook" sends x - y_i and c_i+ - c_i;
    - "one variable" sends u_i = (x - y_i) / (lr K) - c alone, which is c_i+ - c_i and gives x - y_i = lr K (u_i + c);
    - "zero overhead" keeps d_i = c_i - c at the client, sends x - y_i alone, gets x alone, and then takes
      d_i <- d_i + ((x - y_i) - (x - x+)) / (lr K). All clients must take part, and the server's lr must be 1. If one is
      lost, the d_i still add up to zero, but x is no longer SCAFFOLD's.

    Args:
        form: See above. All but "textbook" need the same number of steps K at every client.
        option: Of c_i+. "I" takes one more pass over the client's examples, is more stable, and of the "textbook" form.
        sum_gradients: With option II, take the mean of the raw gradients, which c_i+ is with plain SGD, from their sum.
            It allows momentum, weight decay and other local optimizers, and is of the "textbook" form.
        weighting: p_i of means: "uniform", "samples", or a function of (client, num_examples).

    Shapes:
        Any model.

    Cost:
        Vectors up and down per client and round: 2 and 2, "one variable" 1 (and the number K) and 2, "zero overhead" 1
        and 1. One pass over the parameters in every local step; two with `sum_gradients`.

    State:
        control: c_i, or d_i, at every client; c at the server, but for "zero overhead".

    Example:
        >>> SCAFFOLD().messages, SCAFFOLD(form="one variable").messages
        (('pseudo_gradient', 'control_change'), ('control_change',))

    Reference:
        Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD: Stochastic Controlled Averaging for Federated
        Learning. ICML 2020. arXiv:1910.06378, algorithm 1.

    Differences from the paper:
        A client's own K and lr, where they are not all alike. Weights p_i, of which the paper's are uniform; c is then
        the weighted mean of c_i, and x converges to the minimum of sum_i p_i f_i.
    """

    form: Form = "textbook"
    option: Literal["I", "II"] = "II"
    sum_gradients: bool = False
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        if self.form not in ("textbook", "one variable", "zero overhead"):
            raise ValueError(
                f"SCAFFOLD: expected form 'textbook', 'one variable' or 'zero overhead', got form={self.form!r}."
            )
        if self.option not in ("I", "II"):
            raise ValueError(f"SCAFFOLD: expected option 'I' or 'II', got option={self.option!r}.")
        if self.form != "textbook" and (self.option == "I" or self.sum_gradients):
            raise ValueError(
                f"SCAFFOLD: expected option='II' and sum_gradients=False with form={self.form!r}, got "
                f"option={self.option!r}, sum_gradients={self.sum_gradients}. Use form='textbook'."
            )
        if self.option == "I" and self.sum_gradients:
            raise ValueError("SCAFFOLD: expected option='II' with sum_gradients, got option='I'.")

    def check(
        self,
        training: LocalTraining,
        *,
        clients: int,
        cohort_size: int,
        numel: int,
        server_lr: float | None = 1.0,
    ) -> None:
        """Local training must fit the option, and the cohort and server the form."""
        super().check(training, clients=clients, cohort_size=cohort_size, numel=numel, server_lr=server_lr)
        if self.needs_equal_steps and not isinstance(training.steps, int):
            raise ValueError(
                f"SCAFFOLD: expected LocalTraining(steps=number) with form={self.form!r}, got steps={training.steps}. "
                "Clients that take different numbers of steps need form='textbook'."
            )
        if self.form == "zero overhead" and (cohort_size != clients or server_lr != 1):
            raise ValueError(
                "SCAFFOLD: expected all clients in every round and plain server steps with lr 1 with "
                f"form='zero overhead', got cohort_size={cohort_size} of {clients}, server_lr={server_lr}. "
                "Use form='one variable'."
            )

    @property
    def needs_equal_steps(self) -> bool:
        """Unless both vectors are sent."""
        return self.form != "textbook"

    @property
    def needs_gradients(self) -> bool:
        """If asked for."""
        return self.sum_gradients

    @property
    def needs_start_gradient(self) -> bool:
        """With option I."""
        return self.option == "I"

    @property
    def settles(self) -> bool:
        """In the form in which clients make out c from the server's step."""
        return self.form == "zero overhead"

    @property
    def needs_plain_sgd(self) -> bool:
        """If c_i+ comes from x - y."""
        return self.option == "II" and not self.sum_gradients

    @property
    def server_state(self) -> tuple[str, ...]:
        """The mean, c, which `zero overhead` does without."""
        return () if self.form == "zero overhead" else ("control",)

    @property
    def broadcast(self) -> tuple[str, ...]:
        """The mean, c, which `zero overhead` does without."""
        return self.server_state

    @property
    def messages(self) -> tuple[str, ...]:
        """Both x - y_i and c_i+ - c_i, or one of them."""
        return {
            "textbook": ("pseudo_gradient", "control_change"),
            "one variable": ("control_change",),
            "zero overhead": ("pseudo_gradient",),
        }[self.form]

    @property
    def scalars(self) -> tuple[str, ...]:
        """K, where the server needs it."""
        return ("steps",) if self.form == "one variable" else ()

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """The difference c - c_i, or -d_i."""
        if self.form == "zero overhead":
            return Correction(vector=-state["control"])
        return super().correction(start, received, state)

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """Movement, change of the control variate, or both."""
        if self.form == "zero overhead":
            return {"pseudo_gradient": work.pseudo_gradient}
        if self.option == "I":
            assert work.start_gradient is not None
            change = work.start_gradient.sub_(work.state["control"])
        elif self.sum_gradients:
            assert work.gradient_sum is not None
            change = work.gradient_sum.div_(work.steps).sub_(work.state["control"])
        else:
            change = torch.div(work.pseudo_gradient, work.lr * work.steps).sub_(work.received["control"])
        if self.form == "one variable":
            return {"control_change": change}
        return {"pseudo_gradient": work.pseudo_gradient, "control_change": change}

    def message_scalars(self, work: LocalWork) -> dict[str, float]:
        """K."""
        return {"steps": work.steps} if self.scalars else {}

    def commit(self, work: LocalWork, arrived: Vectors) -> dict[str, Tensor]:
        """c_i+, or the first half of the new d_i."""
        control = work.state["control"]
        if self.form == "zero overhead":
            return {"control": arrived["pseudo_gradient"] / (work.lr * work.steps) + control}
        return {"control": control + arrived["control_change"]}

    def settle(self, state: Vectors, step: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
        """The second half of the new d_i."""
        if self.form == "zero overhead":
            return {**state, "control": state["control"] - step / (lr * steps)}
        return dict(state)

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The mean movement; moves c."""
        if self.form == "zero overhead":
            return mean["pseudo_gradient"]
        change, control = mean["control_change"], state["control"]
        if self.form == "textbook":
            step = mean["pseudo_gradient"]
        else:
            step = (change + control).mul_(round.lr * round.scalars["steps"])
        control.add_(change, alpha=round.share)
        return step
