"""Adapters on disk, as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

A Linear has `lora_A.weight` [r, in] and `lora_B.weight` [out, r] below its name. Stacked experts are written in one of
three ways, which are told apart by their keys and shapes:

| layout | keys below `experts` | gate_up_proj of [E, D, 2F] |
|---|---|---|
| `peft` | `base_layer.lora_{A,B}` of gate_up_proj, `lora_{A,B}` of down_proj | A [E r, 2F], B [D, r E], since 0.19 |
| `peft-0.18` | the same | A [E r, D], B [2F, r E] |
| `per-expert` | `{i}.{gate,up,down}_proj.lora_{A,B}` | A [r, D], B [F, r] each |

Rows of a stacked A are expert by expert; columns of a stacked B rank by rank, each with all experts.

Shapes: E experts, r rank, I inputs, O outputs, D hidden size, F expert width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from llama4.adapters.config import MAX_RANK, TARGETS, LoraConfig, target_of
from llama4.adapters.lora import STACKS, Adapter, EmbeddingLora, Lora, targets_of
from llama4.errors import ArgumentError, CheckpointError, ConfigError
from llama4.families import family_of
from llama4.families.names import NameTable
from llama4.files import user_path
from llama4.model.multimodal import Llama4Model
from llama4.patterns import Patience, compile_pattern
from llama4.reading import read_json
from llama4.weights.directory import complete_directory, write_json
from llama4.weights.safetensors import SafetensorsFiles, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin")
PREFIX = "base_model.model."
_MAX_ALPHA = 1e9
_PATIENCE = 10.0
"""Seconds that the expressions of a file may take, to be read and for all names."""
LAYOUTS = ("peft", "peft-0.18", "per-expert")

_UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "use_bdlora")),
}
"""Fields of adapter_config.json -> the only value, besides none, with which the adapter is what this file reads."""
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How values of `init_lora_weights` begin with which PEFT takes the first A and B out of the base's weights."""
_COPIES = ("embed_tokens.weight", "embed_tokens.base_layer.weight", "lm_head.weight", "lm_head.base_layer.weight")
_PART = re.compile(r"(?P<module>.+)\.lora_(?:(?P<embedding>embedding_)?(?P<part>[AB]))(?:\.weight)?")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<matrix>gate|up|down)_proj")


# -- writing -----------------------------------------------------------------------------------------------------------


def save_adapter(
    adapter: Adapter, model: Llama4Model, directory: str | Path, *, layout: str = "peft", base: str = ""
) -> None:
    """Write an adapter; `directory` appears complete, or what it held stays.

    Args:
        model: what it is for.
        layout: of stacked experts, see above: `peft` is what the newest PEFT loads on transformers' Llama 4;
            `peft-0.18` and `per-expert` are what vLLM takes.
        base: name of the model, for the file.

    Raises:
        ArgumentError: an unknown layout.
        DiskError: the directory cannot be written.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"adapter format {layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
    with complete_directory(directory, older=ADAPTER_FILES) as partial:
        write_adapter(adapter, model, partial, layout=layout, base=base)


def write_adapter(adapter: Adapter, model: Llama4Model, directory: Path, *, layout: str, base: str) -> None:
    """Write the two files into a directory that is there."""
    table = family_of(model.config).module_names(model.config)
    write_json(directory / CONFIG_FILE, _config(adapter, table, layout, base))
    write_tensors(directory / WEIGHTS_FILE, _tensors(adapter, table, layout))


def _config(adapter: Adapter, table: NameTable, layout: str, base: str) -> dict[str, Any]:
    config = adapter.config
    stacks = sorted({name.rpartition(".")[2] for name, lora in adapter.items() if lora.a.ndim == 3})
    modules = [_file_name(table, name) for name, lora in adapter.items() if lora.a.ndim == 2]
    if stacks and layout == "per-expert":
        modules.append(r"(?:.+\.)?experts\.\d+\.(?:gate|up|down)_proj")
        stacks = []
    power = 0.5 if config.rslora else 1.0
    ranks = {_file_name(table, name): lora.rank for name, lora in adapter.items()}
    alphas = {_file_name(table, name): lora.scale * lora.rank**power for name, lora in adapter.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout if not stacks else 0.0,
        "use_rslora": config.rslora,
        "bias": "none",
        "target_modules": _pattern(modules) if modules else [],
        "target_parameters": [f"feed_forward.experts.{stack}" for stack in stacks] or None,
        "rank_pattern": _exceptions(ranks, config.rank),
        "alpha_pattern": _exceptions(alphas, config.alpha),
        "inference_mode": True,
    }


def _pattern(modules: list[str]) -> str:
    """A regular expression of all modules, those of all layers as one."""
    layers = (re.escape(name) if "\\d" not in name else name for name in modules)
    return "|".join(dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", name) for name in layers))


def _exceptions(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Those that are not the usual one, under the ends of names, which PEFT matches, where all layers agree."""
    ends = {name: re.sub(r".*\.layers\.\d+\.", "", name) for name in values}
    of_end: dict[str, set[float]] = {}
    for name, value in values.items():
        of_end.setdefault(ends[name], set()).add(value)
    names = {name: ends[name] if len(of_end[ends[name]]) == 1 else name for name in values}
    return {names[name]: value for name, value in values.items() if not math.isclose(value, usual)}


