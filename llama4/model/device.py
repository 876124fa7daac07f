"""Where a model is computed, and in which dtype: what users write -> torch's device and dtype."""

from __future__ import annotations

import torch

from llama4.config import Llama4Config
from llama4.control_groups import available_memory
from llama4.errors import ArgumentError, ConfigError
from llama4.units import dtype_name

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SMALL_MODEL = 100_000_000
"""Below so many parameters "auto" is float32 on a CPU: at such widths that is faster than bfloat16."""


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to use.

    Raises:
        ArgumentError: torch knows no such device, or has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device={str(device)!r} cannot be used ({reason}); try 'auto', 'cpu' or 'cuda'") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype, config: Llama4Config, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    Raises:
        ArgumentError: a dtype that models are not computed in.
        ConfigError: the checkpoint has such a one.
    """
    is_given = dtype != "auto"
    if not is_given:
        small = device.type == "cpu" and config.num_parameters() < SMALL_MODEL
        dtype = "float32" if small else config.dtype
    name = dtype_name(str(dtype).removeprefix("torch."))
    if name not in DTYPES:
        known = f"one of {', '.join(DTYPES)}"
        if not is_given:
            raise ConfigError(f"config.json has dtype = {name!r:.80}, in which models are not computed; choose {known}")
        raise ArgumentError(f"dtype={name!r} is not supported; choose 'auto' or {known}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes of memory that could be allocated now; at most 1 TiB on a CPU.

    Of a GPU's, torch keeps what was released. Rests of blocks of which a part is in use do not count: nothing larger
    finds room there.
    """
    if device.type == "cuda":
        free, stats = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_stats(device)
        reserved, *used = (
            stats[f"{kind}.all.current"] for kind in ("reserved_bytes", "active_bytes", "inactive_split_bytes")
        )
        return int(free + reserved - sum(used))
    return int(min(available_memory(), 1 << 40))
