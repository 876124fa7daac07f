"""Checkpoints from one layout to another, or quantized, without a model: tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage

import torch

from llama4.config import Llama4Config
from llama4.errors import ArgumentError, CheckpointError
from llama4.families import family_of
from llama4.files import real_path, writes
from llama4.ops.openmp import passive_waiting
from llama4.quantization.int4 import Int4
from llama4.quantization.modules import swap_modules
from llama4.quantization.schemes import CALIBRATED
from llama4.text.tokenizer import Tokenizer
from llama4.units import bytes_text
from llama4.version import __version__
from llama4.weights.calibrating import calibrated, read_texts
from llama4.weights.checkpoint import WRITTEN, open_checkpoint, read_side_files
from llama4.weights.directory import DOWNLOADS, STEPS, complete_directory, work_of
from llama4.weights.gguf.files import is_gguf
from llama4.weights.gguf.types import FILE_TYPES
from llama4.weights.gguf.write import differences, write_gguf
from llama4.weights.hub_shards import HubShards
from llama4.weights.huggingface import FLOATS
from llama4.weights.layout import MAX_SHARD_BYTES, WriteOptions
from llama4.weights.load import match_names
from llama4.weights.locked_folder import locked_folder
from llama4.weights.ordered import without_orders
from llama4.weights.quantizing import quantized
from llama4.weights.safetensors import stamp_of
from llama4.weights.save import MODEL_FILES, TEXT_FILES
from llama4.weights.source import Copied, Source
from llama4.weights.stamps import stamp_for
from llama4.weights.verify import verify

logger = logging.getLogger(__name__)

_FILES = (*MODEL_FILES, *TEXT_FILES)


@passive_waiting()
def convert(source: str | Path, target: str | Path, layout: str, *, ranks: int = 1, progress: bool = True) -> None:
    """Write a checkpoint in another layout. Before it gets its name it is read back and compared, see `verify`.

    Args:
        source: a directory in any layout.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        layout: a key of `checkpoint.WRITTEN`: "hf" (one shard at a time is in memory) or "meta" (one rank at a time).
        ranks: files of Meta's layout, one per GPU of Meta's runtime.
        progress: show a bar, where somebody sees it.

    Raises:
        Llama4Error: an unknown layout, a target that is in use, a source that is damaged or cannot be expressed in the
            other layout; or one of its classes `ConfigError` and `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    if layout not in WRITTEN:
        raise ArgumentError(f"layout {layout!r} is not written; choose one of {', '.join(WRITTEN)}")
    _check_other(source, target)
    with complete_directory(target, must_be_free=True, older=_FILES) as partial:
        config, weights, tokenizer = _open(source)
        side_files = read_side_files(source)
        options = WriteOptions(side_files, real_path(target).name, ranks=ranks, progress=progress)
        WRITTEN[layout].write(weights, config, tokenizer, partial, options)
        verify(partial, weights, config, tokenizer, progress=progress)


@passive_waiting()
def convert_to_gguf(
    source: str | Path, target: str | Path, type_: str = "bf16", *, for_llama_cpp: bool = False, progress: bool = True
) -> tuple[Path, ...]:
    """Write a checkpoint as a GGUF file, which llama.cpp, Ollama, LM Studio and llamafile read, and its vision tower as
    `mmproj-NAME` beside it. Both appear under their names when they are complete, the model last.

    Args:
        source: a directory in any layout, not quantized, or a GGUF file.
        target: the file.
        type_: of the weights, a key of `gguf.types.FILE_TYPES`; vectors and routers are in float32.
        for_llama_cpp: refuse a model that llama.cpp would compute otherwise, instead of logging how.

    Returns:
        The files: that of the model, and that of its vision tower if it has one.

    Raises:
        Llama4Error: an unknown type, a model or tokenizer that GGUF has no form for, or a file that is there.
        DiskError: the files cannot be written.
    """
    source, target = Path(source), Path(target)
    if type_ not in FILE_TYPES:
        raise ArgumentError(f"type {type_!r} is not written; choose one of {', '.join(FILE_TYPES)}")
    if not is_gguf(target):
        raise ArgumentError(f"{target} is no name of a GGUF file; let it end in .gguf")
    work = work_of(target)
    was_killed = work.exists()  # or is at work, and will be told below
    with writes(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(work, f"writing {target}", wait=False):
            config, weights, tokenizer = _open(source, dtype=torch.float32)
            beside = target.with_name(f"mmproj-{target.name}")
            for path in (target, *([beside] if config.vision is not None and not was_killed else [])):
                if path.exists():
                    raise CheckpointError(f"{path} exists already; choose another name, or remove it first")
            others = "; ".join(differences(config))
            if others and for_llama_cpp:
                raise CheckpointError(
                    f"llama.cpp would compute this model otherwise, as it assumes {others}; leave out --for llama.cpp "
                    "to write it for llama4 alone"
                )
            if others:
                logger.warning("llama.cpp would compute %s otherwise than llama4: it assumes %s", target, others)
            try:
                write_gguf(
                    weights, config, tokenizer, target, FILE_TYPES[type_], read_side_files(source), progress=progress
                )
            except BaseException:
                if config.vision is not None:
                    beside.unlink(missing_ok=True)
                raise
    return (target,) if config.vision is None else (target, beside)


@passive_waiting()
def quantize(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    head: bool = False,
    calibration: str | None = None,
    shards: HubShards | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
    say: Callable[[str], object] = logger.info,
) -> None:
    """Write a quantized checkpoint in the compressed-tensors format, which vLLM and transformers read as well.

    One shard and one tensor are in memory at a time. Interrupted, even killed, it continues after the last complete
    shard when called again, and the result is the same, bit by bit.

    Args:
        source: a directory in any layout, not quantized.
        target: appears complete, under its name, when all is done; it must not hold anything yet.
        scheme: a key of `llama4.quantization.schemes.SCHEMES`, or of its `CALIBRATED`.
        head: quantize the head, too.
        calibration: texts, for the schemes that take them; see `calibrating`. Interrupted, these continue after the
            last complete layer.
        shards: the source's weights, if they are on the Hub (see `hub.locate`). They are fetched file by file, and
            deleted when they have been read, so that the disk needs one of them beyond the result.
        max_shard_bytes: more than this and the weights are split.
        progress: show a bar, where somebody sees it.
        say: called, before anything is fetched, with the room that it takes.

    Raises:
        Llama4Error: an unknown scheme, a target that is in use, a source that is damaged or quantized already, or a
            disk without the room; or one of its classes `ConfigError` and `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    _check_other(source, target)
    if (scheme in CALIBRATED) != (calibration is not None):
        raise ArgumentError(f"texts for calibration go with the schemes {', '.join(CALIBRATED)}, and with no others")
    assert shards is None or calibration is None, "layers are read more than once"
    if shards is None:
        files = [source] if source.is_file() else sorted(path for path in source.glob("*") if path.is_file())
        of = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    else:
        of = [[shards.origin.repo_id, shards.origin.commit, str(shards.folder)]]
    how = [scheme, head, max_shard_bytes, *([calibration] if calibration is not None else [])]
    stamp = stamp_for({"llama4": __version__, "scheme": how, "source": of})

    def is_done(path: Path) -> bool:
        return path.suffix == ".safetensors" and stamp_of(path) == stamp

    with complete_directory(target, must_be_free=True, older=_FILES, keep=is_done) as partial:
        config, weights, tokenizer = _open(source, shards)
        plain = quantized(weights, CALIBRATED.get(scheme, scheme), head=head, parts=family_of(config).quantizable)
        if calibration is not None:
            texts, folder = read_texts(calibration, tokenizer, config), work_of(target) / STEPS
            plan = {name: format for name, format in plain.plan.items() if isinstance(format, Int4)}
            weights = calibrated(weights, config, plan, texts, folder, stamp, say=say, progress=progress)
        else:
            weights = plain
        if shards is not None:
            _check_room(shards, weights, target, say)
            shards.downloads = work_of(target) / DOWNLOADS
            weights = Copied(weights)
        options = WriteOptions(
            read_side_files(source),
            real_path(target).name,
            max_shard_bytes=max_shard_bytes,
            stamp=stamp,
            progress=progress,
        )
        WRITTEN["hf"].write(weights, config, tokenizer, partial, options)


