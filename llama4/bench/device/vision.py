"""The vision tower, and what comes before it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llama4.bench import roofline
from llama4.bench.device import timing, workload
from llama4.bench.device.record import Figures, Record
from llama4.bench.tasks import photo_bytes
from llama4.ops.rope import rotate_patches
from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel
from llama4.vision.images import load_image
from llama4.vision.tiling import tile_image


def run(record: Record) -> None:
    config = workload.SMALL_VISION if record.dry else VisionConfig()
    made: list[VisionModel] = []

    def tower() -> VisionModel:
        if not made:
            with torch.device("meta"):
                made.append(VisionModel(config).to(torch.bfloat16).eval())
            workload.fill(made[0], lambda name: record.device)
            made[0].set_rotate(rotate_patches)  # as models have it
        return made[0]

    def pixels(tiles: int) -> Tensor:
        return torch.randn(tiles, 3, config.image_size, config.image_size, device=record.device).bfloat16()

    def time(tiles: int) -> Figures:
        spent = record.time(partial(tower(), pixels(tiles)))
        work = roofline.vision(config, tiles)
        return {"ms": spent * 1e3, "tiles": tiles} | workload.shares(work, spent, record.rates)

    tiles = 3 if record.dry else 17
    record.case("tower", partial(time, tiles))
    record.case("tower, one tile", partial(time, 1))
    record.profile("tower", lambda: partial(tower(), pixels(tiles)))
    record.case("a JPEG of 12 megapixels, decoded and tiled on the host", partial(_preparation, record, config))


def _preparation(record: Record, config: VisionConfig) -> Figures:
    data = photo_bytes(*((400, 300) if record.dry else (4000, 3000)))
    host = torch.device("cpu")
    decoding = timing.seconds(partial(load_image, data), host, budget=0.5, most=5)
    picture = load_image(data)
    tiling = timing.seconds(partial(tile_image, picture, config.image_size, config.max_tiles), host, budget=0.5, most=5)
    return {"decode_ms": decoding * 1e3, "tile_ms": tiling * 1e3}
