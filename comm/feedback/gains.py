"""What compression costs a step size: gains from the change of the gradients to the error of their estimate.

All bounds of this package have one proof. Let dx be a step, g_i the gradients, g their estimate, and let norms of
sequences be taken over time and, for random compressors, in the root of the mean square. Each worker's error follows a
recursion with non-negative coefficients in norms, driven by |dg_i| <= L_i |dx|; so by Young's inequality for
convolutions the error's norm is at most that recursion's value at rest, its gain, times L_i ||dx||, and the triangle
inequality averages over workers: ||g - grad f|| <= kappa ||dx|| up to a constant of the start, kappa being linear in
the arithmetic mean of L_i. The descent lemma in the form

    f(x - lr g) <= f(x) - lr/2 |grad f|^2 - (1/(2 lr) - L/2) |dx|^2 + lr/2 |g - grad f|^2

then sums to a bounded sum of |grad f|^2 wherever lr^2 kappa^2 <= 1 - lr L, which lr <= 1 / (L + kappa) satisfies.
"""


def tracking_gain(alpha: float) -> float:
    """Gain of tracking by compressed differences: xi = q / (1 - q) with q = sqrt(1 - alpha), at most 2 / alpha - 1.

    What is missed after a step obeys |s| <= q (|s| + |dg|).

    Raises:
        ValueError: alpha is outside of (0, 1].

    Example:
        >>> round(tracking_gain(1 / 3), 5)
        4.44949
    """
    check_share("alpha", alpha)
    q = remaining(alpha)
    return q / (1 - q)


def remaining(alpha: float) -> float:
    """Root of the share of the squared norm that one compression leaves."""
    return float((1 - alpha) ** 0.5)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"max_stepsize: expected 0 < {name} <= 1, got {name}={value}.")


def check_positive(**values: float | None) -> None:
    """Raise ValueError unless every value that is given is above 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"max_stepsize: expected {name} > 0, got {name}={value}.")
