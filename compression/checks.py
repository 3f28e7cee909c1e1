"""Checks with one wording: who, expected, got."""

from torch import Tensor


def check_positive(who: str, name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: expected an integer {name} >= 1, got {name}={value!r}.")


def check_choice(who: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{who}: expected {name} in {choices}, got {name}={value!r}.")


def check_scale(who: str, scale: Tensor) -> None:
    """Raise ValueError unless every scale of a payload is finite and not negative."""
    if not ((scale >= 0) & scale.isfinite()).all():
        raise ValueError(f"{who}: expected finite scales >= 0, got others.")
