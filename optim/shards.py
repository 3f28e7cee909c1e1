"""`Shards`: sums over a whole tensor, of which each process may hold a part."""

from torch import Tensor


class Shards:
    """How the tensors of one update are shared among processes; here: not at all."""

    def sum(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        """Sum over the processes that share dimension `dim` of the update's tensors.

        Args:
            parts: What this process has summed, one small tensor of any shape per parameter.
            dim: One of the dimensions that `Optimizer.dims` gives.
        """
        return parts
