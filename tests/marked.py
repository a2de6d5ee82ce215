"""Parameters that only `-m slow` or only `-m exhaustive` runs."""

import pytest


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def exhaustive(*values, **options):
    return pytest.param(*values, marks=pytest.mark.exhaustive, **options)
