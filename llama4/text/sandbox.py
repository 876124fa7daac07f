"""Where a chat template runs: code from a downloaded file, in jinja2's sandbox, with bounds on its time and memory.

The dialect is that of transformers (utils/chat_template_utils.py): blocks are trimmed, loops can break, `tojson` does
not escape, `raise_exception` and `strftime_now` exist, and `{% generation %}` marks what the model says.

Filters and methods are those listed here; what they make is charged to a budget (template_budget.py).
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama4.errors import ChatTemplateError, ChatTemplateLimitError
from llama4.text.template_budget import BUDGET, GROWTH, Budget, LimitError, formatted_size, size_of

MAX_SOURCE = 1 << 18
"""Characters of a template; the longest that are in use have 30,000."""

# What a template may call on text, dictionaries and lists. Each takes and makes no more than it is given, but for those
# in `GROWTH`.
_TEXT_METHODS = (
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    float: frozenset(("is_integer",)),
    int: frozenset(),
    bytes: frozenset(),
}
_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort "
    "string title trim truncate unique upper"
)


class _Formatter(SandboxedFormatter):
    """`"{:5}".format(...)`."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{4}", format_spec):
            raise LimitError("it pads a number or a text too far")
        return BUDGET.get().charge(super().format_field(value, format_spec))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for what it makes."""
    growth = GROWTH.get(name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        if growth is not None:
            values = args[1:] if args and isinstance(args[0], (jinja2.Environment, nodes.EvalContext)) else args
            budget.spend(growth(*values, **kwargs))
        return budget.charge(function(*args, **kwargs))

    return call


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: object = "", attribute: str | int | None = None
) -> str:
    budget, parts = BUDGET.get(), []
    for part in value:
        part = part if attribute is None else environment.getitem(part, attribute)
        parts.append(str(budget.charge(part)))
    budget.spend(len(str(d)) * len(parts))
    return str(d).join(parts)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if isinstance(indent, int) and indent > 1000:
        raise LimitError("it indents too far")
    return _concat(encoder.iterencode(x))


def _concat(pieces: Iterable[str]) -> str:
    budget, kept = BUDGET.get(), []
    for piece in pieces:
        budget.spend(len(piece))
        kept.append(piece)
    return "".join(kept)


def _raise_exception(message: object) -> NoReturn:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"%[^a-zA-Z%]", format):
        raise LimitError("it pads a date too far")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` in a template: a function, not the class with all its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)`, whose attributes are a template's variables and show nothing else."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its output stands between the two characters of `environment.reply`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = self.environment.reply  # type: ignore[attr-defined]
        marks = [nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (begin, end)]
        return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    concat = staticmethod(_concat)  # of what macros, blocks and the whole template write

    def __init__(self, reply: str) -> None:
        # Constants are not computed in advance: that would be outside of the budget.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        self.reply = reply
        filters = {name: self.filters[name] for name in _FILTERS.split()} | {"join": _join, "tojson": _tojson}
        filters["_made"] = filters["_step"] = lambda value: value
        self.filters = {name: _bounded(name, function) for name, function in filters.items()}
        names = ("range", "cycler", "joiner")
        self.globals = {name: self.globals[name] for name in names} | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(value, types.BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            text = value.__self__
            if type(text) is str and value.__name__ == "format":
                return lambda *args, **kwargs: _Formatter(self).vformat(text, args, kwargs)
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = BUDGET.get()
        budget.spend(0)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "join" and args:
                return _join(__self, args[0], __obj.__self__)
            if growth := GROWTH.get(__obj.__name__):
                budget.spend(growth(__obj.__self__, *args, **kwargs))
        return budget.charge(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    budget.spend(size_of(value, budget.left) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            budget.spend(formatted_size(left, right))
        elif operator == "**" and not (abs(left) < 2**64 and abs(right) <= 64):
            raise LimitError("it computes with numbers that are too large")
        return budget.charge(super().call_binop(context, operator, left, right))


_SEARCHES = (
    "count endswith find index lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split startswith strip trim"
)
"""Methods and filters whose first argument is looked for in a text."""


class _Prepare(NodeTransformer):
    """Charges what no operator, filter or call makes, and marks the texts that the template writes.

    A literal that is compared with another value, or looked for in it, keeps its text: it is not written.
    """

    def __init__(self, mark: Callable[[str], str]) -> None:
        self._mark = mark

    def _visit_all(self, children: list[Any], *, searched: int = 0) -> list[Any]:
        """Children of a node, of which the first so many are looked for and not written."""
        mark, self._mark = self._mark, str
        try:
            first = [self.visit(child) for child in children[:searched]]
        finally:
            self._mark = mark
        return [*first, *(self.visit(child) for child in children[searched:])]

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._mark(node.data)).set_lineno(node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return nodes.Const(self._mark(node.value)).set_lineno(node.lineno) if isinstance(node.value, str) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node.expr, *node.ops = self._visit_all([node.expr, *node.ops], searched=1 + len(node.ops))
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        node.node, *node.args = self._visit_all([node.node, *node.args], searched=1 + len(node.args))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.arg, node.node = self._visit_all([node.arg, node.node], searched=1)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node.key, node.value = self._visit_all([node.key, node.value], searched=1)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        name = node.node.attr if isinstance(node.node, nodes.Getattr) else None
        args = self._visit_all(node.args, searched=name in _SEARCHES.split())
        node.args = []
        self.generic_visit(node)
        node.args = args
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        args = self._visit_all(node.args, searched=node.name in _SEARCHES.split())
        node.args = []
        self.generic_visit(node)
        node.args = args
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` -> `[a, b] | join`, which is charged."""
        return _filter(nodes.List(self._visit_all(node.nodes)), "join", node.lineno)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(node, "_made", node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), "_step", node.lineno)).set_lineno(node.lineno))
        return node


def _filter(node: nodes.Expr, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


class CompiledTemplate:
    """A template, ready to be rendered.

    Args:
        source: the template.
        reply: two characters, written before and after what is in `{% generation %}`.
        mark: what becomes of the texts that the template itself writes.

    Raises:
        ChatTemplateError: it is not a template, or too long.
    """

    def __init__(self, source: str, reply: str, mark: Callable[[str], str] = str) -> None:
        if len(source) > MAX_SOURCE:
            raise ChatTemplateLimitError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read"
            )

        def compile() -> jinja2.Template:
            environment = _Environment(reply)
            tree = _Prepare(mark).visit(environment.parse(source))
            return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))

        self._template = _run(compile, None)

    def render(self, variables: Mapping[str, Any]) -> str:
        """What the template writes.

        Raises:
            ChatTemplateError: it refuses these variables, fails on them, or takes too long or too much memory.
        """
        return _run(lambda: self._template.render(variables), variables)


def _run(work: Callable[[], Any], given: object) -> Any:
    token = BUDGET.set(Budget(given))
    try:
        return work()
    except ChatTemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template is malformed in line {error.lineno}: {error.message}") from error
    except LimitError as error:
        raise ChatTemplateLimitError(f"the chat template was stopped: {error}") from None
    except RecursionError:
        raise ChatTemplateLimitError("the chat template was stopped: it nests too deep") from None
    except Exception as error:  # whatever its operations raise
        raise ChatTemplateError(f"the chat template fails: {type(error).__name__}: {error}") from error
    finally:
        BUDGET.reset(token)
