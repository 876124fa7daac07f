"""What a form of replies may ask for: llguidance would read some for minutes, or end the process, as it goes through
what stands inside one another by calling itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
"""Schemas with patterns or formats that may have to fit one value, in a form that has more of them than this: their
common texts are looked for. Of 10 patterns it takes a tenth of a second, of 12 three, of 14 minutes."""
MAX_PROPERTIES = 5000
"""Properties in a schema, as many as OpenAI takes. They take a second."""
MAX_OPTIONAL = 1000
"""Properties of one object that it may leave out: any may follow any of those before it. They take 0.2 s, six times of
them five, and as many choices of what comes next are too many for llguidance."""
MAX_PATTERN_PROPERTIES = 100
"""Patterns of names in a schema: of any two it is seen whether one name may fit both. Of 100 short ones it takes 0.1 s,
of long ones 0.5; of 200 two."""
MAX_DEPTH = 1000
"""Schemas inside one another, those that references lead to one behind the other. A stack of 8 MiB holds 1,600."""
MAX_NAMED = 1000
"""Schemas with names ($id, $anchor), where references are to names."""
MAX_RULES = 2000
"""Rules and brackets of a grammar, which may all stand inside one another. A stack of 8 MiB holds 2,400."""
MAX_MULTIPLE = 10_000
"""The product of what a number may have to be a multiple of, without factors of 2 and 5, alternatives too: there is
a state for each of their remainders. It takes 0.2 s, ten times of it three."""
MAX_MULTIPLES = 10 * MAX_MULTIPLE
"""The sum of all in a schema."""


NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords of schemas by name."""
DEFINITIONS = {"$defs", "definitions"}
"""Those that nothing follows unless a reference leads there."""
DATA = {"enum", "const", "default", "example", "examples"}
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
    _check_properties(parts, name)
    _check_depth(schema, [part for part in parts if _NAMES & part.keys()], name)
    patterns, multiples = _patterns(parts), _multiples(parts)
    check_size(name, sum(map(len, patterns)), MAX_EXPRESSIONS, " of patterns")
    if len(patterns) > MAX_TOGETHER < _most_together(schema, ("pattern", "format"), {"allOf"}):
        raise ArgumentError(
            f"{name} joins more than {MAX_TOGETHER} schemas, with as many patterns or formats, by allOf and $ref; "
            "whether any text fits them all would be looked for without end: write fewer, larger ones"
        )
    together = _most_together(schema, ("multipleOf",), {"allOf", "anyOf", "oneOf"}) if len(multiples) > 1 else 1
    largest = sorted({*multiples}, reverse=True)[:together]
    if math.prod(largest) > MAX_MULTIPLE or sum(multiples) > MAX_MULTIPLES:
        raise ArgumentError(
            f"{name} has multipleOf {' and '.join(map(str, largest[:3]))}, for which more than "
            f"{MAX_MULTIPLE:,} remainders would be followed; take smaller numbers"
        )


