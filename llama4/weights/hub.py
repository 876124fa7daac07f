"""Model names -> directories: local ones, and those on the Hugging Face Hub, of which only the needed files are
fetched."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llama4.tiny import EMBEDDED
from llama4.weights.checkpoint import LAYOUTS

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client lets through when a connection fails: of httpx or of httpx2, by its version."""


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """The directory of a model: that of an embedded model, `name` itself, or the Hub's repository in the local cache.

    Without a network, what the cache holds is used. `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are
    honoured.

    Args:
        name: an embedded model, a directory, or an id such as "meta-llama/Llama-4-Scout-17B-16E-Instruct".
        revision: branch, tag or commit on the Hub.
        token: for private and gated repositories; by default the one you logged in with.
        patterns: files to fetch; by default those of the model's layout.
        progress: show the client's bars, if stderr is a terminal.

    Raises:
        ValueError: no such directory or repository, no access to it, or no way to reach it; the message says which.
    """
    if str(name) in EMBEDDED:
        return EMBEDDED[str(name)]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name} is a file; name the directory that holds config.json and the weights")
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"{str(name)!r} is no model: give an embedded name ('tiny'), an existing directory, or a Hub id like "
            "'organisation/name'"
        )
    try:
        with _bars(progress):
            for files in [patterns] if patterns is not None else [layout.files for layout in LAYOUTS.values()]:
                found = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(files)))
                if any(layout.recognises(found) for layout in LAYOUTS.values()):
                    break
            return found
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its licence on its page on the Hub, then pass token=... or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a directory here nor a repository on the Hub that you may see; check the name, or, "
            "if it is private, pass token=... or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the Hub; check the branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is not in the local cache and the Hub cannot be reached; check the connection (or "
            "HF_HUB_OFFLINE), or give a local directory"
        ) from error
    except (_HTTP_ERROR, EntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} could not be fetched from the Hub: {_reason(error)}; what has arrived is kept, try again"
        ) from error


def push(directory: str | Path, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload a saved model as one commit, creating the repository if need be; returns the commit's address.

    Raises:
        ValueError: no permission, or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        with _bars():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload model")
        return str(commit.commit_url)
    except (_HTTP_ERROR, OSError) as error:
        raise ValueError(
            f"could not upload to {repo_id}: {_reason(error)}; check its name, the connection and your token "
            "(`hf auth login`)"
        ) from error


@contextmanager
def _bars(wanted: bool = True) -> Iterator[None]:
    """The client's progress bars, on a terminal only: by itself it writes them into pipes too."""
    hide = not (wanted and sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
