"""Meta's own checkpoints: `params.json` and one `consolidated.NN.pth` per model-parallel rank; where routed experts are
FP8, their scales are in `fp8_scales_N.pt` beside it.

A rank holds a slice of most tensors, under names and in shapes of its own. `pieces` says where each parameter of ours
lies in them; reading and writing both follow that table. Meta's names appear in this file alone.
"""

from __future__ import annotations

import codecs
import io
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.quantization.schemes import Plan
from llama4.weights import memory
from llama4.weights.source import Source

RANK_FILE = "consolidated.{:02d}.pth"
SCALES_FILE = "fp8_scales_{}.pt"
_RANK_FILES = re.compile(r"consolidated\.(\d\d)\.pth")
_DROPPED = re.compile(r"rope\.freqs|freqs?_cis|.*_extra_state|.*gate_stats_3E|.*expert_activation_DE")
"""Keys that hold no weights of the model: tables, states of training and its statistics."""


@dataclass(frozen=True)
class Piece:
    """Where one of our tensors, or an equal part of its last dimension, lies.

    Attributes:
        key: Meta's name.
        join: our dimension that the ranks divide among them; None if each has all of it.
        share: begin, end and whole of the rows that belong to us; others of the same key hold the rest.
        experts: E where Meta flattens [E, a, b] to [E * a, b].
        transpose: whether Meta has it the other way round.
    """

    key: str
    join: int | None = None
    share: tuple[int, int, int] = (0, 1, 1)
    experts: int | None = None
    transpose: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Our part of what a rank holds, as a view."""
        if self.experts is not None:
            tensor = tensor.unflatten(0, (self.experts, -1))
        begin, end, whole = self.share
        if whole > 1:
            rows = tensor.shape[0] // whole
            tensor = tensor[begin * rows : end * rows]
        return tensor.mT if self.transpose else tensor

    def slice(self, ours: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank gets of our tensor, in Meta's shape: the inverse of `of` and of joining."""
        if self.join is not None:
            ours = ours.chunk(ranks, dim=self.join)[rank]
        ours = ours.mT if self.transpose else ours
        return ours.flatten(0, 1) if self.experts is not None else ours


def pieces(config: Llama4Config) -> dict[str, tuple[Piece, ...]]:
    """Every parameter of ours -> its pieces, one behind the other along the last dimension."""
    text, vision = config.text, config.vision
    H, K, E = text.num_attention_heads, text.num_key_value_heads, text.num_local_experts
    table: dict[str, tuple[Piece, ...]] = {
        "language_model.model.embed_tokens.weight": (Piece("tok_embeddings.weight", 0),),
        "language_model.model.norm.weight": (Piece("norm.weight"),),
        "language_model.lm_head.weight": (Piece("output.weight", 0),),
    }
    for i in range(text.num_hidden_layers):
        ours, theirs = f"language_model.model.layers.{i}", f"layers.{i}"
        attention, ffn = f"{theirs}.attention", f"{theirs}.feed_forward"
        table |= {
            f"{ours}.self_attn.q_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (0, H, H + 2 * K)),),
            f"{ours}.self_attn.k_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (H, H + K, H + 2 * K)),),
            f"{ours}.self_attn.v_proj.weight": (Piece(f"{attention}.wqkv.weight", 0, (H + K, H + 2 * K, H + 2 * K)),),
            f"{ours}.self_attn.o_proj.weight": (Piece(f"{attention}.wo.weight", 1),),
            f"{ours}.input_layernorm.weight": (Piece(f"{attention}.wqkv.layer_norm_weight"),),
        }
        if text.uses_experts(i):
            table |= {
                f"{ours}.post_attention_layernorm.weight": (Piece(f"{ffn}.norm.weight"),),
                f"{ours}.feed_forward.router.weight": (Piece(f"{ffn}.router_DE", transpose=True),),
                f"{ours}.feed_forward.experts.gate_up_proj": (
                    Piece(f"{ffn}.experts.moe_w_in_eD_F", 2, experts=E),
                    Piece(f"{ffn}.experts.moe_w_swiglu_eD_F", 2, experts=E),
                ),
                f"{ours}.feed_forward.experts.down_proj": (Piece(f"{ffn}.experts.moe_w_out_eF_D", 1, experts=E),),
                f"{ours}.feed_forward.shared_expert.gate_proj.weight": (Piece(f"{ffn}.w_in_shared_FD.weight", 0),),
                f"{ours}.feed_forward.shared_expert.up_proj.weight": (Piece(f"{ffn}.w_swiglu_FD.weight", 0),),
                f"{ours}.feed_forward.shared_expert.down_proj.weight": (Piece(f"{ffn}.w_out_shared_DF.weight", 1),),
            }
        else:
            table |= {
                f"{ours}.post_attention_layernorm.weight": (Piece(f"{ffn}.mlp.layer_norm_weight"),),
                f"{ours}.feed_forward.gate_proj.weight": (Piece(f"{ffn}.mlp.fc1_weight", 0, (0, 1, 2)),),
                f"{ours}.feed_forward.up_proj.weight": (Piece(f"{ffn}.mlp.fc1_weight", 0, (1, 2, 2)),),
                f"{ours}.feed_forward.down_proj.weight": (Piece(f"{ffn}.mlp.fc2_weight", 1),),
            }
    return table | (_vision_pieces(vision.num_hidden_layers) if vision is not None else {})


