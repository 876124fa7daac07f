"""Examples that hypothesis draws."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def drawn(number: int, same: bool = True) -> settings:
    """So many examples, the same in each run unless it is said, however slow the machine is."""
    return settings(max_examples=number, deadline=None, derandomize=same, suppress_health_check=[HealthCheck.too_slow])
