"""The size and the order of the package: lines, public names, imports, copies. As a script it prints the table of lines."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, PACKAGE_LINES, NAMES, README_WORDS, COPIED_LINES = 350, 17_920, 16, 800, 6
PYTHON = sorted((ROOT / "tfb_ext").rglob("*.py"))
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
BELOW_SEARCH = ("tfb_ext.forward", "tfb_ext.adapters", "tfb_ext.ops", "tfb_ext.posterior")
LAZY_APP = {"tfb_ext.search.result"}  # whose plot() imports the app's pictures when it runs


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse("\n".join(lines(path)))


def module_name(path: Path) -> str:
    return shown(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in PYTHON}


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.stmt]:
    """Statements that run on import; with ``lazy`` those of functions too. Never those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child, lazy)


def imports(name: str, lazy: bool = False) -> set[str]:
    """The package's modules that a module imports."""
    path, found = MODULES[name], set()
    for node in statements(tree(path), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + (path.name == "__init__.py")] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else source for each in inner}
    return found & MODULES.keys() - {name}


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def kept_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that could be copies: no imports, docstrings, signatures, comments, empty lines, closing brackets."""
    dropped: set[int] = set()
    for node in ast.walk(tree(path)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            dropped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            dropped |= set(range(node.lineno, max(node.body[0].lineno, node.lineno + 1)))
    numbered = ((number, line.strip()) for number, line in enumerate(lines(path), 1) if number not in dropped)
    return [(number, line) for number, line in numbered if re.search(r"\w", line) and not line.startswith("#")]


def copies(paths: list[Path]) -> list[str]:
    """Every run of COPIED_LINES lines or more that stands in two places, once."""
    seen: dict[tuple[str, ...], list[tuple[str, int, int]]] = defaultdict(list)
    for path in paths:
        kept = kept_lines(path)
        for start in range(len(kept) - COPIED_LINES + 1):
            window = kept[start : start + COPIED_LINES]
            seen[tuple(line for _, line in window)].append((shown(path), window[0][0], start))
    found, ends = [], set()
    for places in seen.values():
        for (first, line, start), (second, other, begin) in pairwise(places):
            overlaps = first == second and begin - start < COPIED_LINES
            if not overlaps and (first, start - 1, second, begin - 1) not in ends:
                found.append(f"{first}:{line} and {second}:{other}")
            ends.add((first, start, second, begin))
    return found


def test_lines_of_a_file() -> None:
    counts = {shown(path): len(lines(path)) for path in [*PYTHON, *CSRC]}
    assert not {name: count for name, count in counts.items() if count > FILE_LINES}


def test_totals() -> None:
    import tfb_ext

    total = sum(len(lines(path)) for path in PYTHON)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert total <= PACKAGE_LINES
    assert len(tfb_ext.__all__) <= NAMES and len(words) <= README_WORDS


def test_no_import_circle() -> None:
    left = {name: imports(name) for name in MODULES}
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not {name: sorted(needed & left.keys()) for name, needed in left.items()}


def test_nothing_imports_the_app() -> None:
    outside = [name for name in MODULES if not inside(name, "tfb_ext.app", "tfb_ext.__main__")]
    for lazy, allowed in ((False, set()), (True, LAZY_APP)):
        assert {name for name in outside if any(inside(each, "tfb_ext.app") for each in imports(name, lazy))} <= allowed


def test_nothing_below_imports_the_search() -> None:
    below = [name for name in MODULES if inside(name, *BELOW_SEARCH)]
    assert not [name for name in below if any(inside(each, "tfb_ext.search") for each in imports(name))]


def test_no_copies() -> None:
    assert copies(PYTHON) == []


if __name__ == "__main__":
    for title, paths in (("lines of Python", PYTHON), ("lines of C++ and CUDA", CSRC)):
        for room, files in groupby(sorted(paths, key=lambda path: path.parts[:-1]), key=lambda path: path.parent):
            counts = {path.name: len(lines(path)) for path in files}
            print(f"{sum(counts.values()):6} {shown(room)}")
            for name, count in counts.items():
                print(f"{count:12} {name}{'  too long' if count > FILE_LINES else ''}")
        print(f"{sum(len(lines(path)) for path in paths):6} {title}\n")
    sys.path.insert(0, str(ROOT))
    print(f"{len(__import__('tfb_ext').__all__):6} public names")
