"""Runs the tests on each Python that is found, with the lowest and the newest versions of what the library runs on.

    python scripts/test_versions.py                                    every Python, lowest and newest, all tests
    python scripts/test_versions.py --python 3.12 --lowest tests/text  what follows goes to pytest
    python scripts/test_versions.py --newest --upgrade transformers    beside a reference newer than the one named

Each combination gets a fresh environment of about 5 GB, deleted when its tests are done. The lowest versions are those
that `dependencies` in pyproject.toml names; the newest are what pip finds beside the references of the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [minor for text in PROJECT["classifiers"] for minor in re.findall(r"Python :: (3\.\d+)$", text)]
NAMES = list(dict.fromkeys(re.split(r"[>=<;]", requirement)[0] for requirement in PROJECT["dependencies"]))

VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))
"""


def candidates(minor: str) -> Iterator[str]:
    """Commands that may be this Python: on PATH, of pyenv, of uv."""
    for folder in os.get_exec_path():
        yield str(Path(folder) / f"python{minor}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(map(str, pyenv.glob(f"versions/{minor}.*/bin/python")), reverse=True)
    if uv := shutil.which("uv"):
        found = subprocess.run([uv, "python", "find", "--system", minor], capture_output=True, text=True, check=False)
        yield found.stdout.strip()


def find(minor: str) -> str | None:
    """A Python of this version that runs and can make an environment."""
    script = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for command in candidates(minor):
        if Path(command).is_file():
            done = subprocess.run([command, "-c", script], capture_output=True, text=True, check=False)
            if done.stdout.strip() == minor:
                return command
    return None


def lowest() -> str:
    """Constraints for pip: each requirement at its lower bound, markers and all."""
    return "\n".join(requirement.replace(">=", "==", 1) for requirement in PROJECT["dependencies"])


def run(command: list[str], log: list[str]) -> int:
    """Its exit status; what it prints is shown, and added to `log`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.append(line.strip())
    return process.returncode


def test_with(python: str, which: str, upgrade: list[str], arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether all went well, and a row of the table: versions, and pytest's last line."""
    log: list[str] = []
    with tempfile.TemporaryDirectory(prefix="llama4-versions-") as directory:
        environment = Path(directory) / "environment"
        constraints = Path(directory) / "constraints.txt"
        constraints.write_text(lowest() if which == "lowest" else "")
        folder = environment / ("Scripts" if os.name == "nt" else "bin")
        pip = [str(folder / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = [
            [python, "-m", "venv", str(environment)],
            [*pip, "--constraint", str(constraints), ".[test]"],
            *([[*pip, "--upgrade", *upgrade]] if upgrade else []),
        ]
        for step in steps:
            if run(step, log):
                return False, [Path(python).name, which, *["" for _ in NAMES], "cannot be installed"]
        names = [*NAMES, *(re.split(r"[>=<!~]", name)[0] for name in upgrade)]
        done = subprocess.run([folder / "python", "-c", VERSIONS, *names], capture_output=True, text=True, check=True)
        version, *versions = json.loads(done.stdout)
        failed = run([str(folder / "pytest"), *arguments], log) != 0
        return not failed, [version, which, *versions, log[-1] if log else "no output"]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="may be repeated; by default every one")
    parser.add_argument("--lowest", action="store_true", help="with the lowest versions only")
    parser.add_argument("--newest", action="store_true", help="with the newest versions only")
    parser.add_argument(
        "--upgrade", action="append", default=[], metavar="NAME", help="a package to take newer than named"
    )
    options, arguments = parser.parse_known_args(words)
    whichever = [which for which in ("lowest", "newest") if getattr(options, which)] or ["lowest", "newest"]
    rows = [["Python", "versions", *NAMES, *options.upgrade, "result"]]
    well = True
    for minor in options.python or PYTHONS:
        python = find(minor)
        for which in whichever:
            if python is None:
                print(f"Python {minor} is not found on PATH, in pyenv or in uv")
                rows.append([minor, which, *["" for _ in rows[0][3:]], "not found"])
                well = well and minor not in (options.python or ())
                continue
            passed, row = test_with(python, which, options.upgrade, arguments)
            rows.append([*row[:-1], *[""] * (len(rows[0]) - len(row)), row[-1]])
            well = well and passed
    print("\n" + table(rows))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
