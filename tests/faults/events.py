"""What a process does to files, seen call by call, and stopped at one of them: ptrace(2) on a forked process, so that
calls of Rust and C++ count as well as Python's. Linux on x86-64."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["kill", "power", "full"]
"""kill: the process ends before the event; half of what it writes is written. power: as kill, and of each file half of
what was not synced is lost. full: from the event on, nothing that takes room on the disk works."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_CALLS = {
    "write": 1, "open": 2, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "chmod": 90, "fchmod": 91, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "fchmodat": 268, "fallocate": 285, "pwritev": 296, "renameat2": 316,
    "copy_file_range": 326,
}  # fmt: skip
"""Those that change files or names, by their numbers."""
_NAMES = {number: name for name, number in _CALLS.items()}
_OF_FILE = {"write": 0, "pwrite64": 0, "writev": 0, "pwritev": 0, "sendfile": 0, "copy_file_range": 2, "fsync": 0,
            "fdatasync": 0, "ftruncate": 0, "fchmod": 0, "fallocate": 0}  # fmt: skip
"""Which argument is the open file; of the others, a path is given."""
_WRITES = ("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate", "ftruncate")
_TAKE_ROOM = (*_WRITES, "fsync", "fdatasync", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "creat")
_AT = ("openat", "mkdirat", "unlinkat", "renameat", "linkat", "fchmodat", "renameat2")
"""Whose first argument is a directory."""

