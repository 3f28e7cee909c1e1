"""The errors of this package that are not plain ValueError or TypeError."""

from typing import final


@final
class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is incomplete, or does not fit what is configured now."""


@final
class ConfigurationError(RuntimeError):
    """Ranks were started with different configurations or layouts."""
