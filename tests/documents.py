"""Runs the blocks of a page as its reader would: one after the other, in one namespace and one folder.

A ```python block is executed, or written to NAME.py if its first line is `# NAME.py`. Of a ```console block, `phema …`
is called, `python …` and `torchrun …` are started, and of `make …` the target must exist; anything else fails. A block
after `<!-- not run: why -->`, and one in any other language, is left alone.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from phema_dist.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\S+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    why_not: str  # it is not run; "" if it is


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are Python or commands."""
    text = (ROOT / page).read_text()
    return [
        Block(page, 1 + text[: match.start("text")].count("\n"), match["language"], match["text"], match["why"] or "")
        for match in _BLOCK.finditer(text)
        if match["language"] in {"python", "console"}
    ]


def run_page(page: str, names: dict[str, Any], prepare: Callable[[str], str] = str) -> int:
    """Run a page in the working directory; `prepare` may change the text of each block. Returns how many were run."""
    here = [block for block in blocks(page) if not block.why_not]
    for block in here:
        text = prepare(block.text)
        if block.language == "console":
            for command in text.replace("\\\n", "").splitlines():
                _run_command(shlex.split(command, comments=True), f"{page}:{block.line}: {command}")
        elif named := _FILE.match(text):
            Path(named[1]).write_text(text)
        else:
            # Lines count from the page's first, so that a traceback shows where.
            exec(compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec"), names)  # noqa: S102
    return len(here)


def _run_command(words: list[str], where: str) -> None:
    if not words:
        return
    if words[0] == "phema":
        assert main(words[1:]) == 0, where
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), where
    elif words[0] in {"python", "torchrun"}:
        module = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *module, *words[1:]], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
    else:
        raise AssertionError(f"{where}: a command that no test can run; mark the block `<!-- not run: why -->`")
