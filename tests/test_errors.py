"""One class of errors for all that users can cause."""

from __future__ import annotations

import ast
import inspect

import pytest

from llama4 import errors
from tests.test_imports import is_in, modules

GRAMMARS = (
    *("llama4.text.tool_calls.literals", "llama4.text.tool_calls.spellings", "llama4.text.protobuf"),
    *("llama4.patterns", "llama4.text.byte_level"),
)
"""Their ValueErrors say that a text is no tool call, or bytes are no message, or that a pattern is none or takes too
long, and stay inside the package: who calls them knows the file."""


def test_there_is_one_base_class() -> None:
    assert errors.Llama4Error.__bases__ == (ValueError,)
    for _, each in inspect.getmembers(errors, inspect.isclass):
        assert each.__module__ != errors.__name__ or issubclass(each, errors.Llama4Error)


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_other_value_error_is_raised(module: str) -> None:
    if not is_in(module, *GRAMMARS):
        calls = (node for node in ast.walk(ast.parse(modules()[module].read_text())) if isinstance(node, ast.Call))
        assert "ValueError" not in {ast.unparse(call.func) for call in calls}
