"""MkDocs hooks: the table of all keys, generated from the code, and formulas as MathML.

Browsers render MathML by themselves, so the pages load no script or font from a network.
"""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `mkdocs` does not add the repository

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\(|\\\[)(?P<tex>.*?)(?:\\\)|\\\])</(?P=tag)>',
    re.DOTALL,
)
_GROUPS = {
    "": "The run",
    "model": "Model and optimization",
    "data": "Data",
    "checkpoint": "Checkpoints",
    "report": "Reports",
    "trainer": "Lightning's trainer",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- keys -->` by the table of all keys."""
    if "<!-- keys -->" not in markdown:
        return markdown
    return markdown.replace("<!-- keys -->", key_tables())


def on_page_content(html: str, **_: Any) -> str:
    """Convert the formulas of a page to MathML."""
    return _FORMULA.sub(_mathml, html)


def key_tables() -> str:
    """One Markdown table per group of keys."""
    from docs.keys import COMMANDS, keys

    found = keys()
    parts = []
    for group, title in _GROUPS.items():
        parts += [f"## {title}", "", "| key | default | means |", "| --- | --- | --- |"]
        for key in found:
            if key.group != group:
                continue
            only = "" if key.commands == COMMANDS else f" ({', '.join(key.commands)})"
            default = "" if key.name in ("config", "print_config") else _code(key.default)
            parts.append(f"| `--{key.name}` | {default} | {_cell(key.meaning)}{only} |")
        parts.append("")
    return "\n".join(parts)


def _code(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if _is_plain(value) else None
    return f"`{text if text is not None else value}`".replace("|", "\\|")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _cell(text: str) -> str:
    """A table cell from a description in reStructuredText, as Lightning writes them."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"\s*\(type: .*$", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _mathml(match: re.Match[str]) -> str:
    tex = html.unescape(match["tex"]).strip()
    return convert(tex, display="block" if match["tag"] == "div" else "inline")
