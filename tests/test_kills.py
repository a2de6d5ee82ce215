"""`kill -9` at any time: the same command ends with the adapter, the losses and the log of a run that was never killed."""

import pytest

from tests.benchmarks.kills import kill


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    """At chosen places and at random times; `python -m tests.benchmarks.kills --kills 200` for more."""
    found = kill(tmp_path, 20, seed=0)
    assert found.faults == []
    assert found.total == 20 and len(found.kills) > 5
    assert found.most_lost <= 8  # the steps between two saves, and those while the first of them was being written
