"""What one thread gives to others, which wait for it in threads or in event loops."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from llama4.engine.request import Delivery


class Mailbox:
    """What the worker's thread gives to readers, in threads or loops, until it is closed."""

    def __init__(self) -> None:
        self.is_closed = False
        self._items: deque[Delivery] = deque()
        self._changed = threading.Condition()
        self._arrived: dict[asyncio.AbstractEventLoop, asyncio.Event] = {}

    def put(self, item: Delivery) -> None:
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """Nothing follows that somebody should wait for."""
        self.is_closed = True
        self._wake()

    def take(self) -> Delivery | None:
        """The next item, if there is one."""
        return self._items.popleft() if self._items else None

    def wait(self) -> None:
        """Until there may be something."""
        with self._changed:
            self._changed.wait_for(self._has_changed)

    async def wait_async(self) -> None:
        """Until there may be something."""
        arrived = self._arrived.setdefault(asyncio.get_running_loop(), asyncio.Event())
        arrived.clear()
        if not self._has_changed():
            await arrived.wait()

    def _has_changed(self) -> bool:
        return bool(self._items) or self.is_closed

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for loop, arrived in self._arrived.copy().items():
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody reads in it any more
                self._arrived.pop(loop, None)
