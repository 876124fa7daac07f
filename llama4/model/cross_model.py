"""The model whose layers of cross-attention look at pictures: Llama 3.2 Vision's.

Shapes: m pictures, n tiles of a picture, A side of a tile in pixels, L patches of a tile and its class token, S
those of all tiles that a picture has, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from llama4.cache.batch import Batch
from llama4.cache.pictures import NewPicture, make_sight
from llama4.cache.sequence import SequenceCache
from llama4.errors import Llama4Error
from llama4.model.cross_attention import CrossAttentionLayer
from llama4.model.multimodal import Llama4Model
from llama4.ops.linear import linear_of_tower
from llama4.vision.config import VisionConfig
from llama4.vision.linear import TowerLinear, set_product
from llama4.vision.tiled_config import TiledVisionConfig
from llama4.vision.tiled_encoder import TiledVisionModel


class CrossAttentionModel(Llama4Model):
    """Token ids and pictures in, logits out: an `<|image|>` keeps its embedding, and layers of cross-attention see the
    picture that it stands for.

    `pixel_values` are pictures of n tiles each, and `image_grids` say how these are arranged.
    """

    image_name = "<|image|>"

    def _add_vision(self, vision: VisionConfig) -> None:
        assert isinstance(vision, TiledVisionConfig)
        self.vision_model = TiledVisionModel(vision)  # type: ignore[assignment]  # another tower
        self.multi_modal_projector = TowerLinear(  # type: ignore[assignment]
            vision.vision_output_dim, self.config.text.hidden_size
        )
        for part in self._tower():
            set_product(part, linear_of_tower)

    @property
    def picture_modules(self) -> tuple[str, ...]:
        layers = self.language_model.model.layers
        seeing = (i for i, layer in enumerate(layers) if isinstance(layer, CrossAttentionLayer))
        return (*super().picture_modules, *(f"language_model.model.layers.{i}" for i in seeing))

    def encode_images(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """Pictures -> features of their patches.

        Args:
            pixel_values: [m, n, 3, A, A], normalised, zeros in tiles that a picture does not have.
            image_grids: [m, 2], rows and columns of each picture's tiles.

        Returns:
            [m, n * L, D], of the model's dtype; what is of no tile is to be cut off.

        Raises:
            Llama4Error: a text-only model, pictures without their grids, or tiles of another shape.
        """
        tower, projector = self._tower()
        features: Tensor = projector(tower(pixel_values.to(self.device), _given(image_grids)))
        return features

    def _fuse(
        self,
        ids_N: Tensor,
        batch: Batch,
        image_features: Tensor | None,
        image_grids: Tensor | None,
        cache: SequenceCache | None,
    ) -> tuple[Tensor, Batch]:
        x_ND: Tensor = self.language_model.model.embed_tokens(ids_N)
        known = cache.pictures if cache is not None else ((),) * len(batch.lengths)
        new: list[list[NewPicture]] = [[] for _ in batch.lengths]
        if ids_N.device.type == "cpu" or not batch.is_decode or image_features is not None:  # elsewhere it would wait
            pictures = self._pictures(image_features, image_grids)
            places = (ids_N == self.config.image_token_index).nonzero().squeeze(1).tolist()
            if len(places) != len(pictures):
                raise Llama4Error(
                    f"the input holds {len(places)} {self.image_name} tokens, but {len(pictures)} pictures were given"
                )
            ends = list(accumulate(batch.lengths))
            for place, features in zip(places, pictures, strict=True):
                row = next(i for i, end in enumerate(ends) if place < end)
                position = batch.next_position[row] - (ends[row] - place)
                new[row].append(NewPicture(position, features))
        positions = [[picture.position for picture in row] for row in known]
        sight = make_sight(positions, new, batch.query_start, batch.lengths, ids_N.device)
        return x_ND, replace(batch, sight=sight)

    def _pictures(self, image_features: Tensor | None, image_grids: Tensor | None) -> list[Tensor]:
        """The features of each picture, without those of tiles that it does not have, [S, D]."""
        if image_features is None:
            return []
        vision, grids = self.config.vision, _given(image_grids)
        assert vision is not None
        if image_features.ndim != 3 or len(grids) != len(image_features):
            raise Llama4Error(
                f"image_features must be [pictures, tiles * patches, D] with a row of image_grids each, not "
                f"{list(image_features.shape)} with {len(grids)}"
            )
        tiles = grids.prod(dim=1).tolist()
        return [
            features[: count * vision.keys_per_tile]
            for features, count in zip(image_features.to(self.device), tiles, strict=True)
        ]


def _given(image_grids: Tensor | None) -> Tensor:
    if image_grids is None:
        raise Llama4Error(
            "pictures need image_grids, rows and columns of their tiles, [pictures, 2]; the processor makes them"
        )
    return image_grids
