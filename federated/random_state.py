"""Draws of modules, such as dropout: from torch's own generators, seeded for every client and left as they were."""

from contextlib import AbstractContextManager

import torch


def seed_modules(key: int, device: torch.device) -> None:
    """Seed the generators that modules draw from on this device.

    Args:
        key: As `counter_rng.fold` gives it.
        device: Where the modules are.
    """
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


def kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Put the generators that `seed_modules` seeds back to where they were, in the end.

    Example:
        >>> before = torch.get_rng_state()
        >>> with kept_random_state(torch.device("cpu")):
        ...     seed_modules(7, torch.device("cpu"))
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