def _check_room(shards: HubShards, result: Source, target: Path, say: Callable[[str], object]) -> None:
    """Say what quantizing from the Hub takes.

    Raises:
        CheckpointError: the disk does not have it.
    """
    missing = sorted(shards.sizes[file] for file in shards.used if shards.cached(file) is None)
    size, at_once = sum(result.spec(name).nbytes for name in result.names()), sum(missing[-shards.kept :])
    place, work = next(folder for folder in real_path(target).parents if folder.is_dir()), work_of(target)
    done = sum(path.stat().st_size for path in work.rglob("*/*") if path.is_file())
    free = disk_usage(place).free + done
    say(
        f"{len(missing)} of {len(shards.used)} files, {bytes_text(sum(missing))}, come from the Hub, at most "
        f"{bytes_text(at_once)} at a time; with the result, {bytes_text(size)}, that takes "
        f"{bytes_text(size + at_once)} of the {bytes_text(free)} that {place} has"
    )
    if free < size + at_once:
        raise CheckpointError(
            f"{place} has {bytes_text(free)}, and {bytes_text(size + at_once)} are needed: free some, or choose "
            "another directory"
        )


def _check_other(source: Path, target: Path) -> None:
    if real_path(source) == real_path(target):
        raise CheckpointError(f"{target} is the source itself; choose a new directory")


def _open(
    source: Path, shards: HubShards | None = None, dtype: torch.dtype | None = None
) -> tuple[Llama4Config, Source, Tokenizer | None]:
    """A complete checkpoint; what is dequantized is in this dtype, by default the checkpoint's own."""
    config, weights = open_checkpoint(source, shards, dtype=dtype)
    for note in weights.notes:
        logger.warning("%s: %s", source, note)
    family = family_of(config)
    with torch.device("meta"):
        model = family.build(config)
    swap_modules(model, weights.plan)
    match_names(model, weights)
    weights = without_orders(weights, dtype or FLOATS.get(config.dtype, torch.bfloat16))
    return config, weights, family.load_tokenizer(source, config)
