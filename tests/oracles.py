"""The references that tests compare with are named exactly in pyproject.toml. Beside another version of one, the tests
that reach it are skipped, and say so: what it computes has not been looked at (docs/development/versions.md)."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
ORACLES = (
    "transformers",
    "llama_models",
    "compressed_tensors",
    "bitsandbytes",
    "tokenizers",
    "sentencepiece",
    "accelerate",
    "peft",
)
OURS = ("tests", "llama4.bench")
"""Code that reaches a reference."""


def named() -> dict[str, str]:
    """The exact version of each package of the extra `test`, by its module's name; empty where none is named."""
    extra = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["test"]
    return {name.replace("-", "_"): exact for name, _, exact in (entry.partition("==") for entry in extra)}


def strangers() -> dict[str, str]:
    """Modules whose installed version is not the one named, each with a sentence about it."""
    exact = named()
    found = {module: installed(module) for module in ORACLES}
    return {
        module: f"{module} {found[module]} is installed; the reference is {exact[module]}"
        if found[module]
        else f"{module} is not installed"
        for module in ORACLES
        if found[module] != exact[module]
    }


def installed(module: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return version(module)
    except PackageNotFoundError:
        return None


def reached(item: pytest.Function) -> set[str]:
    """References that a test, its fixtures, and what of ours they call mention."""
    seen: set[int] = set()
    found: set[str] = set()

    def visit(value: Any, names: set[str]) -> None:
        if id(value) in seen and not isinstance(value, ModuleType):
            return
        seen.add(id(value))
        if isinstance(value, str):
            found.update(oracle for oracle in ORACLES if f"import {oracle}" in value or f"from {oracle}" in value)
            return
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        if (root := str(home).partition(".")[0]) in ORACLES:
            found.add(root)
        elif not str(home).startswith(OURS):
            return
        elif isinstance(value, ModuleType):
            for name in names:
                visit(vars(value).get(name), names)
        elif isinstance(value, type):
            for part in (*value.__bases__, *vars(value).values()):
                visit(part, names)
        elif callable(value):
            function = getattr(getattr(value, "hypothesis", None), "inner_test", None) or inspect.unwrap(value)
            if isinstance(function, FunctionType):
                mentioned = set(mentions(function.__code__))
                found.update(root for name in mentioned if (root := name.partition(".")[0]) in ORACLES)
                for name in mentioned:
                    visit(function.__globals__.get(name), mentioned)
                    visit(getattr(item.cls, name, None), mentioned)

    callspec = getattr(item, "callspec", None)
    fixtures = [definition.func for several in item._fixtureinfo.name2fixturedefs.values() for definition in several]
    for value in (item.function, *fixtures, *(callspec.params.values() if callspec else ())):
        visit(value, set())
    return found


def mentions(code: CodeType) -> Iterator[str]:
    """Names in it, and in what is defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from mentions(constant)


def skip_what_reaches_a_stranger(items: list[pytest.Item]) -> None:
    if not (reasons := strangers()):
        return
    for item in items:
        if isinstance(item, pytest.Function):
            for oracle in sorted(reached(item) & set(reasons)):
                item.add_marker(pytest.mark.skip(reason=reasons[oracle]))
