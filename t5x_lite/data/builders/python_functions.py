"""A TFDS dataset of the Python standard library's functions and what their docstrings say.

Made of the library of the Python that runs, so that its size differs a little between versions.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from typing import ClassVar

from t5x_lite.data.builders.packages import TextRecords, split_of

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}


class Docstrings(TextRecords):
    """Functions of the standard library with a docstring: signature, its first line, body."""

    FIELDS: ClassVar[tuple[str, ...]] = ("module", "signature", "summary", "body", "code")
    HOMEPAGE: ClassVar[str] = "https://github.com/python/cpython"

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        root = sysconfig.get_paths()["stdlib"]
        seen: set[str] = set()
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - _LEFT_OUT)
            for file in sorted(files):
                if not file.endswith(".py"):
                    continue
                path = os.path.join(folder, file)
                module = os.path.relpath(path, root)[:-3].replace(os.sep, ".")
                try:
                    with open(path, encoding="utf-8") as opened:
                        tree = ast.parse(opened.read())
                except (SyntaxError, UnicodeDecodeError):  # templates, and sources of old days
                    continue
                for record in function_records(tree, module):
                    if record["code"] not in seen:
                        seen.add(record["code"])
                        # A package is in one split: its modules repeat each other.
                        yield split_of(module.split(".")[0]), record


def function_records(tree: ast.Module, module: str) -> Iterator[dict[str, str]]:
    """One record for each function with a docstring and a body besides, as `ast.unparse` writes it.

    No comments, then, and one style for all: `code` is the signature and the body without the
    docstring, `summary` the docstring's first line.
    """
    count = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
        if not summary or len(node.body) < 2:
            continue
        node.decorator_list = []
        node.body = node.body[1:]
        code = ast.unparse(node)
        body, node.body = node.body, [ast.Pass()]
        signature = ast.unparse(node).removesuffix("pass").rstrip()
        node.body = body
        yield {
            "id": f"{module}/{node.name}/{count}",
            "module": module,
            "signature": signature,
            "summary": summary,
            "body": code[len(signature) + 1 :],
            "code": code,
        }
        count += 1
