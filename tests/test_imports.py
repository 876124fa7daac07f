"""The direction of imports: a module imports what stands in a line above its own, or in its own, and nothing below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LINES = (
    "llama4.errors llama4.units",
    "llama4.vision.config",
    "llama4.config",
    "llama4.text llama4.vision llama4.kernels llama4.tiny",
    "llama4.cache.formats",
    "llama4.ops",
    "llama4.model.batch llama4.cache",
    "llama4.model",
    "llama4.quantization",
    "llama4.families",
    "llama4.weights",
    "llama4.inputs",
    "llama4.engine",
    "llama4.api",
    "llama4.analysis",
    "llama4.bench",
    "llama4.cli",
    "llama4.__main__",
)
LINE = {package: line for line, packages in enumerate(LINES) for package in packages.split()}
FREE = {"llama4"}
"""`llama4/__init__.py` re-exports from everywhere, and is where the version stands."""


def modules() -> dict[str, Path]:
    """Every module by its installed name: the folder vision/ is `llama4.vision`."""
    paths = {f"llama4/{path.relative_to(ROOT)}": path for path in (ROOT / "vision").rglob("*.py")}
    paths |= {str(path.relative_to(ROOT)): path for path in (ROOT / "llama4").rglob("*.py")}
    names = {name.removesuffix(".py").replace("/", "."): path for name, path in sorted(paths.items())}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def line_of(module: str) -> int:
    """That of the longest listed prefix."""
    parts = module.split(".")
    return next(LINE[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LINE)


def imports(module: str, path: Path) -> Iterator[str]:
    """Modules of this project that one imports, anywhere in its code."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in modules()]
            yield from inner or [source]


@pytest.mark.parametrize("module", sorted(set(modules()) - FREE))
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(module, modules()[module]):
        if imported.split(".")[0] in ("llama4", "vision") and imported not in FREE:
            assert line_of(imported) <= line_of(module), f"{module} imports {imported}, which stands below it"


def test_vision_needs_only_the_errors() -> None:
    for module, path in modules().items():
        if module.startswith("llama4.vision"):
            ours = {imported for imported in imports(module, path) if imported.startswith("llama4.")}
            assert not {name for name in ours if not name.startswith(("llama4.vision", "llama4.errors"))}, module


def test_weights_never_import_the_model() -> None:
    for module, path in modules().items():
        if module.startswith("llama4.weights"):
            assert not {"llama4.model.multimodal", "llama4.model.attention", "llama4.model.moe"} & set(
                imports(module, path)
            )


def test_nothing_at_run_time_needs_transformers() -> None:
    for module, path in modules().items():
        if module in ("llama4.bench.parity", "llama4.bench.baselines"):  # which compare with it
            continue
        assert "transformers" not in {imported.split(".")[0] for imported in imports(module, path)}, module


def test_no_circles() -> None:
    """Not even through imports inside functions."""
    graph = {module: set(imports(module, path)) & set(modules()) for module, path in modules().items()}
    tuple(TopologicalSorter({module: found - FREE - {module} for module, found in graph.items()}).static_order())
