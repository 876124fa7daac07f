"""The text of a reply -> the tools it calls, and the forms in which calls and tools are written in messages."""

from llama4.text.tool_calls.call import ToolCall, check_tools, function_name, new_id, read_call, short
from llama4.text.tool_calls.choice import as_resource, chosen_tools, free_call
from llama4.text.tool_calls.reader import CallReader, names_of
from llama4.text.tool_calls.spellings import MARKS
from llama4.text.tool_calls.whole import CutCall, WholeCallReader

__all__ = [
    "MARKS",
    "CallReader",
    "CutCall",
    "ToolCall",
    "WholeCallReader",
    "as_resource",
    "check_tools",
    "chosen_tools",
    "free_call",
    "function_name",
    "names_of",
    "new_id",
    "read_call",
    "short",
]
