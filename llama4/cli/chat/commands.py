"""The commands of a conversation, and what Tab makes of the beginning of a line."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4.cli.chat.conversation import Conversation
from llama4.cli.options import CHAT
from llama4.errors import ArgumentError, Llama4Error
from llama4.files import user_path

LEAVING = ("/quit", "/exit", "/bye")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_COMPLETIONS = 200


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: does it; what it returns is printed.
        argument: how it is written in the help.
        about: what it does.
        endings: of the files that Tab offers; None where no file is named.
    """

    run: Callable[[Conversation, str], str]
    argument: str
    about: str
    endings: tuple[str, ...] | None = None


def run_command(conversation: Conversation, name: str, argument: str) -> str:
    """Raises:
    Llama4Error: what the command cannot do.
    """
    return COMMANDS[name].run(conversation, argument)


def _image(conversation: Conversation, argument: str) -> str:
    names = file_names(argument)
    if not names:
        raise Llama4Error("/image needs a file, such as /image photo.jpg")
    told = []
    for name in names:
        told.append(f"Added picture {conversation.add_picture(name)} to your next message.")
    return "\n".join(told)


def _system(conversation: Conversation, argument: str) -> str:
    if not argument:
        return conversation.system or "There are no instructions; /system TEXT gives some."
    conversation.system = None if argument in ("-", '""', "''") else argument
    return "The instructions hold from your next message on." if conversation.system else "No instructions any more."


def _clear(conversation: Conversation, argument: str) -> str:
    conversation.clear()
    return "A new conversation."


def _undo(conversation: Conversation, argument: str) -> str:
    if not conversation.undo():
        raise Llama4Error("there is nothing to take back")
    return "Took back your last message and its reply."


def _retry(conversation: Conversation, argument: str) -> str:
    conversation.retry()
    return ""


def _save(conversation: Conversation, argument: str) -> str:
    path = _one_file(argument, "/save")
    return f"Saved {conversation.save(path)} messages in {path}."


def _load(conversation: Conversation, argument: str) -> str:
    path = _one_file(argument, "/load")
    return f"Loaded {conversation.load(path)} messages of {path}."


def _set(conversation: Conversation, argument: str) -> str:
    name, _, text = argument.partition(" ")
    name, text = name.replace("-", "_").rstrip("="), text.strip().removeprefix("=").strip()
    if not name:
        values = conversation.options
        return "\n".join(f"{name} {'(not set)' if values.get(name) is None else values[name]}" for name in CHAT)
    if name not in CHAT:
        raise ArgumentError(f"there is no option {name!r:.40}; there are {', '.join(CHAT)}")
    if not text:
        conversation.options[name] = CHAT[name].get("default")
        return f"{name} is as at first."
    conversation.options[name] = value = _value(name, text)
    return f"{name} is {value} from your next message on."


def _value(name: str, text: str) -> Any:
    if CHAT[name].get("action") == "append":
        return [text]
    try:
        return CHAT[name]["type"](text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        kind = CHAT[name]["type"].__name__
        raise ArgumentError(f"{text!r:.40} is no value for {name}, which is {kind} ({error})") from None


def _help(conversation: Conversation, argument: str) -> str:
    return help_text()


def help_text() -> str:
    rows = [
        (f"{name} {command.argument}".rstrip(), command.about) for name, command in COMMANDS.items() if command.about
    ]
    lines = [f"  {row:<18}{about}" for row, about in rows]
    return "\n".join(["Write a message and press Enter.", *lines, *NOTES])


COMMANDS = {
    "/image": Command(_image, "FILE ...", "add pictures to your next message", PICTURES),
    "/system": Command(_system, "TEXT", 'instructions before the conversation; "" for none'),
    "/set": Command(_set, "NAME VALUE", "an option of replies, such as temperature; without a value as at first"),
    "/retry": Command(_retry, "", "answer your last message again"),
    "/undo": Command(_undo, "", "take back your last message and its reply"),
    "/save": Command(_save, "FILE", "write the conversation as JSON", (".json",)),
    "/load": Command(_load, "FILE", "go on with a conversation that was saved", (".json",)),
    "/clear": Command(_clear, "", "start a new conversation (so does /reset)"),
    "/reset": Command(_clear, "", ""),
    "/help": Command(_help, "", "show this"),
}
NOTES = (
    "  /quit             leave (so does Ctrl-D)",
    'Several lines: between """ and """, or with Alt-Enter. Tab completes commands and files. Ctrl-C stops a reply.',
)


def file_names(text: str) -> list[str]:
    """The files that a line names: all of it if there is such a file, else what a shell would make of it, with quotes
    and backslashes (as terminals write the name of a file that is dropped on them).

    Raises:
        ArgumentError: a quote without its other half.
    """
    text = text.strip()
    if not text or _is_file(text):
        return [text] if text else []
    try:
        return shlex.split(text)
    except ValueError:
        raise ArgumentError(f"in {text:.80} a quote is open; close it, or leave quotes out") from None


def _is_file(text: str) -> bool:
    try:
        return user_path(text).is_file()
    except (OSError, ValueError):
        return False


def _one_file(argument: str, command: str) -> Path:
    names = file_names(argument)
    if len(names) != 1:
        raise Llama4Error(f"{command} needs one file, such as {command} talk.json")
    return user_path(names[0])


def completions(line: str) -> list[str]:
    """Lines that a line up to the cursor may become."""
    name, space, argument = line.partition(" ")
    if not space:
        return [f"{word} " for word in (*COMMANDS, *LEAVING) if word.startswith(name)] if name.startswith("/") else []
    if name == "/set":
        return [f"/set {option} " for option in CHAT if option.startswith(argument)]
    command = COMMANDS.get(name)
    if command is None or command.endings is None:
        return []
    before, typed = _last_name(argument)
    return [f"{name} {before}{quoted(path)}" for path in _paths(typed, command.endings)]


def _last_name(argument: str) -> tuple[str, str]:
    """What stands before the name that is being typed, and that name without its quotes and backslashes."""
    start, name, quote, is_escaped = 0, "", "", False
    for i, character in enumerate(argument):
        if is_escaped or (quote and character != quote and not (quote == '"' and character == "\\")):
            name, is_escaped = name + character, False
        elif character == "\\":
            is_escaped = True
        elif character in "'\"":
            quote = "" if quote else character
        elif character == " ":
            start, name = i + 1, ""
        else:
            name += character
    return argument[:start], name


def _paths(typed: str, endings: tuple[str, ...]) -> list[str]:
    """Directories, and files with these endings, whose name goes on from what was typed."""
    head, tail = os.path.split(typed)
    found = []
    try:
        with os.scandir(user_path(head or ".")) as entries:
            for entry in entries:
                if not entry.name.startswith(tail) or (entry.name.startswith(".") and not tail):
                    continue
                if entry.is_dir():
                    found.append(os.path.join(head, entry.name) + "/")
                elif entry.name.lower().endswith(endings):
                    found.append(os.path.join(head, entry.name))
    except (OSError, ValueError):
        return []
    return sorted(found)[:MAX_COMPLETIONS]


def quoted(path: str) -> str:
    """A name as it is typed: in quotes if it needs them, open ones behind a directory, where it goes on."""
    text = path if path.startswith("~") and " " not in path else shlex.quote(path)
    return text.removesuffix("'") if path.endswith("/") and text != path else text
