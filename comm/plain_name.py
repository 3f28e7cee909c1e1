"""`plain_name`: a parameter's name without the wrappers that come and go between runs."""

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # of torch.compile and of activation checkpointing


def plain_name(name: str) -> str:
    """The name in the bare model, so that a checkpoint's state is found again with and without these wrappers.

    Example:
        >>> plain_name("layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
