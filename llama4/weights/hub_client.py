"""What `huggingface_hub` needs around it: its errors in our words, and its progress bars where somebody sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llama4.errors import Llama4Error
from llama4.progress import has_display

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client lets through when a connection fails: of httpx or of httpx2, by its version."""


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What can go wrong while a repository is read, as errors with a remedy."""
    try:
        yield
    except GatedRepoError as error:
        raise Llama4Error(
            f"{name} is gated: accept its licence on its page on the Hub, then pass token=... or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise Llama4Error(
            f"{name!r} is neither a directory here nor a repository on the Hub that you may see; check the name, or, "
            "if it is private, pass token=... or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise Llama4Error(f"{name} has no revision {revision!r} on the Hub; check the branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        raise Llama4Error(
            f"{name} is not in the local cache and the Hub cannot be reached; check the connection (or "
            "HF_HUB_OFFLINE), or give a local directory"
        ) from error
    except (HTTP_ERROR, EntryNotFoundError, OSError) as error:
        raise Llama4Error(
            f"{name} could not be fetched from the Hub: {reason(error)}; what has arrived is kept, try again"
        ) from error


@contextmanager
def progress_bars(wanted: bool = True) -> Iterator[None]:
    """The client's progress bars, on a display only: by itself it writes them into pipes too."""
    hide = not (wanted and has_display()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
