"""Progress bars: one spelling for all that may take long.

Whoever works in steps opens a `Bar`, and wraps each in `step`. What happens inside a step, in whatever file, goes
through its parts with `track`, which moves the bar, and needs to know nothing of it.

A bar is seen on a terminal or in a notebook (with `ipywidgets`, as a widget), never in a pipe or a log file: those get
a line now and then of what may last for hours.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

DELAY = 0.5
"""Seconds before a bar appears: what is done by then needs none."""
INTERVAL = 0.1
"""Seconds from which a bar is drawn anew when something is done."""
LINE_EVERY = 15.0
"""Seconds after which a log of a long run gets a line."""
TICK = 0.5
"""Seconds after which the time on a bar moves by itself."""
PIECE = 16 << 20
"""Bytes of a large tensor that are read, copied or written at once: so a bar moves, and Ctrl-C is answered."""

_UNITS: dict[str, dict[str, Any]] = {
    "bytes": {"unit": "B", "unit_scale": True, "unit_divisor": 1024},
    "tokens": {"unit": " tokens", "unit_scale": True},
    "tiles": {"unit": " tiles", "unit_scale": True},
    "steps": {"unit": " steps", "unit_scale": True},
    "": {"bar_format": "{desc}: {elapsed}"},
}

_current: ContextVar[Bar | None] = ContextVar("bar", default=None)


def has_display() -> bool:
    """Whether somebody sees what goes to stderr while it comes: on a terminal, or in a notebook."""
    return (sys.stderr is not None and sys.stderr.isatty()) or in_notebook()


def _size() -> dict[str, int]:
    """tqdm's size for a terminal that has none, as in a container, where it would draw nothing; else tqdm finds out."""
    with suppress(OSError, ValueError):
        size = os.get_terminal_size(sys.stderr.fileno())
        return {"ncols": size.columns or 80, "nrows": size.lines or 24} if 0 in size else {}
    return {}


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose stderr is no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Items(Protocol[T_co]):
    """What can be counted, and gone through."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...


class Bar:
    """What is being done, how much of it is, the rate, and the time that is left. To be used in a `with`.

    Args:
        doing: "loading".
        total: of all steps; None if nobody knows, and only the time is shown.
        unit: "bytes", "tokens", "tiles" or "steps".
        shown: false shows nothing, nor does any bar that is opened inside.
        logged: where nobody sees it, what `describe` says is a line on stderr, now and then.
        at_once: seen before anything is done, not after `DELAY`.

    Attributes:
        ends_whole: whether all is done when the block ends well; false where it was left before.
    """

    def __init__(
        self,
        doing: str,
        total: float | None = None,
        unit: str = "",
        *,
        shown: bool = True,
        logged: bool = False,
        at_once: bool = False,
    ) -> None:
        outer = _current.get()
        self.shown: bool = shown and (outer is None or outer.shown)
        self.ends_whole = True
        self._bar: Any = None
        self._settings = {"desc": doing, "total": total, "delay": 0 if at_once else DELAY, **_UNITS[unit]}
        self._is_logged = logged and self.shown and not has_display()
        self._opened = self._said = time.monotonic()
        self._at = self._begin = self._extent = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._outer: Token[Bar | None] | None = None

    def advance(self, amount: float) -> None:
        """So much more is done. Any thread may say so."""
        with self._lock:
            self._at += amount
            self._show(self._at)

    def describe(self, doing: str) -> None:
        """What is being done now."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_description_str(doing, refresh=False)
        elif self._is_logged and time.monotonic() - self._said > LINE_EVERY:
            self._said, total = time.monotonic(), self._settings["total"]
            left = (self._said - self._opened) / self._at * (total - self._at) if self._at else 0
            in_time = f", {left / 60:.0f} min left" if left >= 60 else ""
            print(
                f"llama4: {doing}, {self._at:g} of {total:g}{self._settings['unit']}{in_time}",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def step(self, amount: float) -> Iterator[None]:
        """What happens inside is so much; its parts are what `track` goes through."""
        self._begin, self._extent = self._at, amount
        yield
        self._extent = 0.0
        self.advance(amount)

    def track(self, items: Items[T]) -> Iterator[T]:
        """See `track`."""
        begin, extent = self._begin, self._extent
        self._extent = extent / max(len(items), 1)
        for i, item in enumerate(items):
            self._begin = begin + i * self._extent
            with self._lock:
                self._show(self._begin)
            yield item
        self._begin, self._extent = begin, extent

    def __enter__(self) -> Bar:
        self._outer = _current.set(self)
        if self.shown and has_display():
            from tqdm.auto import tqdm  # a notebook's, in a notebook

            drawn: dict[str, Any] = {"mininterval": INTERVAL, "miniters": 0, "smoothing": 0}
            self._bar = tqdm(**self._settings, **drawn, **_size(), leave=False)
            threading.Thread(target=self._tick, name="llama4-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outer is not None
        _current.reset(self._outer)
        self._closed.set()
        if self._bar is None:
            return
        is_locked = self._lock.acquire(timeout=1)  # after Ctrl-C in tqdm's own lock, `_tick` may wait for that
        if error is None and self.ends_whole:
            self._bar.n = self._bar.total if self._bar.total is not None else self._bar.n
            self._bar.mininterval = 0
            self._bar.update(0)
        self._bar.close()
        if is_locked:
            self._lock.release()

    def _show(self, at: float) -> None:
        if self._bar is not None and at > self._bar.n:
            self._bar.update(at - self._bar.n)

    def _tick(self) -> None:
        """The first time after DELAY, even where a single step takes long."""
        wait = DELAY
        while not self._closed.wait(wait):
            wait = TICK
            with self._lock:
                if not self._closed.is_set():
                    self._bar.update(0)


def starting() -> Bar:
    """Around the imports of a command: torch takes seconds. Seen at once, as the system loads libraries in one piece,
    meanwhile nothing moves."""
    return Bar("starting", shown="torch" not in sys.modules, at_once=True)


def inner_bar(doing: str, total: float, unit: str) -> Bar:
    """A bar inside another; where there is no other, none is shown."""
    return Bar(doing, total, unit, shown=_current.get() is not None)


@contextmanager
def step(amount: float) -> Iterator[None]:
    """What happens inside is so much of what the bar around it counts, if there is one."""
    bar = _current.get()
    with bar.step(amount) if bar is not None else nullcontext():
        yield


def track(items: Items[T]) -> Iterator[T]:
    """The parts of the step that some bar is at, one after the other; each is the same share of it, and may have parts
    itself. A bar does not go back: what goes through the same tensor twice is seen once. Without a bar, just the items.
    """
    bar = _current.get()
    return iter(items) if bar is None else bar.track(items)