_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs "
    "gs"
)
_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
_OPTIONS = 0x80 | 0x100000 | 0x08 | 0x02 | 0x04  # seccomp, the child dies with us, threads and children, too
_SECCOMP_EVENT = signal.SIGTRAP | (7 << 8)
_SKIPPED = (1 << 64) - 1


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS.split()]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        events: it did to files below the folder, in order, such as "rename".
        killed: at the last of them.
        error: "CheckpointError: ...", if it raised one.
    """

    events: tuple[str, ...]
    killed: bool
    error: str | None


def is_supported() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def run(action: Callable[[], object], folder: Path, kind: Kind = "kill", at: int | None = None) -> Outcome:
    """Let a forked process do something, and stop it.

    Args:
        folder: only what is done below it counts.
        at: number of the event, from 0.
    """
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        _do(action, here, there)
    os.close(there)
    try:
        watch = _Watch(child, os.path.realpath(folder), kind, at)
        watch.run()
        with os.fdopen(here) as pipe:
            error = pipe.read()
        return Outcome(tuple(watch.events), watch.killed, error or None)
    finally:
        watch.close()


def _do(action: Callable[[], object], here: int, there: int) -> None:
    """What the child does."""
    code = 1
    try:
        os.close(here)
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _ask_for_stops()
        try:
            action()
            code = 0
        except BaseException as error:
            os.write(there, f"{type(error).__name__}: {error}".encode())
            if not isinstance(error, ValueError):
                os.write(there, traceback.format_exc().encode())
    finally:
        os._exit(code)


class _Watch:
    def __init__(self, child: int, folder: str, kind: Kind, at: int | None) -> None:
        self.events: list[str] = []
        self.killed = False
        self._child, self._folder, self._kind, self._at = child, folder, kind, at
        self._dirty: dict[tuple[int, int], tuple[int, int]] = {}
        """Of each file that is not synced: it, open, and its size when it was."""

    def run(self) -> None:
        os.waitpid(self._child, 0)
        _ptrace(_SETOPTIONS, self._child, 0, _OPTIONS)
        _ptrace(_CONT, self._child)
        while True:
            process, status = os.waitpid(-1, 0x40000000)  # threads, too
            if not os.WIFSTOPPED(status):
                if process == self._child:
                    return
                continue
            number = status >> 8
            if number == _SECCOMP_EVENT and self._stops(process):
                os.kill(self._child, signal.SIGKILL)
                continue
            passed = os.WSTOPSIG(status) if number < 0x80 and number not in (signal.SIGTRAP, signal.SIGSTOP) else 0
            _ptrace(_CONT, process, 0, passed)

    def close(self) -> None:
        for file, size in self._dirty.values():
            if self._kind == "power" and self.killed:
                now = os.fstat(file).st_size
                os.ftruncate(file, min(now, (size + now) // 2))
            os.close(file)

    def _stops(self, process: int) -> bool:
        """Look at a call that is about to be made; -> whether that is the end."""
        registers = _Registers()
        _ptrace(_GETREGS, process, 0, ctypes.addressof(registers))
        name = _NAMES[registers.orig_rax]
        arguments = [getattr(registers, each) for each in _ARGUMENTS]
        creates = name in ("open", "openat") and self._creates(name, arguments)
        if (name in ("open", "openat") and not creates) or not self._is_ours(process, name, arguments):
            return False
        self.events.append(name)
        reached = self._at is not None and len(self.events) > self._at
        if self._kind == "full" and reached and (name in _TAKE_ROOM or creates):
            registers.orig_rax = _SKIPPED
            registers.rax = (1 << 64) - errno.ENOSPC
            _ptrace(_SETREGS, process, 0, ctypes.addressof(registers))
            return False
        if name in _WRITES:
            self._note(process, arguments[_OF_FILE[name]])
        if self._kind != "full" and reached:
            if name in ("write", "writev", "pwrite64") and arguments[2] > 1:
                registers.rdx = arguments[2] // 2
                _ptrace(_SETREGS, process, 0, ctypes.addressof(registers))
                _ptrace(_SYSCALL, process)
                os.waitpid(process, 0x40000000)
            self.killed = True
            return True
        if name in ("fsync", "fdatasync"):
            self._forget(process, arguments[0])
        return False

    @staticmethod
    def _creates(name: str, arguments: list[int]) -> bool:
        return bool(arguments[2 if name == "openat" else 1] & (os.O_CREAT | os.O_TRUNC))

    def _is_ours(self, process: int, name: str, arguments: list[int]) -> bool:
        if name in _OF_FILE:
            return self._place(process, arguments[_OF_FILE[name]]).startswith(self._folder)
        at = name in _AT
        path = os.fsdecode(_string(process, arguments[1 if at or name == "symlinkat" else 0]))
        if name in ("symlink", "symlinkat"):
            path = os.fsdecode(_string(process, arguments[1 if name == "symlink" else 2]))
        directory = arguments[0] & 0xFFFFFFFF
        if at and not os.path.isabs(path) and directory != (1 << 32) - 100:
            path = os.path.join(self._place(process, directory), path)
        return os.path.join(os.readlink(f"/proc/{process}/cwd"), path).startswith(self._folder)

    def _place(self, process: int, file: int) -> str:
        try:
            return os.readlink(f"/proc/{process}/fd/{file}")
        except OSError:
            return ""

    def _note(self, process: int, file: int) -> None:
        """A file has content that is not synced."""
        if self._kind == "power":
            about = os.stat(f"/proc/{process}/fd/{file}")
            if (about.st_dev, about.st_ino) not in self._dirty:
                opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
                self._dirty[about.st_dev, about.st_ino] = opened, about.st_size

    def _forget(self, process: int, file: int) -> None:
        about = os.stat(f"/proc/{process}/fd/{file}")
        if (opened := self._dirty.pop((about.st_dev, about.st_ino), None)) is not None:
            os.close(opened[0])


def _string(process: int, address: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        found = b""
        while b"\0" not in found:
            found += memory.read(4096 - (address + len(found)) % 4096)  # not beyond a page that is there
        return found.split(b"\0")[0]


def _ask_for_stops() -> None:
    """Let the kernel stop this process at each of the calls, and at no others: a filter in its language."""
    numbers = sorted(_CALLS.values())
    program = [_statement(0x20, 0)]  # the number of the call
    program += [_statement(0x15, number, len(numbers) - i) for i, number in enumerate(numbers)]
    program += [_statement(0x06, 0x7FFF0000), _statement(0x06, 0x7FF00000)]  # go on; stop
    text = b"".join(program)
    filters = _Program(len(program), text)
    if _LIBC.prctl(38, 1, 0, 0, 0) or _LIBC.prctl(22, 2, ctypes.byref(filters), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _statement(code: int, value: int, jump: int = 0) -> bytes:
    return code.to_bytes(2, "little") + bytes([jump, 0]) + value.to_bytes(4, "little")


def _ptrace(request: int, process: int, address: int = 0, data: int = 0) -> None:
    _LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    _LIBC.ptrace.restype = ctypes.c_long
    if _LIBC.ptrace(request, process, address, data) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")
