"""The direction of imports: a module imports what stands in a line above its own, or in its own, and nothing below."""

from __future__ import annotations

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.oracles import ORACLES

ROOT = Path(__file__).parents[1]

LINES = (
    "llama4.arguments llama4.control_groups llama4.errors llama4.files llama4.forks llama4.gguf llama4.patterns "
    "llama4.progress llama4.reading llama4.units llama4.version",
    "llama4.vision.config llama4.vision.tiled_config",
    "llama4.config",
    "llama4.text llama4.vision llama4.kernels llama4.tiny",
    "llama4.cache.formats",
    "llama4.ops",
    "llama4.cache",
    "llama4.model",
    "llama4.quantization",
    "llama4.families",
    "llama4.weights",
    "llama4.adapters",
    "llama4.inputs",
    "llama4.engine",
    "llama4.options",
    "llama4.api",
    "llama4.integrations",
    "llama4.train",
    "llama4.serve",
    "llama4.analysis",
    "llama4.bench",
    "llama4.cli",
    "llama4.__main__",
)
LINE = {package: line for line, packages in enumerate(LINES) for package in packages.split()}
FREE = {"llama4"}
"""`llama4/__init__.py` re-exports from everywhere."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its installed name: the folder vision/ is `llama4.vision`."""
    paths = {f"llama4/{path.relative_to(ROOT)}": path for path in (ROOT / "vision").rglob("*.py")}
    paths |= {str(path.relative_to(ROOT)): path for path in (ROOT / "llama4").rglob("*.py")}
    names = {name.removesuffix(".py").replace("/", "."): path for name, path in sorted(paths.items())}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


COMPARE_WITH_TRANSFORMERS = (
    "llama4.bench.parity",
    "llama4.bench.baselines",
    "llama4.bench.perplexity",
    "llama4.bench.peft_baseline",
    "llama4.bench.device.transformers_baseline",
)


def line_of(module: str) -> int:
    """That of the longest listed prefix."""
    parts = module.split(".")
    return next(LINE[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LINE)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """All modules that one imports, anywhere in its code."""
    path = modules()[module]
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {alias.name for alias in node.names}
            inner = {name for name in names if f"{source}.{name}" in modules()}
            found.update(f"{source}.{name}" for name in inner)
            if names - inner:
                found.add(source)
    return frozenset(found)


def is_in(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", sorted(set(modules()) - FREE))
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(module):
        assert not is_in(imported, "vision", "tests", "examples"), "a name that is not installed"
        if is_in(imported, "llama4") and imported not in FREE:
            assert line_of(imported) <= line_of(module), f"{module} imports {imported}, which stands below it"


def test_no_circles() -> None:
    """Not even through imports inside functions."""
    graph = {module: imports(module) & set(modules()) - FREE - {module} for module in modules()}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [module for module in modules() if is_in(module, "llama4.vision")])
def test_vision_needs_only_errors_and_progress(module: str) -> None:
    ours = {imported for imported in imports(module) if is_in(imported, "llama4")}
    assert all(is_in(imported, "llama4.vision", "llama4.errors", "llama4.progress") for imported in ours)


@pytest.mark.parametrize("module", sorted(set(modules()) - FREE))
def test_kernels_are_known_to_few(module: str) -> None:
    """Formats of weights name what kernels take (abi); all else goes through ops."""
    if not is_in(module, "llama4.kernels", "llama4.ops", "llama4.engine", "llama4.bench"):
        known = {imported for imported in imports(module) if is_in(imported, "llama4.kernels")}
        assert known <= ({"llama4.kernels.abi"} if is_in(module, "llama4.quantization") else set())


PREDICATE = re.compile(r"\w*unsupported_reason|has_\w+_kernel\w*")
"""What is asked before a faster way is taken."""
ASK = (
    *("llama4.kernels", "llama4.ops", "llama4.bench"),
    *("llama4.engine.fused_cpu", "llama4.engine.fused_model", "llama4.engine.cuda_graphs"),
)
RESOLVE = {
    "llama4.model.experts": {"backend", "preferred", "BACKENDS[name]"},  # a backend is chosen when a model is built
    "llama4.engine.runner": {"runner"},  # and a runner when some steps begin
}
"""Whose `unsupported_reason` is asked there."""


@pytest.mark.parametrize("module", sorted(modules()))
def test_ways_are_chosen_in_ops(module: str) -> None:
    """What is above asks for an operation, and for no kernel's opinion."""
    if not is_in(module, *ASK):
        tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
        functions = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        asked = [name.rpartition(".") for name in functions if PREDICATE.fullmatch(name.rpartition(".")[2])]
        assert {owner for owner, _, _ in asked} <= RESOLVE.get(module, set()), asked


@pytest.mark.parametrize("module", [module for module in modules() if is_in(module, "llama4.weights")])
def test_weights_do_not_know_the_model(module: str) -> None:
    # convert makes one, without memory, to know its tensors; calibrating runs its layers, one at a time
    if module not in ("llama4.weights.convert", "llama4.weights.calibrating"):
        assert not {imported for imported in imports(module) if is_in(imported, "llama4.model")}


@pytest.mark.parametrize("module", sorted(modules()))
def test_references_are_not_needed_at_run_time(module: str) -> None:
    if is_in(module, "llama4.integrations"):
        assert not {imported for imported in imports("llama4.api") if is_in(imported, "llama4.integrations")}
    elif not is_in(module, "llama4.bench"):
        assert not {imported.split(".")[0] for imported in imports(module)} & set(ORACLES)
    elif not is_in(module, *COMPARE_WITH_TRANSFORMERS):
        assert not {imported for imported in imports(module) if is_in(imported, "transformers")}
