"""Import, apply and undo in every order, on the stand-in. ``tests/patches`` does the same on vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from patch_orderings import ORDERINGS, missing

PROGRAM = """
import sys
from pathlib import Path

sys.path[:0] = [{unit!r}, {root!r}, {directory!r}]
from patch_orderings import run
from patch_target import Faked, patch

patches = [patch("engine:Engine.run"), patch("engine:Engine.static"), patch("worker:Worker.load")]
run({order!r}, Faked(Path({directory!r})).application(*patches), patches)
print("done")
"""


@pytest.mark.parametrize("order", ORDERINGS)
def test_order(order: str, tmp_path: Path) -> None:
    unit = Path(__file__).parent
    program = PROGRAM.format(unit=str(unit), root=str(unit.parents[1]), directory=str(tmp_path), order=order)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_no_order_is_missing() -> None:
    assert missing(ORDERINGS) == set()
    assert len(set(ORDERINGS)) == len(ORDERINGS)


def test_the_check_finds_a_missing_order() -> None:
    assert missing(ORDERINGS[1:]) == {ORDERINGS[0]}
    assert missing([*ORDERINGS, "AUAU"]) == {"AUAU"}
