"""What a form of replies may ask for: llguidance would read some for minutes, or end the process, as it goes through
what stands inside one another by calling itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias
from urllib.parse import unquote

from llama4.errors import ArgumentError

MAX_SIZE = 1 << 18
"""Characters of a schema, or of choices as one expression, before escapes: llguidance reads them in some tenths of a
second."""
MAX_EXPRESSIONS = 1 << 15
"""Characters of a regular expression or grammar, or of a schema's patterns: of the longest the worst take a second and
100 MiB; both grow with the square of the length."""
MAX_TOGETHER = 8
"""Schemas that may have to fit one value, in a form that has more patterns and formats than this. Each may bring a
pattern, and llguidance is asked for the common texts: of 10 patterns it takes a tenth of a second, of 12 three, of 14
minutes. Which of the schemas have the patterns is not looked at."""
MAX_DEPTH = 1000
"""Schemas inside one another, those that references lead to one behind the other. A stack of 8 MiB holds 1,200."""
MAX_NAMED = 1000
"""Schemas with names ($id, $anchor), where references are to names."""
MAX_RULES = 2000
"""Rules and brackets of a grammar, which may all stand inside one another. A stack of 8 MiB holds 2,400."""
MAX_MULTIPLE = 10_000
"""What integers may have to be multiples of, without factors of 2 and 5: there is a state for each remainder. It takes
0.2 s, ten times of it three."""


NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords of schemas by name."""
DATA = {"enum", "const", "default", "examples"}
"""Keywords of no schemas."""


def check_size(name: str, size: int, most: int, what: str = "") -> None:
    """Raises:
    ArgumentError: there is more than may be.
    """
    if size > most:
        problem = f"{size:,} characters{what} are more than {most:,}"
        raise ArgumentError(f"{name} cannot be followed: {problem}; make it shorter")


def check_grammar(grammar: str) -> None:
    """Raises:
    ArgumentError: one in Lark's syntax that is too long, or may go too deep.
    """
    check_size("grammar", len(grammar), MAX_EXPRESSIONS)
    if re.search(r"%json\s*\{", grammar):
        raise ArgumentError("grammar has a %json schema, which is not checked there; give it as response_format")
    if (found := sum(map(grammar.count, ":(["))) > MAX_RULES:
        raise ArgumentError(f"grammar has {found:,} rules and brackets, more than {MAX_RULES:,}; make it smaller")


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """Raises:
    ArgumentError: what is not followed as it is meant, or not in any time.
    RecursionError: schemas inside one another without end.
    """
    parts = [*_schemas(schema)]
    if any(
        "prefixItems" in part and ("additionalItems" in part or isinstance(part.get("items"), list)) for part in parts
    ):
        raise ArgumentError(
            f"{name} has prefixItems beside additionalItems, or a list of items, of older drafts, which alone would "
            "count; write what follows as items: a schema, or false"
        )
    _check_depth(schema, parts, name)
    patterns, multiples = _patterns(parts), _multiples(parts)
    check_size(name, sum(map(len, patterns)), MAX_EXPRESSIONS, " of patterns")
    together = _together(schema, (schema,), {}) if len(patterns) > MAX_TOGETHER or len(multiples) > 1 else 1
    if len(patterns) > MAX_TOGETHER < together:
        raise ArgumentError(
            f"{name} joins more than {MAX_TOGETHER} schemas, with as many patterns or formats, by allOf and $ref; "
            "whether any text fits them all would be looked for without end: write fewer, larger ones"
        )
    if math.prod(multiples[:together]) > MAX_MULTIPLE:
        raise ArgumentError(
            f"{name} has multipleOf {' and '.join(map(str, multiples[:together][:3]))}, for which more than "
            f"{MAX_MULTIPLE:,} remainders would be followed; take smaller numbers"
        )


