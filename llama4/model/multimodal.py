"""The model: embed, fuse image features, decoder layers, head.

Module names are those of Hugging Face's checkpoints, so a parameter's name is its key on disk.

Shapes: B rows, T columns, N packed tokens (cache/batch.py), D hidden size, V vocabulary, n tiles, Q tokens per tile.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from llama4.cache.batch import Batch, make_batch
from llama4.cache.formats import resolve_format
from llama4.cache.pool import BlockPool
from llama4.cache.sequence import SequenceCache
from llama4.cache.view import CacheView
from llama4.config import Llama4Config
from llama4.errors import Llama4Error
from llama4.model.decoder import LanguageModel
from llama4.model.experts import Experts, LoopExperts
from llama4.ops.linear import linear_of_tower
from llama4.ops.rope import rotate_patches
from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel, run, run_recomputed
from llama4.vision.linear import set_product
from llama4.vision.projector import Projector


def check_rows(rows: int, cache: SequenceCache) -> None:
    """Raises Llama4Error where a cache was made for another number of rows."""
    if rows != cache.batch_size:
        raise Llama4Error(f"input_ids have {rows} rows, but the cache was made for {cache.batch_size}")


def check_ids(lowest: int, highest: int, vocab_size: int) -> None:
    """Raises Llama4Error where a token id is outside the vocabulary."""
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise Llama4Error(f"token id {bad} is outside the vocabulary of {vocab_size}")


class Llama4Model(nn.Module):
    """Llama 4: token ids and image tiles in, logits out.

    Parameters are allocated and not initialised where that costs (experts, class and position embeddings): load a
    checkpoint or call `init_weights`.

    Attributes:
        image_name: the token that stands for a picture, or for a part of one.
        is_batch_invariant: whether compiled steps compute a row to the same bits, whatever rows stand beside it.
    """

    image_name: ClassVar[str] = "<|patch|>"

    def __init__(self, config: Llama4Config, experts: type[Experts] = LoopExperts) -> None:
        super().__init__()
        self.config = config
        self.is_batch_invariant = False
        self.language_model = LanguageModel(config.text, experts)
        self.vision_model: VisionModel | None = None
        self.multi_modal_projector: Projector | None = None
        if config.vision is not None:
            self._add_vision(config.vision)

    def _add_vision(self, vision: VisionConfig) -> None:
        self.vision_model = VisionModel(vision)
        self.vision_model.set_rotate(rotate_patches)
        self.multi_modal_projector = Projector(vision, self.config.text.hidden_size)
        for part in self._tower():
            set_product(part, linear_of_tower)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    @property
    def picture_modules(self) -> tuple[str, ...]:
        """Names of the modules that compute for pictures alone."""
        return ("vision_model", "multi_modal_projector") if self.vision_model is not None else ()

    def new_cache(
        self,
        batch_size: int = 1,
        dtype: str | torch.dtype | None = None,
        device: torch.device | None = None,
        pool: BlockPool | None = None,
    ) -> SequenceCache:
        """An empty key/value cache for `batch_size` sequences.

        Args:
            dtype: of the layers that see every token: "int8", "fp8", "int4", or a dtype; by default the model's.
                Chunked layers, which hold one chunk at most, keep the model's.
            device: of those layers; the model's by default. On the CPU a GPU's cache is in pinned memory.
            pool: where its blocks come from; by default from memory without a limit.

        Raises:
            Llama4Error: no rows, or a dtype that a cache cannot have.
        """
        format = resolve_format(dtype, self.dtype)
        return SequenceCache(self.config.text, batch_size, self.device, self.dtype, format, device, pool)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """In training, keep only what goes into each layer and compute the rest again for its gradient: less memory
        for a third more time, and the same gradients (Chen et al. 2016)."""
        run_layer = run_recomputed if enable else run
        self.language_model.model.run_layer = run_layer
        if self.vision_model is not None:
            self.vision_model.set_run_layer(run_layer)

    def encode_images(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """Tiles -> image tokens, in the order of the tiles.

        Args:
            pixel_values: [n, 3, A, A], normalised, of any floating-point dtype and on any device; A is
                `config.vision.image_size`.
            image_grids: None; see `CrossAttentionModel`.

        Returns:
            [n * Q, D], of the model's dtype and on its device.

        Raises:
            Llama4Error: a text-only model, or tiles of another shape.
        """
        tower, projector = self._tower()
        features: Tensor = projector(tower(pixel_values.to(self.device)))
        return features.flatten(0, 1)

    def _tower(self) -> tuple[VisionModel, Projector]:
        if self.vision_model is None or self.multi_modal_projector is None:
            raise Llama4Error("this model is text-only: it has no vision tower to encode pixel_values with")
        return self.vision_model, self.multi_modal_projector

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_grids: Tensor | None = None,
        cache: SequenceCache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at every place.

        Args:
            input_ids: [B, T] int64.
            positions: [B, T] or [T], consecutive in each row; by default what follows the cache, or 0.
            pixel_values: [n, 3, A, A], the tiles of all rows in order.
            image_features: [n * Q, D], in place of `pixel_values`: what `encode_images` gave, cut to the `<|patch|>`
                tokens of this call. With it an image may be spread over several calls.
            image_grids: None; of models with layers of cross-attention, see `CrossAttentionModel`.
            cache: keys and values of earlier tokens; the new ones are appended.
            attention_mask: [B, T], 1 at tokens and 0 at padding, on either side.
            last_only: logits of each row's last token alone, [B, 1, V], zeros for a row that is all padding.

        Returns:
            [B, T, V], zeros at padding.

        Raises:
            Llama4Error: shapes that do not fit each other, ids beyond the vocabulary, image features and `<|patch|>`
                tokens that differ in number.
        """
        x_ND, batch = self.hidden_states(
            input_ids,
            positions=positions,
            pixel_values=pixel_values,
            image_features=image_features,
            image_grids=image_grids,
            cache=cache,
            attention_mask=attention_mask,
        )
        head = self.language_model.lm_head
        return batch.unpack_last(head(x_ND[batch.last_tokens()])) if last_only else batch.unpack(head(x_ND))

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_grids: Tensor | None = None,
        cache: SequenceCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Batch]:
        """What `forward` gives to the head: [N, D], packed, and how it is packed.

        Args and Raises: see `forward`.
        """
        if input_ids.ndim != 2:
            raise Llama4Error(f"input_ids must be [B, T], not {list(input_ids.shape)}")
        batch_size, columns = input_ids.shape
        if cache is not None:
            check_rows(batch_size, cache)
        batch = make_batch(
            batch_size,
            columns,
            self.device,
            attention_mask,
            positions,
            cache.start if cache is not None else None,
            cache.next_position if cache is not None else None,
            cache.rope_lengths if cache is not None else None,
        )
        self._check_ids(input_ids, attention_mask)
        ids_N = batch.pack(input_ids.to(self.device))
        if pixel_values is not None:
            if image_features is not None:
                raise Llama4Error("give pixel_values or image_features, not both")
            image_features = self.encode_images(pixel_values, image_grids)
        x_ND, batch = self._fuse(ids_N, batch, image_features, image_grids, cache)
        view = CacheView(cache, batch) if cache is not None else None
        x_ND = self.language_model.model(x_ND, batch, view)
        if view is not None:
            view.commit()
        return x_ND, batch

    def _check_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Those on a GPU would be waited for, and are not looked at."""
        if not input_ids.is_cpu:
            return
        given_N = input_ids if attention_mask is None else input_ids[attention_mask.cpu().bool()]
        if given_N.numel():
            low, high = given_N.aminmax()
            check_ids(int(low), int(high), self.config.text.num_embeddings)

    def _fuse(
        self,
        ids_N: Tensor,
        batch: Batch,
        image_features: Tensor | None,
        image_grids: Tensor | None,
        cache: SequenceCache | None,
    ) -> tuple[Tensor, Batch]:
        """Tokens and pictures -> what goes into the layers, and what these see beside.

        Early fusion: the embedding of every `<|patch|>` is replaced by the next image feature. In a step of decoding
        without features, one that the model itself wrote keeps its embedding."""
        x_ND: Tensor = self.language_model.model.embed_tokens(ids_N)
        if image_features is None and (ids_N.device.type != "cpu" or batch.is_decode):
            return x_ND, batch
        is_patch = ids_N == self.config.image_token_index
        if image_features is None:
            if is_patch.any():
                raise Llama4Error(
                    f"the input holds {int(is_patch.sum())} <|patch|> tokens but no image: give pixel_values "
                    "or image_features"
                )
            return x_ND, batch
        places = is_patch.nonzero().squeeze(1)
        if len(places) != len(image_features):
            raise Llama4Error(
                f"the input holds {len(places)} <|patch|> tokens, but the images give {len(image_features)} features; "
                "each tile needs as many <|patch|> tokens as it has features"
            )
        return x_ND.index_copy(0, places, image_features.to(x_ND.dtype)), batch

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training: normal with variance 1 / fan-in, so that image features and text embeddings
        arrive at the same size whatever the width; norms at one, biases and gates at zero, what adds to the residual
        stream divided by sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or parameter.shape == (1,):  # a gate is one number
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("gate_up_proj", "experts.down_proj")):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith(("embed_tokens.weight", "class_embedding", "positional_embedding_vlm")):
                parameter.normal_(0.0, 1.0 if name.endswith("embed_tokens.weight") else 0.1, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj", "fc2.weight")):
                vision = name.startswith("vision_model.model.")
                if vision or name.startswith("language_model"):
                    layers = self.config.vision.num_hidden_layers if vision and self.config.vision else 0
                    parameter.div_((2 * (layers or self.config.text.num_hidden_layers)) ** 0.5)
