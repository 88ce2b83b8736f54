"""What keeps the garbage collector from imports keeps nothing from being collected later, or written at the end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
    import atexit, gc, sys, weakref
    from rayfm.quiet import collect_less

    class Held:
        def __del__(self):
            print("dropped")

    collect_less()
    assert gc.get_threshold() == (10_000, 10, 10)
    atexit.register(lambda: print("at exit"))
    cycle = Held()
    cycle.itself = cycle
    del cycle
    print("collected", gc.collect() > 0)
    held = Held()
    weakref.finalize(held, print, "finalized")
    text, data = open(sys.argv[1], "w"), open(sys.argv[2], "wb")
    text.write("left open")
    data.write(b"left open")
"""


def test_all_that_a_process_leaves_behind_is_there(tmp_path: Path) -> None:
    files = tmp_path / "text", tmp_path / "data"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == ["dropped", "collected True"]
    assert sorted(said[2:]) == ["at exit", "finalized"]
    assert [file.read_text() for file in files] == ["left open", "left open"]
