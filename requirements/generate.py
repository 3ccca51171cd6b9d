"""Writes the requirement files of every tested vLLM release, from the table in roll_vllm/versions.py.

``python requirements/generate.py`` writes them; with ``--check`` it only says which are not up to date.

- ``requirements/vllm<release>-<cpu|cpuref|cuda>.txt`` is for the tox environment of the same name, twice: as what to
  install, and as what takes the place of the requirements of packages (``UV_OVERRIDE``).
- ``requirements_torch<torch>_vllm.txt``, in the root of the checkout, is for plain pip on a GPU host.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python requirements/generate.py"

sys.path.insert(0, str(ROOT))  # the table of this checkout, not an installed one

from roll_vllm.versions import TESTED, Route, VersionRow  # noqa: E402

# How the backends are called in the names of environments, where "-" has a meaning.
FACTORS = {"cpu": "cpu", "cpuref": "cpu-reference", "cuda": "cuda"}


def files() -> dict[str, str]:
    """Return the text of every file by its path from the root."""
    texts = {
        f"requirements/vllm{row.release}-{factor}.txt": _environment(row, row.route(backend))
        for row in TESTED
        for factor, backend in FACTORS.items()
    }
    for name in dict.fromkeys(row.requirements_file for row in TESTED):
        texts[name] = _gpu_host(name, [row for row in TESTED if row.requirements_file == name])
    return texts


def _environment(row: VersionRow, route: Route) -> str:
    how = {
        "cpu": "by a build for the CPU, which asks for builds of torch that PyPI does not hold",
        "cpu-reference": "by the official wheel and the CPU reference platform",
        "cuda": "by the official wheel, on NVIDIA GPUs",
    }
    return _text(
        f"vLLM {row.release} {how[route.backend]}.",
        "To be installed, and given to uv as overrides.",
        lines=(route.requirement + _python(row), *route.overrides),
    )


def _python(row: VersionRow) -> str:
    """A marker for the Pythons of the wheel: uv does not heed their upper bound, and compiles what has no wheel."""
    return "".join(f'; python_version < "{bound}"' for bound in re.findall(r"<(3\.\d+)", row.python))


def _gpu_host(name: str, rows: list[VersionRow]) -> str:
    """The rows share their torch, and hence all pins; which of them is installed is the user's choice."""
    first, last = rows[0], rows[-1]
    pins = last.cuda.overrides
    if any(row.cuda.overrides != pins for row in rows):
        raise ValueError(f"{name}: the releases {[row.release for row in rows]} have different pins")
    comments = [f"vLLM {last.release} on torch {last.torch}, for a host with GPUs:", f"    pip install -r {name}"]
    if first is last:
        wanted = last.cuda.requirement
    else:
        wanted = f"vllm>={first.release},<={last.release}"
        for row in rows[:-1]:
            comments += [f"vLLM {row.release} on the same torch:", f"    pip install -r {name} {row.cuda.requirement}"]
    return _text(*comments, lines=(wanted, *pins))


def _text(*comments: str, lines: tuple[str, ...]) -> str:
    head = [f"# {line}" for line in (f"Written by {COMMAND}; do not edit.", *comments)]
    return "\n".join([*head, *lines]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    wrong = []
    for name, text in files().items():
        path = ROOT / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(name)
    if wrong:
        print(f"not up to date: {', '.join(wrong)}; write them again: {COMMAND}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
