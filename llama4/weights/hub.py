"""Model names -> directories: local ones, and those on the Hugging Face Hub, of which only the needed files are
fetched; and the way back, `push`."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile

from llama4.errors import ArgumentError, CheckpointError, Llama4Error, nearest
from llama4.families import PRESETS
from llama4.files import user_path
from llama4.gguf import MAGIC
from llama4.tiny import EMBEDDED
from llama4.weights.checkpoint import LAYOUTS, recognised_layout
from llama4.weights.directory import check_whole
from llama4.weights.gguf.files import is_gguf, mmproj_of, models, parts
from llama4.weights.hub_client import HTTP_ERROR, hub_errors, progress_bars, reason
from llama4.weights.hub_shards import HubShards
from llama4.weights.layout import CheckpointLayout
from llama4.weights.safetensors import INDEX_FILE
from llama4.weights.side_files import MODEL_CARD, HubOrigin
from llama4.weights.unreadable import files_in, why_unreadable

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_FILE = re.compile(rf"(?P<repository>{_HUB_ID.pattern})/(?P<file>[^:]+\.gguf)", re.IGNORECASE)
_HUB_ADDRESS = re.compile(rf"(?:https?://[^/]+|hf:/)/({_HUB_ID.pattern})")


def all_files(layout: CheckpointLayout) -> tuple[str, ...]:
    """Patterns of everything that is read of a model."""
    return (*layout.side_files, *layout.weight_files)


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    select: Callable[[CheckpointLayout], Sequence[str]] = all_files,
    progress: bool = True,
) -> Path:
    """The directory of a model: that of an embedded model, `name` itself, or the Hub's repository in the local cache.
    Of a model in GGUF its file, of a split the first.

    Without a network, what the cache holds is used. `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are
    honoured.

    Args:
        name: an embedded model, a directory, a GGUF file, or an id such as
            "meta-llama/Llama-4-Scout-17B-16E-Instruct", which a GGUF file of the repository may follow after a slash.
        revision: branch, tag or commit on the Hub.
        subfolder: of the directory or repository, where the model is.
        token: for private and gated repositories; by default the one you logged in with.
        select: patterns of the files to fetch, by the model's layout.
        progress: show the client's bars, where somebody sees them.

    Raises:
        Llama4Error: no such directory or repository, no access to it, or no way to reach it; or one without a model, or
            with weights that are not read. The message says which.
    """
    folder = _checked(subfolder)
    if str(name) in EMBEDDED:
        return EMBEDDED[str(name)]
    path = user_path(name)
    if path.is_dir() and name != "":
        path = path / folder
        if not path.is_dir():
            raise Llama4Error(f"{name} has no subfolder {subfolder!r}; check its name")
        check_whole(path)
        if not _is_complete(path) and (model := _only_model(str(name), [each.name for each in path.iterdir()])):
            return path / model
        if select is all_files and not _is_complete(path) and (why := why_unreadable(files_in(path))):
            raise CheckpointError(f"{path} cannot be loaded: {why}")
        return path
    if path.is_file():
        if is_gguf(path):
            return path
        raise CheckpointError(f"{name} cannot be loaded: {_why_no_directory(path)}")
    fetch = partial(_fetch_gguf, revision=revision, token=token, progress=progress)
    if isinstance(name, str) and not path.is_absolute() and (file := _HUB_FILE.fullmatch(name)):
        return fetch(file["repository"], folder / file["file"])
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        address = _HUB_ADDRESS.match(str(name))
        if path.is_absolute() or str(name).startswith((".", "~")):
            raise Llama4Error(f"there is no {str(name)!r}; check the path")
        if name in PRESETS:
            raise Llama4Error(
                f"{name!r} is a shape that info and plan know, without weights; give a directory, or a Hub id like "
                "'meta-llama/Llama-4-Scout-17B-16E-Instruct'"
            )
        raise Llama4Error(
            f"{str(name)!r} is no model{nearest(str(name), [*EMBEDDED, *PRESETS])}: give an embedded name ('tiny'), an "
            "existing directory or GGUF file, or a Hub id like "
            f"{address[1] if address else 'organisation/name'!r}"
        )
    with hub_errors(name, revision), progress_bars(progress):
        for layout in (layout for layout in LAYOUTS.values() if layout.side_files):
            patterns = [str(PurePosixPath(glob.escape(str(folder)), pattern)) for pattern in select(layout)]
            found = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns)) / folder
            if layout.recognises(found):
                break
    if not (_is_complete(found) if select is all_files else recognised_layout(found)):
        origin = HubOrigin.of_snapshot(found)
        listed = list(_sizes(origin, folder, token)) if origin is not None else []
        if model := _only_model(name, listed):
            return fetch(name, folder / model)
        where = f"{name}/{subfolder}" if subfolder else name
        raise CheckpointError(f"{where} cannot be loaded: {why_unreadable(listed) or 'it holds no weights'}")
    return found


def locate(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    progress: bool = True,
) -> tuple[Path, HubShards | None]:
    """As `resolve`, but weights on the Hub are not fetched if their layout can do without.

    Returns:
        The directory with all else, and the weights on the Hub; None if they are in the directory.

    Raises:
        Llama4Error: as `resolve`; or the repository holds no weights that can be loaded.
    """
    find = partial(resolve, name, revision=revision, subfolder=subfolder, token=token, progress=progress)
    directory = find(select=lambda layout: layout.side_files)
    shards = shards_on_hub(name, directory, subfolder=subfolder, token=token, progress=progress)
    layout = recognised_layout(directory)
    if shards is None or layout is None or not layout.in_shards:
        return find(), None
    if not shards.matching(layout.weight_files):
        raise CheckpointError(f"{name} cannot be loaded: {why_unreadable(shards.sizes) or 'it holds no weights'}")
    return directory, shards


def shards_on_hub(
    name: str | Path,
    directory: Path,
    *,
    subfolder: str | None = None,
    token: str | None = None,
    progress: bool = True,
) -> HubShards | None:
    """The files on the Hub beside those in a directory that `resolve` gave for a name; None if the model is not on the
    Hub, or the Hub cannot be reached."""
    origin = HubOrigin.of_snapshot(directory) if not user_path(name).is_dir() else None
    if origin is None:
        return None
    folder = _checked(subfolder)
    try:
        sizes = _sizes(origin, folder, token)
    except ValueError as error:
        logger.info("%s", error)
        return None
    return HubShards(origin, folder, sizes, token=token, progress=progress)


def _checked(subfolder: str | None) -> PurePosixPath:
    folder = PurePosixPath(subfolder or ".")
    if folder.is_absolute() or ".." in folder.parts:
        raise ArgumentError(f"subfolder is {subfolder!r}; name one inside the model's directory")
    return folder


def _only_model(name: str, files: Sequence[str]) -> str | None:
    """Of a directory's or repository's files the GGUF model, if there is one.

    Raises:
        CheckpointError: there are several.
    """
    found = models(files)
    if len(found) > 1:
        raise CheckpointError(
            f"{name} holds {len(found)} models in GGUF; name one of them", [f"{name}/{f}" for f in found]
        )
    return found[0] if found else None


def _fetch_gguf(
    repository: str, file: PurePosixPath, *, revision: str | None, token: str | None, progress: bool
) -> Path:
    """A GGUF model on the Hub in the local cache: all files of a split, and that of the vision tower beside it.

    Raises:
        Llama4Error: no such repository or file, or no way to reach it.
    """

    def fetched(*names: PurePosixPath) -> Path:
        patterns = [glob.escape(str(name)) for name in names]
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=patterns))

    with hub_errors(repository, revision), progress_bars(progress):
        found = fetched(*(file.with_name(name) for name in parts(file.name)))
    origin = HubOrigin.of_snapshot(found)
    if not (found / file).is_file():
        listed = models(_sizes(origin, PurePosixPath(), token)) if origin is not None else []
        raise CheckpointError(
            f"{repository} has no file {file}" + ("; its models in GGUF are" if listed else "; check its name"),
            [f"{repository}/{name}" for name in listed],
        )
    if origin is not None:
        with suppress(Llama4Error):  # without a network, with what is in the cache
            beside = mmproj_of(file.name, (name for name in _sizes(origin, file.parent, token) if "/" not in name))
            if beside is not None:
                with hub_errors(repository, revision), progress_bars(progress):
                    fetched(file.with_name(beside))
    return found / file


def _why_no_directory(path: Path) -> str:
    """Why a file is given in vain."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return f"it is a GGUF file by its content; name it {path.with_suffix('.gguf').name}"
    if _is_complete(path.parent):
        return f"it is a file; name the directory {path.parent}"
    why = why_unreadable([path.name])
    return why or "it is a file; name the directory that holds config.json and the weights"


def _is_complete(directory: Path) -> bool:
    layout = recognised_layout(directory)
    return layout is not None and layout.has_weights(directory)


def _sizes(origin: HubOrigin, folder: PurePosixPath, token: str | None) -> dict[str, int]:
    """The files of a repository's folder, and their bytes."""
    with hub_errors(origin.repo_id, origin.commit):
        tree = HfApi(token=token).list_repo_tree(origin.repo_id, recursive=True, revision=origin.commit)
        files = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    return {
        PurePosixPath(path).relative_to(folder).as_posix(): size
        for path, size in files.items()
        if PurePosixPath(path).is_relative_to(folder)
    }


def push(
    directory: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload a saved model as one commit, creating the repository and the branch if need be; weights of an older model
    go, a model card that is there stays.

    Args:
        directory: of the model.
        repo_id: "user/name" or "organisation/name".
        token: by default the one you logged in with.
        private: the repository must be, or is made so.
        revision: a branch, or an open pull request's "refs/pr/N"; by default "main".
        create_pr: propose the commit as a new pull request.
        commit_message: by default "Upload model".

    Returns:
        The address of the commit, or of the pull request that was made.

    Raises:
        Llama4Error: no permission, a repository that everyone can read though `private` is asked for, or the Hub cannot
            be reached.
    """
    api = HfApi(token=token)
    try:
        with progress_bars():
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise CheckpointError(
                    f"{repo_id} exists and is public; make it private in its settings, or choose another"
                )
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            has_card = api.file_exists(repo_id, MODEL_CARD, revision=revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or "Upload model",
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[MODEL_CARD] if has_card else None,
                delete_patterns=[*LAYOUTS["hf"].weight_files, INDEX_FILE],
            )
        return str(commit.pr_url if create_pr else commit.commit_url)
    except (HTTP_ERROR, OSError) as error:
        raise Llama4Error(
            f"could not upload to {repo_id}: {reason(error)}; check its name, the connection and your token "
            "(`hf auth login`)"
        ) from error
