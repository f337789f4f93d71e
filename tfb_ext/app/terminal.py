"""What the command line shows and writes: text as it is, tables, JSON; and errors, each as one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from ..files import for_json
from .pages import Table

# Control characters, which a terminal obeys; line breaks and tabs are layout.
_CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
# Characters that turn the direction of what follows.
_CONTROLS |= {n: f"\\u{n:04x}" for n in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def screen() -> Console:
    """Standard error, for what is not the result."""
    return Console(stderr=True)


def visible(text: str) -> str:
    """Text of a user, a file or a model for a terminal: control characters are spelt out."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def shorten(text: str, width: int = 60) -> str:
    """One visible line of at most ``width`` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def say(text: str, console: Console | None = None) -> None:
    """Print text as it is: no markup, no colours, no pictures for ``:names:``."""
    (console or Console()).print(Text(visible(text)), soft_wrap=True)


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table, without its note; one without columns has no frame and no header."""
    plain: dict[str, Any] = {} if table.columns else {"show_header": False, "box": None, "pad_edge": False}
    shown = rich_table.Table(title=Text(visible(table.title)) if table.title else None, title_justify="left", **plain)
    for number, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    (console or Console()).print(shown)


def to_json(document: Any, indent: int | None = None) -> str:
    """The document as JSON, which has no NaN and no infinity: they are null."""
    return json.dumps(for_json(document), allow_nan=False, indent=indent)


class Output:
    """What a command shows and writes once its work is done, for people or (``as_json``) as one JSON document.

    The targets are checked when it is made, before the work. A failure is reported, hides nothing that follows, and makes the
    exit status 1 at the end of the ``with`` block.

    Args:
        folders, files: option -> where it writes, ``None`` where it is not given.
        data: the file that is read, which no option may write to.

    Raises:
        typer.BadParameter: a target cannot be written, or two are one file.
    """

    def __init__(
        self,
        as_json: bool,
        folders: Mapping[str, Path | None] | None = None,
        files: Mapping[str, Path | None] | None = None,
        data: str | None = None,
    ) -> None:
        self.as_json = as_json
        self.failed = False
        self._targets = {**(folders or {}), **(files or {})}
        seen = {} if data is None else {os.path.realpath(data): "--data"}
        for option, path in self._targets.items():
            if path is None:
                continue
            try:
                _check_target(option, path, option in (folders or {}), seen)
            except ValueError as error:
                raise typer.BadParameter(visible(str(error)), param_hint=option) from None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None and self.failed:
            raise SystemExit(1)

    def document(self, document: Any) -> None:
        """With ``--json``: print the document."""
        if self.as_json:
            self.show(lambda: print(to_json(document)))

    def say(self, text: str) -> None:
        """Without ``--json``: print text."""
        if not self.as_json:
            self.show(lambda: say(text))

    def table(self, table: Table) -> None:
        """Without ``--json``: print a table."""
        if not self.as_json:
            self.show(lambda: show_table(table))

    def show(self, action: Callable[[], object]) -> None:
        """Do what prints on standard output."""

        def flushed() -> None:
            action()
            sys.stdout.flush()

        self._attempt("standard output", flushed)

    def write(self, option: str, action: Callable[[Path], Any]) -> str | None:
        """Do what writes to the option's target: the path that it returns, else the target; ``None`` for a failure or no target."""
        path = self._targets[option]
        return None if path is None else self._attempt(option, lambda: str(action(path) or path))

    def _attempt(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            if os.environ.get("TFB_EXT_DEBUG"):
                raise
            self._fail(what, error)
        except SystemExit:  # rich's answer to a closed pipe
            self._fail(what, BrokenPipeError())

    def _fail(self, what: str, error: Exception) -> None:
        self.failed = True
        if what == "standard output":
            _discard_output()
        _complain(f"{what}: {_sentence(error)}")


# The files that a folder gets; a name that is taken by something else is found before the work.
_INSIDE = {
    "--save": ("adapter_config.json", "adapter_model.safetensors", "README.md", "tfb_config.json"),
    "--out": ("report.html",),
}


def _check_target(option: str, path: Path, folder: bool, seen: dict[str, str]) -> None:
    from ..files import check_target

    check_target(path, folder, _INSIDE[option] if folder else ())
    if option == "--checkpoint" and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file, expected one that can be read again. Fix: give another name")
    if path.is_file() or not path.exists():
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"{path} is {other} too, expected a file of its own. Fix: give another name")


# Errors ---------------------------------------------------------------------------------------------------------------


def run(app: Callable[[], Any]) -> None:
    """Run the command line; errors are one sentence, without a traceback (``TFB_EXT_DEBUG=1`` shows it)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a terminal without a character shows its number
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("TFB_EXT_DEBUG"):
            raise
        if isinstance(error, OSError):
            _discard_output()
        _complain(_sentence(error))
        raise SystemExit(1) from None


def _discard_output() -> None:
    """Where standard output is broken, what is left in its buffer must not fail once more at the interpreter's end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _sentence(error: Exception) -> str:
    from ..errors import TFBError

    if isinstance(error, BrokenPipeError):
        return "standard output was closed before all of it was written"
    if isinstance(error, TFBError | ValueError | ImportError | OSError) and str(error):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory of this machine is too small; use fewer samples, a smaller batch or fewer items"
    if isinstance(error, RuntimeError):
        import torch  # not above: it takes seconds that --help need not wait for

        if isinstance(error, torch.OutOfMemoryError):
            return str(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}; TFB_EXT_DEBUG=1 shows where it comes from"


def _complain(text: str) -> None:
    with suppress(OSError):
        screen().print(Text.assemble(("error:", "bold red"), " ", visible(text)), soft_wrap=True)
