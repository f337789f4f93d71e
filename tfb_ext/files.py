"""Reading JSON, and writing files and folders whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConfigError

CONFIG_NAME = "tfb_config.json"  # says what the other files of a folder are, so it is written last


def for_json(value: Any) -> Any:
    """``value`` with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: for_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [for_json(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_object(path: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; ``way_out`` ends the message of an error.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        return parse_json_object(path)
    except ValueError as error:
        raise ConfigError(f"{path} {error}; {way_out}") from None


def parse_json_object(path: Path) -> dict[str, Any]:
    """The same with a ``ValueError`` that only says what is wrong with the file."""
    try:
        if not path.is_file():  # a pipe would be waited for, and a device has no end
            raise ValueError("is no regular file, expected a JSON file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}), expected a JSON file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    try:
        raw = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply, expected a JSON object") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"holds a {type(raw).__name__}, expected a JSON object")
    return raw


# Writing --------------------------------------------------------------------------------------------------------------

_TEMPORARY = re.compile(r"\.tfb-[0-9a-z_]{8}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, then a rename.

    Links are followed. Devices, pipes and the file that is this process's standard output are written to. A new file has the
    mode that the umask leaves, an old one keeps its mode and owner.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        status = os.stat(path) if os.path.exists(path) else None
        stream = None if status is None else _own_stream(status)
        if status is None or (stream is None and stat.S_ISREG(status.st_mode)):
            _replace(Path(os.path.realpath(path)), data, status)
        else:
            if stream is not None:
                stream.flush()
            with open(path if stream is None else os.dup(stream.fileno()), "wb") as file:
                file.write(data)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _own_stream(status: os.stat_result) -> Any:
    """Which of this process's standard streams writes to the file of that status, ``None`` if none does."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or replaced by something without a number
            if os.path.samestat(status, os.fstat(stream.fileno())):
                return stream
    return None


def _replace(path: Path, data: bytes, status: os.stat_result | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary, handle = new_temporary(path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if status is not None:
                with suppress(OSError):  # only root may give files away
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def new_temporary(folder: Path, directory: bool = False) -> tuple[Path, int]:
    """A new file or folder and its open handle, whose lock says that it is no leftover."""
    while True:
        path = folder / f".tfb-{secrets.token_hex(4)}"
        try:
            if directory:
                path.mkdir()
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            else:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        with suppress(OSError):  # a file system without locks: then leftovers stay
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path, handle
        os.close(handle)  # another process was faster and took it for a leftover


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in ``folder`` whose writer was killed: their lock is free."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not _TEMPORARY.fullmatch(entry.name) or entry.is_symlink():
                continue
            with suppress(OSError):
                handle = os.open(entry.path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
                finally:
                    os.close(handle)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, whose files are those of ``folder`` once the block ends: all of them, or none.

    Other files in ``folder`` stay. One changed file is replaced. For more, the folders are exchanged in one step, the new one with
    the other files as hard links. Where that cannot be (a mount point, the current folder, another user's folder) the files are
    replaced one after another, ``tfb_config.json`` last: its fingerprint does not fit a half-replaced folder.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder.parent, folder):
        remove_leftovers(place)
    staged, handle = new_temporary(folder.parent, directory=True)
    try:
        yield staged
        for file in staged.iterdir():
            _synchronise(file)
        if not folder.exists():
            _synchronise(staged)
            os.replace(staged, folder)
        else:
            _into(staged, folder)
        _synchronise(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(handle)


def _into(staged: Path, folder: Path) -> None:
    changed = []
    for file in sorted(staged.iterdir(), key=lambda f: (f.name == CONFIG_NAME, f.name)):
        old = folder / file.name
        if old.is_file():
            if old.read_bytes() == file.read_bytes():
                continue
            with suppress(OSError):
                shutil.chown(file, old.stat().st_uid, old.stat().st_gid)
            os.chmod(file, stat.S_IMODE(old.stat().st_mode))
        changed.append(file.name)
    here = Path.cwd()
    if len(changed) > 1 and folder != here and folder not in here.parents:
        with suppress(OSError, shutil.Error):
            _link_tree(folder, staged)
            _synchronise(staged)
            _exchange(staged, folder)
            return
    for name in changed:
        os.replace(staged / name, folder / name)


def _link_tree(folder: Path, target: Path) -> None:
    """Hard links in ``target`` to the files of ``folder`` that it does not have, in folders of the same owner and mode."""
    for entry in folder.iterdir():
        there = target / entry.name
        if entry.is_dir() and not entry.is_symlink():
            there.mkdir()
            _link_tree(entry, there)
        elif not there.exists():
            os.link(entry, there, follow_symlinks=False)
    status = folder.stat()
    if (status.st_uid, status.st_gid) != (target.stat().st_uid, target.stat().st_gid):
        os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(folder, target)


def _exchange(a: Path, b: Path) -> None:
    """Exchange two folders in one step (Linux's ``renameat2``, which Python does not have)."""
    import ctypes

    at_current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(at_current, os.fsencode(a), at_current, os.fsencode(b), exchange):
        number = errno.ENOSYS if rename is None else ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(b))


def _synchronise(path: Path) -> None:
    """Wait until a file or folder is on its device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(path: Path, folder: bool = False, files: tuple[str, ...] = ()) -> None:
    """Whether a file, or a folder with these ``files`` in it, can be written; nothing is written.

    Raises:
        ValueError: it cannot be; the message says why.
    """
    why = ""
    try:
        around = Path(os.path.realpath(path))
        if path.exists() and path.is_dir() != folder:
            why = "is a file, expected a folder" if folder else "is a folder, expected a file"
        elif folder or not path.exists() or path.is_file():  # else a device or a pipe, which is written to
            around = around if folder else around.parent
            while not around.exists() and around != around.parent:
                around = around.parent
            if not around.is_dir():
                why = f"would lie in {around}, expected a folder there"
        if not why and not os.access(around, os.W_OK):
            why = f"cannot be written: {around} may not be written to"
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
    if why:
        raise ValueError(f"{path} {why}. Fix: give another name")
    for name in files:
        check_target(path / name)
