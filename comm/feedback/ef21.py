"""`EF21`: compress the change of the gradient."""

from dataclasses import dataclass
from typing import ClassVar, final

from gradwire.comm.feedback.base import Absence
from gradwire.comm.feedback.gains import check_positive, check_share, tracking_gain
from gradwire.comm.feedback.tracking import Tracking


@final
@dataclass(frozen=True)
class EF21(Tracking):
    """Track each rank's gradient by compressed differences, and step along the mean of the tracked gradients.

        sent_i = C(g_i - h_i);  h_i <- h_i + sent_i;  H <- H + mean_i sent_i;  estimate = H

    Every rank keeps H, the mean of all h_i, so it needs no dense message. Made for full or large-batch gradients:
    with small batches its error does not fall with the learning rate, because h_i follows the noise; use `EF21SGDM`,
    `EControl` or `EF` there.

    With `TwoPhase` the server's side is compressed, too, and it is EF21-BC: the owner of a row keeps what of the mean
    of the h_i it has not sent yet, mean_i h_i - H, and sends that compressed. With `Communicator(participants=b)` only
    b workers send in a step and h_i of the others stays, which is EF21-PP.

    Args:
        dense_start: Let h_i start at the first gradient, sent dense, in place of zero.

    Cost:
        8 bytes of memory per entry; reads the gradient and h, writes h; reads and writes H.

    State:
        `local` (h_i), this rank's own; `mean` (H), equal on all ranks.

    Example:
        >>> ef21 = EF21()
        >>> state = {"local": torch.tensor([[1.0]]), "mean": torch.tensor([[2.0]])}
        >>> ef21.compensate(torch.tensor([[1.5]]), state)
        tensor([[0.5000]])
        >>> ef21.estimate(torch.tensor([[0.25]]), state)[0]
        tensor([[2.2500]])

    Reference:
        Richtarik, Sokolov, Fatkhullin. EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
        Feedback. NeurIPS 2021. arXiv:2106.05203, algorithm 2; Fatkhullin, Sokolov, Gorbunov, Li, Richtarik. EF21 with
        Bells & Whistles. 2021. arXiv:2110.03294, algorithms 4 (partial participation) and 5 (bidirectional).

    Differences from the paper:
        h_i starts at zero, one of the paper's choices, unless `dense_start`.
    """

    dense_start: bool = False

    absence: ClassVar[Absence] = "unchanged"

    @staticmethod
    def max_stepsize(
        *,
        L: float,
        alpha: float,
        L_mean: float | None = None,
        participation: float = 1.0,
        second_alpha: float = 1.0,
    ) -> float:
        """Largest step size for which gradient descent with EF21 is proven to converge.

            1 / (L + kappa),  kappa = xi_w L_mean + xi_m (L + 2 xi_w L_mean)

        with xi = sqrt(1 - a) / (1 - sqrt(1 - a)) at a = participation alpha (xi_w) and a = second_alpha (xi_m). Without
        a second compression this is 1 / (L + xi L_mean). Worst cases are rare: 8 times as much is often stable.

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1: its `contraction(numel)`.
            L_mean: Arithmetic mean of the workers' constants; L if they are all alike.
            participation: Share of the workers that takes part in a step (for each worker, the least probability).
            second_alpha: Contraction of the server's compressor.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> round(EF21.max_stepsize(L=103 / 6, alpha=1 / 3, L_mean=34.5), 9)
            0.005859121

        Reference:
            Richtarik, Sokolov, Fatkhullin 2021, theorem 1, with the quadratic mean of the L_i; the arithmetic mean is
            Richtarik, Gasanov, Burlachenko. Error Feedback Reloaded. ICLR 2024. arXiv:2402.10774, theorem 3. That
            participation multiplies alpha, and the bound for two compressions, follow from `gains`: a worker that is
            absent is one whose compressor sends nothing, and the server tracks a mean that moves by at most
            L |dx| + 2 |mean_i s_i|.
        """
        check_positive(L=L, L_mean=L_mean)
        check_share("participation", participation)
        local = L if L_mean is None else L_mean
        up, down = tracking_gain(participation * alpha), tracking_gain(second_alpha)
        return 1 / (L + up * local + down * (L + 2 * up * local))
