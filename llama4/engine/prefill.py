"""Prompts -> a filled cache and the logits of their last tokens, in pieces of bounded size.

Shapes: B rows, T columns of a piece, N its tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama4.cache.sequence import SequenceCache
from llama4.engine.fused_cpu import FusedCpuRunner, only_our_threads
from llama4.engine.fused_prompt import read_by_steps
from llama4.engine.prompt import Piece, PromptPictures, split_rows
from llama4.inputs import Inputs
from llama4.kernels.abi import MAX_GEMV_ROWS
from llama4.kernels.threads import torch_by_one_thread
from llama4.model.device import free_memory
from llama4.model.multimodal import Llama4Model
from llama4.ops.attention import flash_absent_reason
from llama4.progress import Bar, step

PREFILL_TOKENS = 2048
"""Most tokens of all rows together that go through the model at once: bounds the memory a long prompt takes."""
GPU_PREFILL_TOKENS = 16384
"""The same on a GPU: each piece reads the matrices of all experts, and with 2,048 tokens, 128 for each of 16 experts, a
GPU waits for them."""
LEAST_TOKENS = 64
"""So many go through it at once, however little memory is free."""


@torch.inference_mode()
def prefill(model: Llama4Model, inputs: Inputs, cache: SequenceCache, progress: bool = False) -> Tensor:
    """Compute prompts of one length into the cache, in pieces of bounded size; -> logits of their last tokens, [B, V].

    Tokens that the cache holds, the same number of each prompt, are skipped.
    """
    rows = split_rows(model, inputs)
    prompts = [row.input_ids[0].tolist() for row in rows]
    pictures = [PromptPictures(model, row, ids) for row, ids in zip(rows, prompts, strict=True)]
    (length,), (past,) = set(map(len, prompts)), set(cache.lengths)
    if past == length and (remembered := cache.logits_after(past)) is not None:
        return remembered
    cache.announce([length] * len(prompts))
    size = max(piece_size(model) // len(prompts), 1)
    fused = FusedCpuRunner(model)
    with Bar("reading", (length - past) * len(prompts), "tokens", shown=progress):
        for begin in range(past, length, size):
            end = min(begin + size, length)
            pieces = [own.piece(ids, begin, end) for own, ids in zip(pictures, prompts, strict=True)]
            _, logits_BV = read_pieces(fused, cache, pieces)
    if len(prompts) == 1:
        cache.remember_logits(logits_BV)
    return logits_BV


def read_pieces(
    fused: FusedCpuRunner,
    cache: SequenceCache,
    pieces: Sequence[Piece],
    head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the next piece of the prompt in each row of a cache, as a part of the progress bar that is shown.

    Args:
        fused: of the model.
        head: hidden states behind the last token of each piece [B, D] -> logits; by default the model's.

    Returns:
        What the head is given for all tokens, packed, [N, D]; and the logits behind each piece, [B, V].
    """
    model = fused.model
    if (description := fused.prompt_description(cache)) is not None:
        with step(sum(len(piece.ids) for piece in pieces)), torch_by_one_thread():
            return read_by_steps(model, description, cache, pieces)
    sizes = [len(piece.ids) for piece in pieces]
    ids_BT = torch.zeros(len(pieces), max(sizes), dtype=torch.long)
    mask_BT = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    ids_BT[mask_BT] = torch.tensor([id_ for piece in pieces for id_ in piece.ids])
    features = [part for piece in pieces for part in piece.features]
    grids = [part for piece in pieces for part in piece.grids]
    with step(sum(sizes)), only_our_threads(fused, cache):
        x_ND, batch = model.hidden_states(
            ids_BT,
            image_features=torch.cat(features) if features else None,
            image_grids=torch.cat(grids) if grids else None,
            cache=cache,
            attention_mask=mask_BT,
        )
        return x_ND, (head or model.language_model.lm_head)(x_ND[batch.last_tokens()])


def head_of(model: Llama4Model) -> Callable[[Tensor], Tensor]:
    """Hidden states [N, D] -> logits, which for a model that is batch-invariant do not depend on N: so few rows that
    their product never goes by tiles."""
    head: Callable[[Tensor], Tensor] = model.language_model.lm_head
    if not model.is_batch_invariant:
        return head
    return lambda x_ND: torch.cat([head(part) for part in x_ND.split(MAX_GEMV_ROWS)])


def prefill_tokens(device_type: str, dtype: torch.dtype, head_dim: int) -> int:
    """Most tokens at once, whatever memory there is. Where torch's attention on a GPU is not flash attention it holds
    T x T scores."""
    has_flash = flash_absent_reason(device_type, dtype, head_dim) is None
    return GPU_PREFILL_TOKENS if device_type == "cuda" and has_flash else PREFILL_TOKENS


def piece_size(model: Llama4Model) -> int:
    """Tokens that go through the model at once: `prefill_tokens`, or fewer where their activations would take more than
    a quarter of the memory that is free."""
    text, device = model.config.text, model.device
    fitting = int(free_memory(device) / 4 / text.activation_bytes(model.dtype.itemsize))
    return min(prefill_tokens(device.type, model.dtype, text.head_dim), max(fitting, LEAST_TOKENS))