def _check_properties(parts: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises:
    ArgumentError: objects have more properties than are read in a second.
    """
    declared, optional, patterns = 0, 0, 0
    for part in parts:
        if isinstance(properties := part.get("properties"), dict):
            required = part.get("required")
            needed = {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()
            declared, optional = declared + len(properties), max(optional, len(properties.keys() - needed))
        if isinstance(named := part.get("patternProperties"), dict):
            patterns += len(named)
    for count, most, what, remedy in (
        (declared, MAX_PROPERTIES, "properties", "take fewer"),
        (optional, MAX_OPTIONAL, "properties of one object that it may leave out", "name others in required"),
        (patterns, MAX_PATTERN_PROPERTIES, "patternProperties", "take fewer"),
    ):
        if count > most:
            raise ArgumentError(f"{name} has {count:,} {what}, more than {most:,}; {remedy}")


def _schemas(node: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all in it."""
    if isinstance(node, list):
        for child in node:
            yield from _schemas(child)
    elif isinstance(node, dict):
        yield node
        yield from _schemas([held for _, held in _inside(node)])


def _inside(schema: Mapping[str, Any], but: Set[str] = DATA) -> Iterator[tuple[str, list[Any]]]:
    """What holds the schemas of a schema, by keyword."""
    for keyword, value in schema.items():
        if keyword not in but:
            named = keyword in NAMED and isinstance(value, dict)
            yield keyword, [*value.values()] if named else value if isinstance(value, list) else [value]


def _patterns(schemas: Sequence[Mapping[str, Any]]) -> set[str]:
    """All patterns and formats in schemas, those of names too."""
    found = set[str]()
    for part in schemas:
        found |= {f"{name} {part[name]}" for name in ("pattern", "format") if isinstance(part.get(name), str)}
        if isinstance(named := part.get("patternProperties"), dict):
            found.update(named)
    return found


def _multiples(schemas: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of what numbers have to be multiples, as integers without factors of 2 and 5."""
    found = list[int]()
    for part in schemas:
        value = part.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            whole = int("".join(map(str, Decimal(str(value)).as_tuple().digits)))
            for factor in (2, 5):
                while whole % factor == 0:
                    whole //= factor
            found.append(whole)
    return [whole for whole in found if whole > 1]


Roots: TypeAlias = tuple[Any, ...]
"""From what references may go: the whole schema, and parts of it that have a name."""
Reference: TypeAlias = tuple[str, int]
"""As it is written, and the identity of the part with a name in which it stands."""
_Edges: TypeAlias = Mapping[Reference, Iterable[Reference]]
_NAMES = {"$id", "id", "$anchor", "$dynamicAnchor"}


def _check_depth(schema: Mapping[str, Any], named: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises:
    ArgumentError: schemas may stand more than `MAX_DEPTH` deep inside one another, references followed, or one leads
        nowhere.
    """
    places: dict[int, Roots] = {}
    _find_places(schema, (schema,), places)
    heights: dict[Reference, int] = {}
    edges: dict[Reference, dict[Reference, Roots]] = {}
    read: dict[int, tuple[int, dict[Reference, Roots]]] = {}
    start = "#", id(schema)
    waiting: dict[Reference, Roots] = {start: (schema,)}
    while waiting:
        reference, roots = waiting.popitem()
        heights[reference], edges[reference] = 0, {}
        for target in _referred(reference[0], roots, named, name):
            if isinstance(target, dict | list) and id(target) not in places:
                raise ArgumentError(f"{name} refers to {reference[0]!r:.80}, which is no schema; refer to one")
            if id(target) not in read:
                found: dict[Reference, Roots] = {}
                read[id(target)] = _height(target, places, found), found
            height, found = read[id(target)]
            heights[reference] = max(height, heights[reference])
            edges[reference] |= found
        waiting |= {each: where for each, where in edges[reference].items() if each not in edges}
    if _longest(start, edges, heights) > MAX_DEPTH:
        raise ArgumentError(
            f"{name} refers to schemas that may stand more than {MAX_DEPTH:,} deep inside one another; take fewer"
        )


def _inner(roots: Roots, node: Mapping[str, Any]) -> Roots:
    return (*roots, node) if "$id" in node or "id" in node else roots


def _find_places(node: Any, roots: Roots, places: dict[int, Roots]) -> None:
    """From what the references of each schema go, by its identity."""
    if isinstance(node, list):
        for child in node:
            _find_places(child, roots, places)
    elif isinstance(node, dict):
        places[id(node)] = roots = _inner(roots, node)
        _find_places([held for _, held in _inside(node)], roots, places)


def _referred(reference: str, roots: Roots, named: Sequence[Mapping[str, Any]], name: str) -> Sequence[Any]:
    """What it may lead to."""
    base, _, fragment = reference.partition("#")
    is_path = fragment[:1] in ("", "/")
    if (base or not is_path) and len(named) > MAX_NAMED:
        raise ArgumentError(f"{name} refers to {reference!r:.80}, and more than {MAX_NAMED:,} have names; use paths")
    if is_path:
        targets: Sequence[Any] = _targets(fragment, (*roots, *named) if base else roots)
    else:
        targets = [part for part in named if fragment in (part.get("$anchor"), part.get("$dynamicAnchor"))] or named
    if not targets:
        raise ArgumentError(f"{name} refers to {reference!r:.80}, which is not in it; refer to what is")
    return targets


def _height(node: Any, places: Mapping[int, Roots], found: dict[Reference, Roots]) -> int:
    """How many schemas stand inside one another, without references.

    Args:
        found: gets the references in them.
    """
    if isinstance(node, list):
        return max((_height(child, places, found) for child in node), default=0)
    if not isinstance(node, dict):
        return 0
    if isinstance(reference := node.get("$ref"), str):
        roots = places[id(node)]
        found[reference, id(roots[-1])] = roots
    return 1 + _height([held for _, held in _inside(node, DATA | DEFINITIONS)], places, found)


def _longest(start: Reference, edges: _Edges, heights: Mapping[Reference, int]) -> int:
    """The largest sum of heights along edges; all of those that lead to one another count, as llguidance reads what a
    reference leads to once."""
    order = _after_what_follows(start, edges, set())
    back: dict[Reference, list[Reference]] = {each: [] for each in order}
    for each in order:
        for following in edges[each]:
            back[following].append(each)
    sums: dict[Reference, int] = {}
    seen = set[Reference]()
    for each in reversed(order):
        if each not in seen:
            group = _after_what_follows(each, back, seen)
            before = max((sums.get(one, 0) for member in group for one in back[member]), default=0)
            sums |= dict.fromkeys(group, before + sum(heights[member] for member in group))
    return max(sums.values())


def _after_what_follows(start: Reference, edges: _Edges, seen: set[Reference]) -> list[Reference]:
    """All that can be reached and has not been seen, each behind what it leads to."""
    seen.add(start)
    found, path = list[Reference](), [(start, iter(edges[start]))]
    while path:
        following = next((each for each in path[-1][1] if each not in seen), None)
        if following is None:
            found.append(path.pop()[0])
        else:
            seen.add(following)
            path.append((following, iter(edges[following])))
    return found


def _most_together(schema: Mapping[str, Any], keywords: Sequence[str], adding: Set[str]) -> int:
    """How many schemas with one of some keywords one value has to fit at most.

    Args:
        adding: keywords of lists of which all count, not only the one with most.
    """
    known: dict[int, int] = {}
    for _ in range(3):  # what is inside itself counts as it did before
        together = _together(schema, (schema,), (keywords, adding), known, set())
    return together


def _together(
    node: Any, roots: Roots, rule: tuple[Sequence[str], Set[str]], known: dict[int, int], seen: set[int]
) -> int:
    """
    Args:
        known: what has been found, by the identity of a schema.
        seen: the schemas of which it has been found, or is being looked for.
    """
    if not isinstance(node, dict | list) or id(node) in seen:
        return known.get(id(node), 0)
    if isinstance(node, list):
        return max((_together(child, roots, rule, known, seen) for child in node), default=0)
    seen.add(id(node))
    roots = _inner(roots, node)
    keywords, adding = rule
    inside, joined = int(any(isinstance(node.get(keyword), str | int | float) for keyword in keywords)), 0
    for keyword, held in _inside(node):
        counts = [_together(child, roots, rule, known, seen) for child in held]
        count = sum(counts) if keyword in adding else max(counts, default=0)
        if keyword in ("allOf", "anyOf", "oneOf", "patternProperties"):
            joined += count
        else:
            inside = max(inside, count)
    if isinstance(reference := node.get("$ref"), str):
        targets = _targets(reference.removeprefix("#"), roots) if reference.startswith("#") else []
        # by a name instead of a path: unknown
        joined += _together(targets, roots, rule, known, seen) if targets else MAX_TOGETHER
    known[id(node)] = inside + joined
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
