"""A few kills in the suite; `python -m tests.faults.synthesis` does more."""

import pytest

from tests.faults.synthesis import campaign


@pytest.mark.slow
def test_client_and_server_are_killed_and_nothing_is_lost(tmp_path):
    found = campaign(tmp_path, kills=3, seed=4)
    assert sum(found["victims"].values()) == 3
    assert found["asked"] == 56
