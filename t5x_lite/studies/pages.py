"""A study's result as files: a picture, and a page that holds it and its tables in one file."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table as RichTable

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1.5rem 0; font-size: 14px; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
svg { max-width: 100%; height: auto; }
"""  # noqa: E501


@dataclass(frozen=True)
class Table:
    """A table of texts: for people to read, in three forms."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>\n"
            f"<thead>{row(self.columns, 'th')}</thead>\n<tbody>{body}</tbody></table>"
        )

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for cells in self.rows:
            table.add_row(*cells)
        console.print(table, markup=False)


def write(
    output: str, name: str, *, title: str, figure: Any, tables: Sequence[Table], note: str
) -> list[str]:
    """Writes `<name>.png`, `<name>.html` and `<name>.md` to the folder; returns their paths.

    The page is one file: the picture is in it as SVG, and it asks for nothing from elsewhere.
    """
    os.makedirs(output, exist_ok=True)
    paths = [os.path.join(output, f"{name}.{kind}") for kind in ("png", "html", "md")]
    figure.savefig(paths[0])
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{_svg(figure)}\n"
        + "\n".join(table.html() for table in tables)
        + f"\n<p>{html.escape(note)}</p></body></html>\n"
    )
    sections = [f"{table.title}\n\n{table.markdown()}" for table in tables]
    for path, text in ((paths[1], page), (paths[2], "\n".join([*sections, note, ""]))):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    return paths


def write_json(path: str, record: Any) -> None:
    """Writes numbers, texts, lists and dicts; what is not a number (no interval) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(plain(record), file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    os.replace(path + ".tmp", path)


def _svg(figure: Any) -> str:
    """The figure as an SVG element, the same for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "t5x_lite", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    found = re.search(r"<svg.*</svg>", buffer.getvalue(), re.S)
    assert found is not None
    return found[0]