def _file_name(table: NameTable, name: str) -> str:
    return table.to_file(name) or name


def _tensors(adapter: Adapter, table: NameTable, layout: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with_both = {name.rpartition(".")[0] for name in adapter.names if name.endswith("experts.gate_up_proj")}
    for name, lora in adapter.items():
        a, b, path = lora.a.detach().cpu(), lora.b.detach().cpu(), name.rpartition(".")[0]
        key = PREFIX + _file_name(table, name)
        if lora.a.ndim == 2:
            transform = table.transform(f"{name}.weight")
            b = transform.to_file(b) if transform is not None else b
            embedding = isinstance(lora, EmbeddingLora)
            ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{key}.{ends[0]}": a, f"{key}.{ends[1]}": b}
            continue
        experts = key.rpartition(".")[0]
        if layout == "per-expert":
            tensors |= _per_expert(experts, name.endswith("down_proj"), a, b)
            continue
        inner = name.endswith("gate_up_proj") and f"{path}.down_proj" in adapter.names and path in with_both
        wrapper = f"{experts}.base_layer" if inner else experts
        if layout == "peft":
            a, b = b.mT, a.mT  # x (W + B A), where the other form has x (W + (B A)^T)
        tensors[f"{wrapper}.lora_A.weight"] = a.flatten(0, 1).contiguous()
        tensors[f"{wrapper}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    return tensors


def _per_expert(experts: str, is_down: bool, a_ErI: Tensor, b_EOr: Tensor) -> dict[str, Tensor]:
    tensors = {}
    for i, (a_rI, b_Or) in enumerate(zip(a_ErI, b_EOr, strict=True)):
        matrices = {"down": b_Or} if is_down else dict(zip(("gate", "up"), b_Or.chunk(2), strict=True))
        for matrix, some_Or in matrices.items():
            tensors[f"{experts}.{i}.{matrix}_proj.lora_A.weight"] = a_rI.clone()
            tensors[f"{experts}.{i}.{matrix}_proj.lora_B.weight"] = some_Or.clone()
    return tensors


# -- reading -----------------------------------------------------------------------------------------------------------


def load_adapter(directory: str | Path, model: Llama4Model) -> Adapter:
    """Read an adapter in any of the layouts, on the model's device, in float32.

    Raises:
        ConfigError: no adapter_config.json, or one of an adapter that is no LoRA, or of a kind that is not computed.
        CheckpointError: no weights, damaged ones, or such as do not fit the model.
    """
    directory = user_path(directory)
    content = read_config(directory)
    scale_of = _scales(directory / CONFIG_FILE, content)
    files = SafetensorsFiles(directory, {WEIGHTS_FILE: None})
    keys = [key.removeprefix(PREFIX) for key in files.names()]
    table = family_of(model.config).names(model.config, keys if any(".layers." in key for key in keys) else None)
    text = model.config.text
    copies = [(rows, text.hidden_size) for rows in (text.vocab_size, text.num_embeddings)]
    pairs, unexpected = _pairs(files, copies)
    shapes = targets_of(model)
    loras: dict[str, Lora] = {}
    for name, (a, b, rank) in _matrices(pairs, table, shapes, content, unexpected).items():
        if a.shape[-2] > 2 * MAX_RANK:  # of gate and up in one
            raise CheckpointError(f"{directory} has rank {a.shape[-2]} for {name}, and may have {MAX_RANK}")
        kind = EmbeddingLora if name.endswith("embed_tokens") else Lora
        loras[name] = kind(shapes[name], a.shape[-2], scale_of(_file_name(table, name), rank))
        with torch.no_grad():
            loras[name].a.copy_(a)
            loras[name].b.copy_(b)
    if unexpected or not loras:
        raise CheckpointError(
            f"{directory} does not fit this model: it changes what the model does not have, or in another shape",
            unexpected=sorted(unexpected),
        )
    adapter = Adapter(_read_config(content, loras), loras).to(model.device)
    return adapter.eval().requires_grad_(False)


def read_config(directory: Path) -> dict[str, Any]:
    """What an adapter's configuration says. Whether its weights fit is known once they are read, beside the model.

    Raises:
        ConfigError, CheckpointError: see `load_adapter`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; an adapter is one, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (directory / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{directory} holds no {CONFIG_FILE}, and so no adapter; a run of `llama4 finetune` that was stopped "
            "writes one when it goes on to its end (--resume)"
        )
    content = read_json(directory / CONFIG_FILE)
    _check_config(directory / CONFIG_FILE, content)
    if not (directory / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{directory} holds no {WEIGHTS_FILE}; write the adapter with PEFT's save_pretrained")
    return content


def _check_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: an adapter that is no LoRA, of a kind that is not computed, or fields of other types than PEFT's.
    """
    if content.get("peft_type") != "LORA":
        raise ConfigError(f"{path} has peft_type {content.get('peft_type')!r:.80}; this library computes LORA")
    for field, known in _UNSUPPORTED.items():
        if content.get(field) not in (None, known, []):
            raise ConfigError(
                f"{path} has {field} {content[field]!r:.80}, which is not computed; merge it with PEFT first"
            )
    if str(first := content.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{path} has init_lora_weights {first!r:.80}: the adapter is for weights that PEFT changes when it is "
            "loaded; write it with path_initial_model_for_weight_conversion, or merge it with PEFT first"
        )
    if not isinstance(content.get("use_rslora"), bool | None):
        raise ConfigError(f"{path} has use_rslora {content['use_rslora']!r:.80}; it must be true or false")
    alphas, ranks = (content.get(f"{name}_pattern") or {} for name in ("alpha", "rank"))
    if not isinstance(alphas, dict) or not isinstance(ranks, dict):
        raise ConfigError(f"{path} has rank_pattern or alpha_pattern that are no objects of names; write them again")
    for value in (content.get("lora_alpha", 8), *alphas.values()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MAX_ALPHA:
            raise ConfigError(f"{path} has lora_alpha or alpha_pattern {value!r:.80}; it must be a number above 0")
    stacks = content.get("target_parameters") or []
    if not isinstance(stacks, list) or not all(isinstance(name, str) for name in stacks):
        raise ConfigError(f"{path} has target_parameters {stacks!r:.80}; it must be a list of names")


def _scales(path: Path, content: Mapping[str, Any]) -> Callable[[str, int], float]:
    """Name in the file and rank -> scale, by the first key of alpha_pattern that fits the end of the name, as in PEFT.

    Raises:
        ConfigError: a key that is no regular expression, or one that takes too long.
    """
    alpha, root, patience = content.get("lora_alpha", 8), content.get("use_rslora"), Patience(_PATIENCE)
    alphas: list[tuple[str | regex.Pattern[str], float]] = []

    def too_slow(key: str) -> ConfigError:
        return ConfigError(
            f"{path} has {key!r:.80} in alpha_pattern, which takes more than {_PATIENCE:g} s; write names"
        )

    for key, value in (content.get("alpha_pattern") or {}).items():
        try:
            patience.left()
            alphas.append((_name_or_pattern(key), value))
        except TimeoutError:
            raise too_slow(key) from None
        except ValueError as error:
            raise ConfigError(
                f"{path} has a key in alpha_pattern that cannot be used: {error}; write it again"
            ) from None

    def fits(key: str | regex.Pattern[str], name: str) -> bool:
        try:
            left = patience.left()
            if isinstance(key, str):
                return name == key or name.endswith(f".{key}")
            return key.match(name, timeout=left) is not None
        except TimeoutError:
            raise too_slow(key if isinstance(key, str) else key.pattern) from None

    def scale(name: str, rank: int) -> float:
        own = next((value for key, value in alphas if fits(key, name)), alpha)
        return float(own) / (math.sqrt(rank) if root else rank)

    return scale


def _name_or_pattern(key: str) -> str | regex.Pattern[str]:
    """A key of alpha_pattern: mostly a name, or the end of one, which is not run as an expression."""
    return key if re.fullmatch(r"[\w.]+", key) else compile_pattern(rf"(.*\.)?({key})$")


def _read_config(content: Mapping[str, Any], loras: Mapping[str, Lora]) -> LoraConfig:
    ranks = [lora.rank for lora in loras.values()]
    rank = content.get("r")
    targets = {target for name in loras if (target := target_of(name)) is not None}
    return LoraConfig(
        rank=rank if isinstance(rank, int) and rank in ranks else max(set(ranks), key=ranks.count),
        alpha=float(content.get("lora_alpha") or 8),
        targets=tuple(target for target in TARGETS if target in targets),
        rslora=bool(content.get("use_rslora")),
    )


def _pairs(
    files: SafetensorsFiles, copies: Collection[tuple[int, ...]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """A and B below the name of each module in the file, and keys that are neither, nor PEFT's copies of embeddings or
    head; one in another shape than `copies` is of other tokens than the model's."""
    parts: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key in files.names():
        match = _PART.fullmatch(key.removeprefix(PREFIX))
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = files.read(key)
        elif not key.endswith(_COPIES) or files.spec(key).shape not in copies:
            unexpected.append(key)
    pairs = {}
    for module, both in parts.items():
        if both.keys() != {"A", "B"} or any(tensor.ndim != 2 or not tensor.numel() for tensor in both.values()):
            unexpected.append(module)
        else:
            pairs[module] = both["A"], both["B"]
    return pairs, unexpected


Shapes = Mapping[str, tuple[int, ...]]
Pair = tuple[Tensor, Tensor]
Ranked = tuple[Tensor, Tensor, int]
"""A and B, and the rank that their scale is of."""


def _matrices(
    pairs: Mapping[str, Pair], table: NameTable, shapes: Shapes, content: Mapping[str, Any], unexpected: list[str]
) -> dict[str, Ranked]:
    """Names of the model -> A [.., r, I] and B [.., O, r]; what fits nothing is added to `unexpected`."""
    found: dict[str, Ranked] = {}
    wrapped: dict[str, dict[bool, Pair]] = {}
    single: dict[str, dict[tuple[str, int], Pair]] = {}
    for module, (a, b) in pairs.items():
        if match := _EXPERT.fullmatch(module):
            experts = single.setdefault(table.to_model(match["experts"]) or match["experts"], {})
            experts[match["matrix"], int(match["expert"])] = a, b
            continue
        name = table.to_model(module) or module
        path = name.removesuffix(".base_layer")
        if path.endswith(".experts"):
            wrapped.setdefault(path, {})[name != path] = a, b
        elif shapes.get(name) == (b.shape[0], a.shape[1]) and a.shape[0] == b.shape[1]:
            transform = table.transform(f"{name}.weight")
            found[name] = a, b if transform is None else transform.to_model(b), len(a)
        else:
            unexpected.append(module)
    for path, both in wrapped.items():
        stacks = _unwrapped(path, both, shapes, content)
        if not stacks:
            unexpected.append(path)
        found |= stacks
    for path, experts in single.items():
        stacks = _stacked(path, experts, shapes)
        if not stacks:
            unexpected.append(path)
        found |= stacks
    return found


def _unwrapped(path: str, both: Mapping[bool, Pair], shapes: Shapes, content: Mapping[str, Any]) -> dict[str, Ranked]:
    """PEFT's stacked experts, in the older or the newer form; nothing if they fit neither. The inner wrapper is mostly
    gate_up_proj."""
    names = [f"{path}.{stack}" for stack in STACKS]
    if len(both) == 2:
        orders = [(True, False), (False, True)]
        candidates = [dict(zip(names, (both[first], both[second]), strict=True)) for first, second in orders]
    else:
        given = [str(entry).rpartition(".")[2] for entry in content.get("target_parameters") or STACKS]
        candidates = [{f"{path}.{stack}": both[False]} for stack in given if stack in STACKS and False in both]
    forms = [_newer_form, _older_form]
    if _version(content) < (0, 19):
        forms.reverse()  # where both fit
    for form in forms:
        for candidate in candidates:
            stacks = {name: form(*pair, shapes[name]) for name, pair in candidate.items() if name in shapes}
            if len(stacks) == len(candidate) and all(pair is not None for pair in stacks.values()):
                return {name: (*pair, pair[0].shape[1]) for name, pair in stacks.items() if pair is not None}
    return {}


def _version(content: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the PEFT that wrote; files of this library, and of those too new to be doubted, count as the newest."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(content.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) if match else (99,)


def _older_form(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Pair | None:
    """[E r, I] and [O, r E]."""
    E, O, I = shape  # noqa: E741
    rank = a.shape[0] // E
    if a.shape != (E * rank, I) or b.shape != (O, rank * E) or not rank:
        return None
    return a.view(E, rank, I), b.view(O, rank, E).permute(2, 0, 1)


def _newer_form(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Pair | None:
    """[E r, O] and [I, r E]."""
    E, O, I = shape  # noqa: E741
    pair = _older_form(a, b, (E, I, O))
    return None if pair is None else (pair[1].mT, pair[0].mT)


def _stacked(path: str, experts: Mapping[tuple[str, int], Pair], shapes: Shapes) -> dict[str, Ranked]:
    """Experts that have A and B each; nothing if they do not fit. Where gate and up have an A each, theirs are one of
    twice the rank."""
    names = {matrix for matrix, _ in experts}
    E = shapes.get(f"{path}.down_proj", (0,))[0]
    if {*experts} != {(matrix, i) for matrix in names for i in range(E)}:
        return {}
    found: dict[str, Ranked] = {}
    try:
        stacks: dict[str, Pair] = {}
        for matrix in names:
            a, b = (torch.stack([experts[matrix, i][part] for i in range(E)]) for part in (0, 1))
            stacks[matrix] = a, b
        if "down" in stacks:
            a, b = stacks["down"]
            found[f"{path}.down_proj"] = a, b, a.shape[1]
        if "gate" in stacks or "up" in stacks:
            width = shapes[f"{path}.gate_up_proj"][1] // 2
            found[f"{path}.gate_up_proj"] = _side_by_side(stacks.get("gate"), stacks.get("up"), width)
    except RuntimeError:  # of different shapes
        return {}
    fits = all(
        (len(a), b.shape[1], a.shape[2]) == shapes[name] and a.shape[1] == b.shape[2]
        for name, (a, b, _) in found.items()
    )
    return found if fits else {}


def _side_by_side(gate: Pair | None, up: Pair | None, width: int) -> Ranked:
    """Gate and up as one matrix: with the A of both, where that is the same, else with the A of one below that of the
    other, which is of twice the rank.

    Raises:
        RuntimeError: their A are of different shapes.
    """
    halves = [half for half in (gate, up) if half is not None]
    rank = halves[0][0].shape[1]
    if gate is not None and up is not None and torch.equal(gate[0], up[0]):
        return gate[0], torch.cat([gate[1], up[1]], dim=1), rank
    a_2EFr = torch.stack([a for a, _ in halves])
    columns = []
    for half in (gate, up):
        if half is not None:
            b_EFr = half[1]
            empty = b_EFr.new_zeros(len(b_EFr), width, b_EFr.shape[2])
            columns.append(torch.cat([b_EFr, empty] if half is gate else [empty, b_EFr], dim=1))
    return torch.cat([*a_2EFr], dim=1), torch.cat(columns, dim=2), rank
