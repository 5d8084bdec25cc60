"""What mkdocs does beyond its settings: pages from files that live elsewhere, and the help of every command.

The first page is README.md, the changelog CHANGELOG.md. A line `<!-- include: FILE -->` becomes that file, its headings
one level deeper. Links that are right on disk are turned to those of the site. `<!-- not run: why -->` disappears.
"""

# ruff: noqa: INP001  not a package
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
WHOLE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
PICTURES = ("examples/sweep.png",)  # outside of docs/, where pages show them
# Where a file that is no page of its own is shown, for links to it.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "performance.md",
    "launch/README.md": "clusters.md",
}
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_NOT_RUN = re.compile(r"^<!-- not run: .*? -->\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<words>[^\]]*)\]\((?!https?:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that do not lie in docs/."""
    for page, source in WHOLE.items():
        files.append(File.generated(config, page, content=linked((ROOT / source).read_text(), Path(source).parent)))
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page includes."""
    del page, config, files
    return _NOT_RUN.sub("", _INCLUDE.sub(_included, linked(markdown, Path("docs"))))


def _included(match: re.Match[str]) -> str:
    text = linked((ROOT / match[1]).read_text(), Path(match[1]).parent)
    return outside_code(lambda part: re.sub(r"^(#+) ", r"#\1 ", part, flags=re.MULTILINE), text)


def linked(text: str, folder: Path) -> str:
    """Turn links relative to a folder of the repository to those of a page in docs/."""

    def turn(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match["target"])
        shown = target if target in PICTURES else SHOWN.get(target, target.removeprefix("docs/"))
        if shown == target and target not in PICTURES:  # a file that the site does not have
            return match["words"]
        return f"[{match['words']}]({shown}{match['anchor'] or ''})"

    return outside_code(lambda part: _LINK.sub(turn, part), text)


def outside_code(change, text: str) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Change everything but blocks of code."""
    parts, end = [], 0
    for block in _CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def command_line() -> str:
    """The page of the command line: what `--help` of each command prints."""
    os.environ["COLUMNS"] = "100"  # argparse wraps at it
    from phema_dist.cli import _parser  # noqa: PLC0415  after COLUMNS

    parser = _parser()
    (commands,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)  # noqa: SLF001
    text = ["# Command line", "", "What `phema --help` and `phema COMMAND --help` print.", ""]
    text += ["```text", parser.format_help().rstrip(), "```"]
    for name, command in commands.choices.items():
        text += ["", f"## phema {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join([*text, ""])
