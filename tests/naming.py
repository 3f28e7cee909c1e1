"""Names of parametrized tests, equal in every process that collects them."""

import re
from typing import Any


def plain(value: Any) -> str:
    """A value as text, without addresses; of a case, what is under test."""
    for name in ("algorithm", "aggregator"):
        if hasattr(value, "__dataclass_fields__") and name in value.__dataclass_fields__:
            value = getattr(value, name)
    return re.sub(r" at 0x\w+", "", str(value))
