"""The weights of a model on the Hub: headers by ranged requests, and one file at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from llama4.errors import CheckpointError
from llama4.reading import MAX_INDEX_BYTES, parse_json
from llama4.weights.hub_client import hub_errors, progress_bars
from llama4.weights.safetensors import Header, LocalShards
from llama4.weights.side_files import HubOrigin
from llama4.weights.stamps import STAMP

_FIRST_BYTES = 1 << 16
"""Of a file, asked for at once: the header of most."""
_REQUESTS = 8
"""At a time."""
_EXPERT = re.compile(r".*\.experts\.\d+\..*")
"""Key of a tensor that becomes part of a larger one, whose parts may be in two files."""


class HubShards:
    """The files of a model on the Hub at one commit. Those that are in the client's cache are read there, and stay.

    Args:
        origin: the repository and the commit.
        folder: in the repository.
        sizes: the files in it -> bytes.
        token: see `hub.resolve`.
        progress: show the client's bars, where somebody sees them.

    Attributes:
        downloads: where files are fetched to that are not in the cache. The next one takes the place of the last.
            Without it, nothing is fetched but headers.
        used: the files with the weights, once their headers were read.
        kept: how many are there at a time: one, or two where experts are apart and may be in two files.
        fetched: bytes of headers that were fetched.
    """

    def __init__(
        self,
        origin: HubOrigin,
        folder: PurePosixPath,
        sizes: dict[str, int],
        *,
        token: str | None = None,
        progress: bool = True,
    ) -> None:
        self.origin = origin
        self.sizes = sizes
        self.downloads: Path | None = None
        self.used: tuple[str, ...] = ()
        self.kept = 1
        self.fetched = 0
        self.folder = folder
        self._token = token
        self._progress = progress

    def __contains__(self, file: str) -> bool:
        return file in self.sizes

    def headers(self, files: Collection[str]) -> Iterator[Header]:
        self.used = tuple(files)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            for header in pool.map(self._header, files):
                if any(map(_EXPERT.fullmatch, header.tensors)):
                    self.kept = 2
                yield header

    def path(self, file: str) -> Path:
        if (cached := self.cached(file)) is not None:
            return cached
        assert self.downloads is not None, "these files are there to be asked for their headers"
        name = str(self.folder / file)
        wanted = self.downloads / name
        others = [path for path in self.downloads.rglob("*.safetensors") if path != wanted]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in others[: max(0, len(others) + 1 - self.kept)]:
            path.unlink()
        with hub_errors(self.origin.repo_id, self.origin.commit), progress_bars(self._progress):
            hf_hub_download(
                self.origin.repo_id, name, revision=self.origin.commit, token=self._token, local_dir=self.downloads
            )
        return wanted

    def matching(self, patterns: Collection[str]) -> dict[str, int]:
        """Files by patterns of their names, and their bytes."""
        return {file: size for file, size in self.sizes.items() if any(fnmatchcase(file, p) for p in patterns)}

    def cached(self, file: str) -> Path | None:
        """The file in the client's cache, if it is there."""
        name = str(self.folder / file)
        found = try_to_load_from_cache(self.origin.repo_id, name, revision=self.origin.commit)
        return Path(found) if isinstance(found, str) else None

    def _header(self, file: str) -> Header:
        if (cached := self.cached(file)) is not None:
            return next(LocalShards(cached.parent).headers([cached.name]))
        begin = self._read(file, 0, min(_FIRST_BYTES, self.sizes[file]))
        length = int.from_bytes(begin[:8], "little")
        where = f"{self.origin.repo_id}/{self.folder / file}"
        if not 2 <= length <= min(MAX_INDEX_BYTES, self.sizes[file] - 8):
            raise CheckpointError(f"{where} is no safetensors file, or cut short; ask for a new upload")
        if len(begin) < 8 + length:
            begin += self._read(file, len(begin), 8 + length)
        try:
            content = parse_json(begin[8 : 8 + length], where)
            stamp = content.pop("__metadata__", {}).get(STAMP)
            tensors = {key: (str(each["dtype"]), tuple(map(int, each["shape"]))) for key, each in content.items()}
            end = max((each["data_offsets"][1] for each in content.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{where} has a damaged header ({error}); ask for a new upload") from error
        if 8 + length + end != self.sizes[file]:
            raise CheckpointError(f"{where} is cut short or damaged; ask for a new upload")
        return Header(tensors, stamp)

    def _read(self, file: str, start: int, stop: int) -> bytes:
        """Some bytes of a file."""
        repo_id, commit = self.origin.repo_id, self.origin.commit
        url = hf_hub_url(repo_id, str(self.folder / file), revision=commit)
        headers = build_hf_headers(token=self._token) | {"Range": f"bytes={start}-{stop - 1}"}
        content = bytearray()
        with hub_errors(repo_id, commit), get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start  # a server that does not know ranges sends all
            for piece in response.iter_bytes():
                content += piece
                if len(content) >= skip + stop - start:
                    break
        self.fetched += len(content)
        return bytes(content[skip : skip + stop - start])
