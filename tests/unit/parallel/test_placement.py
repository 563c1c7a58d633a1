"""Tensor-parallel groups and nodes."""

from __future__ import annotations

import pytest

from megatron_synth.config.errors import UserError
from megatron_synth.parallel.placement import check_placement, spanning_group
from megatron_synth.parallel.plan import Layout


def layout(tensor: int, data: int) -> Layout:
    return Layout(tensor, 1, 1, data, num_microbatches=1, layers_per_stage=1, sequence_parallel=tensor > 1)


def test_groups_within_nodes_are_fine() -> None:
    assert spanning_group(2, ["a", "a", "b", "b"]) is None
    assert spanning_group(1, ["a", "b"]) is None
    check_placement(layout(2, 2), ["a", "a", "b", "b"])


def test_the_ranks_and_nodes_of_a_spanning_group_are_named() -> None:
    assert spanning_group(2, ["a", "a", "a", "b"]) == range(2, 4)
    assert spanning_group(2, ["a", "b", "a", "b"]) == range(0, 2)  # ranks dealt out in turn
    with pytest.raises(UserError, match=r"rank 2 on a, rank 3 on b.*--allow-tp-across-nodes"):
        check_placement(layout(2, 2), ["a", "a", "a", "b"])
