"""The process helper itself: results in order, failures with their rank."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def _sum_of_ranks() -> tuple[int, float]:
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return dist.get_rank(), x.item()


def _fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, _sum_of_ranks) == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_a_failure_names_its_rank() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 error.*on purpose"):
        run_ranks(2, _fails_on_rank_1, timeout_s=10)
