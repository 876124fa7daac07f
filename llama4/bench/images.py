"""The vision tower beside the machine's ceiling, and the preparation of a picture.

`llama4 bench images [MODEL] [--layers 4] [--tiles 17] [--megapixels 12] [--json | --markdown]`

The tower has random weights and the shape of MODEL's (by default Scout's), cut to a few layers. The picture is a JPEG
like a photograph's, decoded and cut into tiles for the same model. Medians of runs that are warm, in turns with the
ceiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

import torch

from llama4.analysis.info import read_config
from llama4.bench import roofline
from llama4.bench.engines import photo_bytes
from llama4.bench.machine import Ceilings, Others, describe, timed
from llama4.bench.report import Spread, add_output_options, add_threads, number, positive, table, warn_of_others
from llama4.model.device import DTYPES
from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel
from llama4.vision.images import load_image
from llama4.vision.tiling import tile_image


def tower(
    config: VisionConfig, dtype: torch.dtype, tiles: int, rounds: int, threads: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the tower with its adapter over so many tiles, shares of the floor, and the ceiling's rates."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = VisionModel(config)
    model = model.to_empty(device="cpu").to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    pixels = torch.randn(tiles, config.num_channels, config.image_size, config.image_size, generator=generator)
    pixels = pixels.to(dtype)
    work, ceilings = roofline.vision(config, tiles, dtype=dtype), Ceilings(dtype, threads)
    with torch.inference_mode():
        model(pixels)
        samples, shares, rates = [], [], []
        for _ in range(rounds):
            rate = ceilings.measure()
            samples.append(timed(lambda: model(pixels)))
            shares.append(work.seconds(rate.gemm, rate.memory) / samples[-1])
            rates.append(rate.gemm)
    return samples, shares, rates


def preparation(config: VisionConfig, megapixels: float, rounds: int) -> tuple[list[float], list[float], list[int]]:
    """Seconds of decoding a JPEG of 4 : 3 and of tiling it, and its width and height."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    data = photo_bytes(width, height)
    decoding, tiling = [], []
    for turn in range(-1, rounds):
        begin = time.perf_counter()
        picture = load_image(data)
        middle = time.perf_counter()
        tile_image(picture, config.image_size, config.max_tiles)
        if turn >= 0:
            decoding.append(middle - begin)
            tiling.append(time.perf_counter() - middle)
    return decoding, tiling, [width, height]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llama4 bench images", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model",
        nargs="?",
        default="scout",
        help="whose shape to take: a preset, a directory or a Hub id (default: scout)",
    )
    parser.add_argument("--layers", type=positive, default=4, metavar="N", help="of the tower (default: 4)")
    parser.add_argument("--tiles", type=positive, default=17, metavar="N", help="(default: 17)")
    parser.add_argument("--megapixels", type=float, default=12.0, metavar="N", help="of the picture (default: 12)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, metavar="DTYPE", help="(default: bfloat16)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: 5)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if not 0.01 <= options.megapixels <= 80:
        parser.error(f"--megapixels is {options.megapixels}; it must be between 0.01 and 80")
    torch.set_num_threads(options.threads)
    config = read_config(options.model).vision
    if config is None:
        raise ValueError(f"{options.model} has no vision tower; take one that has")
    config = dataclasses.replace(config, num_hidden_layers=min(options.layers, config.num_hidden_layers))
    others = Others()
    samples, shares, rates = tower(config, DTYPES[options.dtype], options.tiles, options.rounds, options.threads)
    decoding, tiling, size = preparation(config, options.megapixels, options.rounds)
    warn_of_others([others.share()])
    flops = roofline.vision(config, options.tiles).flops
    machine = describe()
    if options.json:
        content = {
            "machine": machine,
            "tower": {
                "layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "tiles": options.tiles,
                "dtype": options.dtype,
                "flops": flops,
                "seconds": samples,
                "share_of_floor": shares,
                "ceiling_flops_per_second": rates,
            },
            "picture": {"size": size, "decoding_seconds": decoding, "tiling_seconds": tiling},
        }
        print(json.dumps(content, indent=2))
        return 0
    spread, both = Spread.of(samples), Spread.of([a + b for a, b in zip(decoding, tiling, strict=True)])
    print(
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {options.dtype}; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}; median (lowest-highest) of {options.rounds} rounds\n"
    )
    rows = [
        [f"tower and adapter over {options.tiles} tiles, s", str(spread)],
        ["  GFLOP/s", number(flops / spread.median / 1e9)],
        ["  share of the ceiling", f"{Spread.of(shares).median:.0%}"],
        ["  ceiling, GFLOP/s", str(Spread.of([rate / 1e9 for rate in rates]))],
        [f"a JPEG of {size[0]} x {size[1]}: decoded and tiled, ms", str(_milliseconds(both))],
        ["  decoded", str(_milliseconds(Spread.of(decoding)))],
        ["  tiled", str(_milliseconds(Spread.of(tiling)))],
    ]
    print(table(["", ""], rows, options.markdown))
    return 0


def _milliseconds(spread: Spread) -> Spread:
    return Spread(spread.median * 1e3, spread.low * 1e3, spread.high * 1e3)


if __name__ == "__main__":
    sys.exit(main())
