"""Checks of hyper-parameters with one wording: who, expected, got."""


def check_positive(who: str, name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: expected an integer {name} >= 1, got {name}={value!r}.")


def check_choice(who: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{who}: expected {name} in {choices}, got {name}={value!r}.")
