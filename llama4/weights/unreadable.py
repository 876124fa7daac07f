"""Why a directory, a repository or its weights cannot be loaded, and what to do."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from llama4.config import CONFIG_FILE
from llama4.errors import CheckpointError
from llama4.weights import modelopt
from llama4.weights.meta.params import PARAMS_FILE, RANK_FILES
from llama4.weights.safetensors import INDEX_FILE, SINGLE_FILE
from llama4.weights.source import Source

_OTHERS = "take the safetensors of the same model"
_FOREIGN = {
    "*-?????-of-?????.gguf": "it holds some files of a GGUF model, and not the first; fetch all of them",
    "*.gguf": "it holds a vision tower in GGUF, and not the model that belongs to it; fetch that, too",
    "adapter_config.json": "it is an adapter for the model that adapter_config.json names; merge it into that model, "
    "with PEFT's merge_and_unload, and save the result",
    "model_index.json": "it is a pipeline of diffusers, which makes pictures, and no language model",
    "*.incomplete": "its download is not complete; fetch it again",
    "*.onnx": f"its weights are ONNX; {_OTHERS}",
    "onnx/*.onnx": f"its weights are ONNX; {_OTHERS}",
    "tf_model.h5": f"its weights are TensorFlow's; {_OTHERS}",
    "flax_model.msgpack": f"its weights are Flax's; {_OTHERS}",
    "*.safetensors": f"its weights are neither in {SINGLE_FILE} nor in shards that an {INDEX_FILE} names; fetch the "
    "whole directory again",
}
"""Files that tell what a directory is, if it has no weights that are read."""
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_OTHER_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "MLX",
    "quanto": "Quanto",
    "quark": "AMD's Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""`quant_method` -> name, of those that are not read."""
_PARTS = {
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or ModelOpt",
    ".weight_scale_inv": "FP8 in blocks",
    "_proj_weight_scale": "ModelOpt",
    "_proj_scale": "FBGEMM",
    "_proj_blocks": "MXFP4",
    ".absmax": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".scales": "MLX",
}
"""How keys of quantized weights end -> by what these are quantized."""

_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024


def why_unreadable(files: Collection[str]) -> str | None:
    """Why a directory with these files, whose weights are in none of the layouts, holds no model that can be loaded,
    and what to do; None if the files do not tell."""
    if not files:
        return "it is empty; fetch the model again"
    if weights := [file for file in (SINGLE_FILE, INDEX_FILE) if file in files]:
        return None if CONFIG_FILE in files else f"{CONFIG_FILE} does not stand beside {weights[0]}; fetch it, too"
    here = [file for file in files if "/" not in file]
    models = (f"/{CONFIG_FILE}", f"/{PARAMS_FILE}")
    folders = sorted({str(PurePosixPath(file).parent) for file in files if file.endswith(models)})
    reasons = [reason for pattern, reason in _FOREIGN.items() if _match(files, pattern)][:1]
    if not reasons and not folders and (elsewhere := fnmatch.filter(files, "*/*.gguf")):
        reasons.append(f"its weights are GGUF in a folder; name the file, such as {elsewhere[0]}, behind its own name")
    if PARAMS_FILE not in here and (meta := fnmatch.filter(here, RANK_FILES)):
        reasons.append(f"{PARAMS_FILE} does not stand beside Meta's {meta[0]}; fetch it, too")
    elif pickles := [file for file in here if file.endswith(_PICKLES) and file != "training_args.bin"]:
        more = ", ..." if len(pickles) > 1 else ""
        reasons.append(
            f"its weights are pickles ({pickles[0]}{more}), which can run code when they are opened; take its "
            "safetensors, which the Hub's space safetensors/convert offers as a pull request (revision='refs/pr/N'), "
            "or save it with transformers, whose save_pretrained writes them"
        )
    if folders:
        names = ", ".join(map(repr, folders[:8])) + (", ..." if len(folders) > 8 else "")
        reasons.append(
            f"there {'are models' if len(folders) > 1 else 'is a model'} in {names}: name it with "
            f"subfolder={folders[0]!r} (--subfolder {folders[0]})"
        )
    return "; ".join(reasons) or None


def _match(files: Collection[str], pattern: str) -> list[str]:
    return [file for file in fnmatch.filter(files, pattern) if file.count("/") == pattern.count("/")]


def files_in(directory: Path) -> list[str]:
    """Files in a directory and in its folders, three levels deep."""
    found = (path for pattern in ("*", "*/*", "*/*/*") for path in directory.glob(pattern))
    return [path.relative_to(directory).as_posix() for path in found if path.is_file()]


def check_fetched(paths: Iterable[Path]) -> None:
    """See that files are there themselves and not what Git has in their place until they are fetched.

    Raises:
        CheckpointError: pointers of Git LFS; with how to fetch what they point to.
    """
    if pointers := sorted({path for path in paths if path.is_file() and _is_pointer(path)}):
        raise CheckpointError(
            f"{pointers[0].parent} holds pointers of Git LFS in place of files; run `git lfs pull` there, or fetch the "
            "model with `hf download`",
            [path.name for path in pointers],
        )


def unread_method(directory: Path, content: Mapping[str, Any], known: Iterable[str]) -> CheckpointError:
    """The error for a `quantization_config` of a method that is not known."""
    name = content.get("quant_method")
    if name is not None:
        by = f"{_OTHER_METHODS[name]} (quant_method {name!r})" if name in _OTHER_METHODS else f"quant_method {name!r}"
    elif {"bits", "group_size"} <= content.keys():
        by = f"MLX (bits {content['bits']!r}, group_size {content['group_size']!r} and no quant_method)"
    else:
        by = "a quant_method that it does not name"
    return CheckpointError(
        f"{directory / CONFIG_FILE} says that its weights are quantized by {by}, which this library does not read; "
        f"take the model in the format of {', '.join(map(repr, known))}, or in bf16, which quantization='int4' makes "
        "small while it is loaded"
    )


def check_unquantized(directory: Path, files: Source) -> None:
    """See that weights of which no configuration says so are not quantized all the same.

    Raises:
        CheckpointError: they are.
    """
    for key in files.names():
        if by := next((by for part, by in _PARTS.items() if key.endswith(part)), None):
            raise CheckpointError(
                f"{files.origin(key)} is of weights that are quantized ({by}), but {directory / CONFIG_FILE} has no "
                f"quantization_config; fetch {CONFIG_FILE} again, and {modelopt.CONFIG_FILE} if there is one"
            )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > _MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS
