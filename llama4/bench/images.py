"""The vision tower beside the machine's roofline, and the preprocessing of a picture.

`llama4 bench images [MODEL] [--layers 4] [--tiles 17] [--megapixels 12] [--json | --markdown]`

The tower has random weights and the shapes of MODEL's (by default Scout's), with fewer layers. The picture is a JPEG of
a photograph's size, decoded and tiled for the same model. Figures are medians of warm runs; the machine's peak rates
are measured before each run of the tower.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama4.analysis.info import read_config
from llama4.arguments import Parser
from llama4.bench import roofline
from llama4.bench.machine import OtherProcesses, describe
from llama4.bench.peak_rates import PeakProbe, PeakRates, timed
from llama4.bench.report import (
    Spread,
    add_output_options,
    add_threads,
    machine_line,
    number,
    positive,
    rates_json,
    summary,
    table,
    warn_of_other_processes,
)
from llama4.bench.tasks import photo_bytes
from llama4.errors import Llama4Error
from llama4.model.device import DTYPES
from llama4.units import dtype_name
from llama4.vision.config import VisionConfig
from llama4.vision.encoder import VisionModel
from llama4.vision.images import load_image
from llama4.vision.tiled_config import TiledVisionConfig
from llama4.vision.tiling import tile_image


def tower(config: VisionConfig, dtype_name: str, tiles: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of the tower with its adapter over `tiles` tiles, and its share of the roofline."""
    dtype, generator = DTYPES[dtype_name], torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = VisionModel(config)
    model = model.to_empty(device="cpu").to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
    pixels = torch.randn(tiles, config.num_channels, config.image_size, config.image_size, generator=generator)
    pixels = pixels.to(dtype)
    work, probe = roofline.vision(config, tiles, dtype=dtype), PeakProbe(dtype, threads)
    samples, shares, rates = list[float](), list[float](), list[PeakRates]()
    with torch.inference_mode():
        model(pixels)
        for _ in range(rounds):
            rates.append(probe.measure())
            samples.append(timed(lambda: model(pixels)))
            shares.append(work.seconds(rates[-1]) / samples[-1])
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "tiles": tiles,
        "dtype": dtype_name,
        "flops": work.flops,
        "seconds": summary(samples),
        "roofline_share": Spread.of(shares).median,
        "peak_rates": rates_json(rates),
    }


def preprocessing(config: VisionConfig, megapixels: float, rounds: int) -> dict[str, Any]:
    """Seconds of decoding and of tiling a JPEG of 4 : 3, and its width and height."""
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
    return {
        "size": [width, height],
        "decoding_seconds": summary(decoding),
        "tiling_seconds": summary(tiling),
        "total_seconds": summary([a + b for a, b in zip(decoding, tiling, strict=True)]),
    }


def tables(report: Mapping[str, Any], markdown: bool = False) -> str:
    tower, picture = report["tower"], report["picture"]
    width, height = picture["size"]
    head = (
        f"{tower['layers']} layers of width {tower['hidden_size']}, {tower['dtype']}; "
        f"{machine_line(report['machine'])}; median (lowest-highest) of {report['rounds']} rounds"
    )
    rows = [
        [f"tower and adapter over {tower['tiles']} tiles, s", str(Spread.from_json(tower["seconds"]))],
        ["  GFLOP/s", number(tower["flops"] / tower["seconds"]["median"] / 1e9)],
        ["  share of the roofline", f"{tower['roofline_share']:.0%}"],
        ["  measured peak, GFLOP/s", str(Spread.from_json(tower["peak_rates"]["gemm"], 1e-9))],
        [f"a JPEG of {width} x {height}: decoded and tiled, ms", str(Spread.from_json(picture["total_seconds"], 1e3))],
        ["  decoded", str(Spread.from_json(picture["decoding_seconds"], 1e3))],
        ["  tiled", str(Spread.from_json(picture["tiling_seconds"], 1e3))],
    ]
    return "\n\n".join([head, table(["", ""], rows, markdown)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="llama4 bench images", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model",
        nargs="?",
        default="scout",
        help="whose shape to take: a preset, a directory or a Hub id (default: scout)",
    )
    parser.add_argument("--layers", type=positive, default=4, metavar="N", help="of the tower (default: 4)")
    parser.add_argument("--tiles", type=positive, default=17, metavar="N", help="(default: 17)")
    parser.add_argument("--megapixels", type=float, default=12.0, metavar="N", help="of the picture (default: 12)")
    parser.add_argument(
        "--dtype", type=dtype_name, default="bfloat16", choices=DTYPES, metavar="DTYPE", help="(default: bfloat16)"
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: 5)")
    add_threads(parser)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if not 0.01 <= options.megapixels <= 80:
        parser.error(f"--megapixels is {options.megapixels}; it must be between 0.01 and 80")
    torch.set_num_threads(options.threads)
    config = read_config(options.model).vision
    if config is None:
        raise Llama4Error(f"{options.model} has no vision tower; take one that has")
    if isinstance(config, TiledVisionConfig):
        raise Llama4Error(f"{options.model} has a tower of another kind than Llama 4's, which is not measured here")
    config = dataclasses.replace(config, num_hidden_layers=min(options.layers, config.num_hidden_layers))
    others = OtherProcesses()
    report = {
        "machine": describe(),
        "rounds": options.rounds,
        "tower": tower(config, options.dtype, options.tiles, options.rounds, options.threads),
        "picture": preprocessing(config, options.megapixels, options.rounds),
    }
    warn_of_other_processes([others.share()])
    print(json.dumps(report, indent=2) if options.json else tables(report, options.markdown))
    return 0