def _schemas(node: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all in it."""
    if isinstance(node, list):
        for child in node:
            yield from _schemas(child)
    elif isinstance(node, dict):
        yield node
        yield from _schemas([*_inside(node)])


def _inside(schema: Mapping[str, Any]) -> Iterator[Any]:
    """What holds the schemas of a schema."""
    for keyword, value in schema.items():
        if keyword in NAMED and isinstance(value, dict):
            yield from value.values()
        elif keyword not in DATA:
            yield value


def _patterns(schemas: Sequence[Mapping[str, Any]]) -> set[str]:
    """All patterns and formats in schemas, those of names too."""
    found = set[str]()
    for part in schemas:
        found |= {f"{name} {part[name]}" for name in ("pattern", "format") if isinstance(part.get(name), str)}
        if isinstance(named := part.get("patternProperties"), dict):
            found.update(named)
    return found


def _multiples(schemas: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of what numbers have to be multiples, as integers without factors of 2 and 5; the largest first."""
    found = set[int]()
    for part in schemas:
        value = part.get("multipleOf")
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            whole = int("".join(map(str, Decimal(str(value)).as_tuple().digits)))
            for factor in (2, 5):
                while whole % factor == 0:
                    whole //= factor
            found.add(whole)
    return sorted(found - {1}, reverse=True)


def _check_depth(schema: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises:
    ArgumentError: schemas may stand more than `MAX_DEPTH` deep inside one another, references followed. Which of those
        that references lead to is reached from which is not looked at.
    """
    heights: dict[int, int] = {}
    references: dict[tuple[str, int], Roots] = {}
    depth, counted = _height(schema, (schema,), heights, references), {id(schema)}
    named = [part for part in parts if _NAMES & part.keys()]
    for (reference, _), roots in references.items():
        base, _, fragment = reference.partition("#")
        is_path = fragment[:1] in ("", "/")
        if (base or not is_path) and len(named) > MAX_NAMED:
            raise ArgumentError(
                f"{name} refers to {reference!r:.80}, and more than {MAX_NAMED:,} have names; use paths"
            )
        targets = _targets(fragment, (*roots, *named) if base else roots) if is_path else named
        if not targets:
            raise ArgumentError(f"{name} refers to {reference!r:.80}, which is not in it; refer to what is")
        for target in targets:
            if isinstance(target, dict | list) and id(target) not in heights:
                raise ArgumentError(f"{name} refers to {reference!r:.80}, which is no schema; refer to one")
            if id(target) not in counted:
                counted.add(id(target))
                depth += heights.get(id(target), 0)
        if depth > MAX_DEPTH:
            raise ArgumentError(
                f"{name} refers to schemas that may stand more than {MAX_DEPTH:,} deep inside one another; take fewer"
            )


Roots: TypeAlias = tuple[Any, ...]
"""From what references may go: the whole schema, and parts of it that have a name."""
_NAMES = {"$id", "id", "$anchor", "$dynamicAnchor"}


def _inner(roots: Roots, node: Mapping[str, Any]) -> Roots:
    return (*roots, node) if "$id" in node or "id" in node else roots


def _height(node: Any, roots: Roots, heights: dict[int, int], references: dict[tuple[str, int], Roots]) -> int:
    """How many schemas stand inside one another, without references.

    Args:
        heights: what has been found, by the identity of a schema.
        references: all that have been found, and from where each may start; by that place, too.
    """
    if isinstance(node, list):
        return max((_height(child, roots, heights, references) for child in node), default=0)
    if not isinstance(node, dict):
        return 0
    roots = _inner(roots, node)
    if isinstance(reference := node.get("$ref"), str):
        references[reference, id(roots[-1])] = roots
    heights[id(node)] = 1 + _height([*_inside(node)], roots, heights, references)
    return heights[id(node)]


def _together(node: Any, roots: Roots, known: dict[int, int]) -> int:
    """How many schemas one value has to fit at most.

    Args:
        known: what has been found, by the identity of a schema; of one that is being looked at, 0.
    """
    if isinstance(node, list):
        return max((_together(child, roots, known) for child in node), default=0)
    if not isinstance(node, dict):
        return 0
    if id(node) not in known:
        known[id(node)] = 0
        roots = _inner(roots, node)
        joined = [*node["allOf"]] if isinstance(node.get("allOf"), list) else []
        unknown = 0
        if isinstance(reference := node.get("$ref"), str):
            targets = _targets(reference.removeprefix("#"), roots) if reference.startswith("#") else []
            joined.append(targets)
            unknown = 0 if targets else MAX_TOGETHER  # by a name instead of a path
        inside = max((_together(child, roots, known) for name, child in node.items() if name != "allOf"), default=0)
        known[id(node)] = max(1, inside) + unknown + sum(_together(child, roots, known) for child in joined)
    return known[id(node)]


def _targets(pointer: str, roots: Roots) -> list[Any]:
    """What `/a/b` may point at: that may start at one of several."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in unquote(pointer).split("/")]
    found = []
    if not parts[0]:
        for node in roots:
            for part in parts[1:]:
                if isinstance(node, list):
                    node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
                else:
                    node = node.get(part) if isinstance(node, dict) else None
            if node is not None:
                found.append(node)
    return found
