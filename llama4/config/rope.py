"""RoPE's base and scaling, and the objects in config.json that say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llama4.config.typed import read_fields, read_value, section
from llama4.errors import ConfigError

FIELDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (*("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),),
}
"""Rules of scaling, `rope_type` -> the fields that they read; see model/rope_scaling.py for what they do."""
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
LONGER = ("linear", "dynamic", "yarn")
"""Rules whose files may have the original model's window as `max_position_embeddings`, which they make longer."""


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are lowered for contexts longer than those of training.

    Attributes:
        rope_type: one of `FIELDS`.
        factor: how many times longer contexts are.
        low_freq_factor, high_freq_factor: of llama3.
        original_max_position_embeddings: the window before, which `linear` does not ask for.
        attention_factor: what queries and keys are multiplied by; None: what follows from the factor.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: of yarn.
        short_factor, long_factor: of longrope, for each pair of a head.

    Raises:
        ConfigError: an unknown rule, or values that cannot be.
    """

    rope_type: str = "llama3"
    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in FIELDS:
            raise ConfigError(f"rope_type {self.rope_type!r} is not known; it may be {', '.join(FIELDS)} or none")
        if self.factor < 1 or not 0 < self.low_freq_factor <= self.high_freq_factor:
            raise ConfigError(
                f"RoPE scaling needs factor >= 1 and 0 < low_freq_factor <= high_freq_factor, not {self.factor}, "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 2:
            raise ConfigError(
                f"original_max_position_embeddings must be at least 2, not {self.original_max_position_embeddings}"
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"RoPE scaling needs 0 < beta_slow <= beta_fast, not {self.beta_slow} and {self.beta_fast}"
            )
        if min(self.mscale or 0, self.mscale_all_dim or 0) < 0:
            raise ConfigError(
                f"mscale and mscale_all_dim of RoPE scaling must be at least 0, not {self.mscale} and "
                f"{self.mscale_all_dim}"
            )
        if any(factor <= 0 for factor in (*self.short_factor, *self.long_factor)):
            raise ConfigError("short_factor and long_factor of RoPE scaling must be above 0")

    def check(self, head_dim: int, theta: float) -> None:
        """See that it suits a model.

        Raises:
            ConfigError: factors that are not one for each pair of a head, or a base that does not tell pairs apart.
        """
        if self.rope_type == "yarn" and theta == 1:
            raise ConfigError("rope_theta must not be 1 with a scaling of type 'yarn', which divides by its logarithm")
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if self.rope_type == "longrope" and count != head_dim // 2:
                raise ConfigError(f"{name} must have {head_dim // 2} numbers, one for each pair of a head, not {count}")

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def yarn_attention_factor(self) -> float:
        """What queries and keys are multiplied by under yarn (Peng et al. 2023)."""

        def temperature(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)

    def effective_length(self, length: int) -> int:
        """Sequences of two lengths have the same frequencies if this is equal."""
        border = self.original_max_position_embeddings
        if self.rope_type == "longrope":
            return border + (length > border)
        return max(length, border) if self.by_length else 0

    def to_dict(self) -> dict[str, Any]:
        """What rope_parameters of config.json say of it."""
        defaults = {each.name: each.default for each in fields(self)}
        said = {name: getattr(self, name) for name in FIELDS[self.rope_type]}
        optional = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
        kept = {name: value for name, value in said.items() if name not in optional or value != defaults[name]}
        return {"rope_type": self.rope_type} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()
        }


def rope_section(content: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Older files have `rope_scaling`, which counts more."""
    return section(content, "rope_scaling", place) or section(content, "rope_parameters", place)


def read_theta(rope: Mapping[str, Any], content: Mapping[str, Any], default: float, place: str) -> float:
    """RoPE's base.

    Raises:
        ConfigError: it is no number above 0.
    """
    theta: float = read_value(float, rope.get("rope_theta", content.get("rope_theta", default)), "rope_theta", place)
    if theta <= 0:
        raise ConfigError(f"{place} has rope_theta = {theta}, which must be above 0; fetch the file again")
    return theta


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The rope_parameters of config.json."""
    return {"rope_type": "default", "rope_theta": theta} | (scaling.to_dict() if scaling is not None else {})


def read_scaling(rope: Mapping[str, Any], window: int | None, place: str) -> RopeScaling | None:
    """The scaling that an object says; None for none.

    Args:
        window: `max_position_embeddings` beside it, which counts where the object has no
            `original_max_position_embeddings`.
        place: for errors.

    Raises:
        ConfigError: an unknown rule, or one that lacks numbers.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str):
        raise ConfigError(f"{place} has rope_type = {kind!r:.80}, which must be a text; fetch the file again")
    given = {name: v for name, v in rope.items() if v is not None and name in FIELDS.get(kind, ())}
    values = read_fields(RopeScaling, given, place) | {"rope_type": kind}
    if window is not None:
        values.setdefault("original_max_position_embeddings", window)
    if missing := [name for name in _NEEDED.get(kind, ()) if values.get(name) is None]:
        raise ConfigError(
            f"{place} of type {kind!r} lacks {' and '.join(missing)}; write what the model was trained with"
        )
    if kind in ("yarn", "longrope") and "factor" not in values and window is not None:
        values["factor"] = max(1.0, window / max(values["original_max_position_embeddings"], 1))
    return RopeScaling(**values)


def longer_window(scaling: RopeScaling | None, window: int) -> int:
    """The window of a model whose `max_position_embeddings` may be those of the model before its scaling."""
    if scaling is None or scaling.rope_type not in LONGER:
        return window
    return max(window, int(scaling.factor * scaling.original_max_position_embeddings))
