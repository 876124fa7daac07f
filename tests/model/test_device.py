"""What a device has."""

from __future__ import annotations

import pytest
import torch

from llama4.model.device import free_memory


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver gives, and the blocks that torch keeps whole: of 500 bytes 280 are in use or wait for a stream,
    and 90 are rests of blocks in use."""
    kinds = {"reserved_bytes": 500, "allocated_bytes": 250, "active_bytes": 280, "inactive_split_bytes": 90}
    stats = {f"{kind}.all.current": size for kind, size in kinds.items()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert free_memory(torch.device("cuda")) == 1000 + 500 - 280 - 90