def _vision_pieces(layers: int) -> dict[str, tuple[Piece, ...]]:
    encoder = "vision_embeddings.vision_encoder"
    joins: list[tuple[str, str, int | None]] = [  # ours, Meta's, joined along
        ("vision_model.class_embedding", f"{encoder}.class_embedding", None),
        ("vision_model.positional_embedding_vlm", f"{encoder}.positional_embedding_vlm", None),
        ("vision_model.patch_embedding.linear.weight", f"{encoder}.conv1._linear.weight", 0),
        ("vision_model.vision_adapter.mlp.fc1.weight", "vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
        ("vision_model.vision_adapter.mlp.fc2.weight", "vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
        ("multi_modal_projector.linear_1.weight", "vision_projection.weight", 0),
    ]
    for kind in ("weight", "bias"):
        joins += [(f"vision_model.layernorm_{at}.{kind}", f"{encoder}.ln_{at}.{kind}", None) for at in ("pre", "post")]
        for i in range(layers):
            ours, theirs = f"vision_model.model.layers.{i}", f"{encoder}.transformer.resblocks.{i}"
            joins += [
                (f"{ours}.input_layernorm.{kind}", f"{theirs}.ln_1.{kind}", None),
                (f"{ours}.post_attention_layernorm.{kind}", f"{theirs}.ln_2.{kind}", None),
                *((f"{ours}.self_attn.{x}_proj.{kind}", f"{theirs}.attn.w{x}.{kind}", 0) for x in "qkv"),
                (f"{ours}.self_attn.o_proj.{kind}", f"{theirs}.attn.wo.{kind}", 1 if kind == "weight" else None),
                (f"{ours}.mlp.fc1.{kind}", f"{theirs}.mlp.c_fc.{kind}", 0),
                (f"{ours}.mlp.fc2.{kind}", f"{theirs}.mlp.c_proj.{kind}", 1 if kind == "weight" else None),
            ]
    return {ours: (Piece(theirs, join),) for ours, theirs, join in joins}


@dataclass(frozen=True)
class MetaNames:
    """Our names, which `MetaSource` already gives; in an error a parameter goes by Meta's."""

    table: Mapping[str, tuple[Piece, ...]]

    def to_model(self, key: str) -> str | None:
        return key if key in self.table else None

    def to_file(self, name: str) -> str | None:
        return ", ".join(piece.key for piece in self.table[name]) if name in self.table else None


class MetaSource:
    """The ranks' files, memory-mapped, as tensors of our names and shapes, put together one at a time. Scales of FP8
    experts are `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, ranks]: each rank has rounded its own
    inputs of down_proj.

    Raises:
        CheckpointError: no ranks, one is missing, damaged, quantised otherwise, or holds other keys than the others.
    """

    def __init__(self, directory: str | Path, config: Llama4Config) -> None:
        self._table = pieces(config)
        self._ranks = [_read(path) for path in _rank_files(Path(directory))]
        self._scales = _read_scales(Path(directory), self._ranks, self._table)
        first = self._ranks[0]
        for i, rank in enumerate(self._ranks):
            if first.keys() != rank.keys():
                raise CheckpointError(
                    f"{RANK_FILE.format(i)} in {directory} holds other keys than {RANK_FILE.format(0)}; all files must "
                    "be of one model: fetch them again",
                    sorted(first.keys() - rank.keys()),
                    sorted(rank.keys() - first.keys()),
                )
        used = {piece.key for parts in self._table.values() for piece in parts}
        self._strangers = first.keys() - used
        self.names = MetaNames(self._table)
        self.plan: Plan = {}

    @property
    def is_quantised(self) -> bool:
        return bool(self._scales)

    def keys(self) -> Iterable[str]:
        """Our names of all that is there whole, and Meta's of what we have no use for."""
        first = self._ranks[0]
        return [
            *(name for name, parts in self._table.items() if all(piece.key in first for piece in parts)),
            *self._scales,
            *sorted(self._strangers),
        ]

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._scales:
            return tuple(self._scales[key].shape)
        if key not in self._table:
            return tuple(self._ranks[0][key].shape)
        widths, shape = 0, list[int]()
        for piece in self._table[key]:
            parts = self._parts(key, piece)
            shape = list(parts[0].shape)
            if piece.join is not None:
                shape[piece.join] = sum(part.shape[piece.join] for part in parts)
            widths += shape[-1]
        return (*shape[:-1], widths)

    def dtype(self, key: str) -> torch.dtype:
        if key in self._scales:
            return self._scales[key].dtype
        parts = self._table.get(key)
        return self._ranks[0][parts[0].key if parts else key].dtype

    def tensor(self, key: str) -> Tensor:
        """A view of the file where one rank has the whole of it, else a copy."""
        if key in self._scales:
            return self._scales[key]
        table = [(piece, self._parts(key, piece)) for piece in self._table[key]]
        if len(table) == 1 and len(table[0][1]) == 1:
            return table[0][1][0]
        whole = memory.empty(self.shape(key), self.dtype(key))
        begin = 0
        for piece, parts in table:
            width = whole.shape[-1] // len(table)
            target = whole.narrow(-1, begin, width) if len(table) > 1 else whole
            begin += width
            at = 0
            for part in parts:
                join = piece.join or 0
                target.narrow(join, at, part.shape[join]).copy_(part)
                at += part.shape[join]
        return whole

    def _parts(self, name: str, piece: Piece) -> list[Tensor]:
        """What each rank has of it; of a tensor that all have, the first's."""
        ranks = self._ranks if piece.join is not None else self._ranks[:1]
        try:
            return [piece.of(rank[piece.key]) for rank in ranks]
        except RuntimeError as error:
            shape = list(ranks[0][piece.key].shape)
            raise CheckpointError(f"{piece.key} has the shape {shape}, which does not make up {name}") from error


def _rank_files(directory: Path) -> list[Path]:
    found = sorted(path for path in directory.glob("consolidated.*.pth") if _RANK_FILES.fullmatch(path.name))
    if not found:
        raise CheckpointError(f"{directory} holds params.json but no {RANK_FILE.format(0)}; fetch the weights too")
    names = {path.name for path in found}
    count = int(found[-1].name.split(".")[1]) + 1
    if missing := [name for i in range(count) if (name := RANK_FILE.format(i)) not in names]:
        raise CheckpointError(f"{directory} lacks {len(missing)} of its {count} files; fetch them again", missing)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    kept = {key: value for key, value in _load(path).items() if not _DROPPED.fullmatch(key)}
    for key, value in kept.items():
        is_fp8_expert = value.dtype == torch.float8_e4m3fn and ".experts." in key
        if not value.is_floating_point() or (value.itemsize == 1 and not is_fp8_expert):
            raise CheckpointError(
                f"{key} in {path} is quantised ({value.dtype}), which this library does not read; use the bf16 "
                "checkpoint, or one with routed experts in float8_e4m3fn"
            )
    return kept


def _load(path: Path) -> dict[str, Tensor]:
    # Released files keep byte buffers beside the weights; these names are all that they need to be read.
    harmless: list[Any] = [io.BytesIO, bytes, codecs.encode]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it would call {called[1]}, and nothing in a file is executed" if called else "it is cut short or damaged"
        )
        raise CheckpointError(f"{path} cannot be read as weights: {reason}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; Meta's files hold tensors by name: fetch it again"
        )
    for key, value in content.items():
        if not isinstance(value, Tensor) and not _DROPPED.fullmatch(str(key)):
            raise CheckpointError(f"{key!r} in {path} is a {type(value).__name__}, no tensor; fetch the file again")
    return {str(key): value for key, value in content.items()}


def _read_scales(
    directory: Path, ranks: list[dict[str, Tensor]], table: Mapping[str, tuple[Piece, ...]]
) -> dict[str, Tensor]:
    """The scales of FP8 experts, put together from all ranks; Meta names them after the parameters of its own model."""
    first = ranks[0]
    quantised = [
        name
        for name, parts in table.items()
        if parts[0].key in first and first[parts[0].key].dtype == torch.float8_e4m3fn
    ]
    if not quantised:
        return {}
    if (directory / SCALES_FILE.replace("fp8", "int4").format(0)).is_file():
        raise CheckpointError(
            f"{directory} holds Meta's int4, which this library does not read; quantise the bf16 checkpoint: "
            "quantization='int4_mixed' is the same choice of weights"
        )
    paths = [directory / SCALES_FILE.format(rank) for rank in range(len(ranks))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{directory} holds experts in FP8 but not their scales; fetch those, too", missing)
    files = [_load(path) for path in paths]
    scales: dict[str, Tensor] = {}
    for name in quantised:
        layer = name.removeprefix("language_model.model.").rpartition(".")[0]
        wanted = [f"{layer}.{w}" for w in (("w1", "w3") if name.endswith("gate_up_proj") else ("w2",))]
        if missing := [
            f"{key} ({path.name})" for path, f in zip(paths, files, strict=True) for key in wanted if key not in f
        ]:
            raise CheckpointError(f"{directory} lacks scales of {name}; fetch its files again", missing)
        if len(wanted) == 2:
            whole = torch.cat([file[key].flatten(1) for key in wanted for file in files], dim=1)[:, None]
        else:
            whole = torch.stack([file[wanted[0]].flatten(1) for file in files], dim=-1)
        scales[f"{name}_scale"] = whole
    return scales


# -- writing -------------------------------------------------------------------------------------------------------


def write_ranks(
    source: Source, config: Llama4Config, directory: Path, ranks: int = 1, *, progress: bool = False
) -> None:
    """Write `consolidated.NN.pth` for each of `ranks`; one rank's share of the model is in memory at a time.

    Raises:
        CheckpointError: a dimension that does not divide by the number of ranks, each named.
    """
    table = pieces(config)
    keys = {source.names.to_model(key): key for key in source.keys()}  # noqa: SIM118 (a Source is no dict)
    if config.text.tie_word_embeddings:
        keys["language_model.lm_head.weight"] = keys["language_model.model.embed_tokens.weight"]
    assert keys.keys() >= table.keys(), "match the source with its configuration first"
    _check_ranks(config, ranks)
    parts: dict[str, list[tuple[tuple[int, int, int], str, int]]] = {}  # Meta's key -> what makes it up, in order
    for name, its_pieces in table.items():
        for at, piece in enumerate(its_pieces):
            parts.setdefault(piece.key, []).append((piece.share, name, at))
    bar = tqdm(total=ranks * len(parts), desc="writing", unit="tensor", disable=None if progress else True, leave=False)
    with bar:
        for rank in range(ranks):
            state = {}
            for key, owners in parts.items():
                slices = []
                for _, name, at in sorted(owners):
                    ours = source.tensor(keys[name])
                    ours = ours.chunk(len(table[name]), dim=-1)[at]
                    slices.append(table[name][at].slice(ours, rank, ranks))
                state[key] = (
                    torch.cat(slices) if len(slices) > 1 else slices[0].clone(memory_format=torch.contiguous_format)
                )
                bar.update()
            with _named(directory / RANK_FILE.format(rank)) as path:
                torch.save(state, path)


def _check_ranks(config: Llama4Config, ranks: int) -> None:
    text, vision = config.text, config.vision
    sizes = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "vocab_size": text.vocab_size,
    }
    if text.moe_layers:
        sizes["intermediate_size"] = text.intermediate_size
    if len(text.moe_layers or ()) < text.num_hidden_layers:
        sizes["intermediate_size_mlp"] = text.intermediate_size_mlp
    if vision is not None:
        sizes |= {
            "vision num_attention_heads": vision.num_attention_heads,
            "vision intermediate_size": vision.intermediate_size,
            "vision_output_dim": vision.vision_output_dim,
            "hidden_size": text.hidden_size,
        }
    if ranks < 1:
        raise CheckpointError(f"ranks is {ranks}; choose at least 1")
    if odd := [f"{name} = {size}" for name, size in sizes.items() if size % ranks]:
        raise CheckpointError(f"{ranks} ranks do not divide {', '.join(odd)}; choose another number")


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """torch reports a full disk as a RuntimeError; make it the system's own."""
    try:
        yield path
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error
