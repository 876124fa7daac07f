"""Processes that are forked from one that has computed.

The threads of OpenMP, which torch computes with, do not survive a fork: the child waits for them for ever. GNU's OpenMP
cannot be told to make new ones, so the child computes with one thread. (The CPU kernels' own threads are made anew.)
"""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger("llama4")

_registered = False
_notices: list[str] = []
"""What is to be said; whoever takes it says it, be it one of several threads."""


def survive_forks() -> None:
    """From now on children of this process compute with one thread, and say so once when they first answer."""
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
        _registered = True


def _after_fork() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _notices.append(
            "this process was forked from one that had loaded a model, so it computes with one thread; for more, load "
            "the model in the child, start it by 'spawn' or 'forkserver', or answer in threads of the child's own"
        )


def notice_fork() -> None:
    """Log once what a fork has changed."""
    try:
        notice = _notices.pop()
    except IndexError:
        return
    logger.warning(notice)
