"""Files that are whole: who reads, or dies here, leaves the old one or the new one."""

import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import numpy as np
import torch

__all__ = ["first_line", "only_one", "read_arrays", "read_saved", "write_whole"]

_UNREADABLE = (  # what torch.load and np.load raise on damaged files
    OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, EOFError, MemoryError, SyntaxError, UnpicklingError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file under another name first and then gives it its own.

    Args:
        path: The file; a device, such as ``/dev/stdout``, is written to and not replaced.
        content: Its bytes, or what writes them.
    """
    write = content if callable(content) else lambda file: file.write(content)
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            write(file)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_saved(path: Path) -> object:
    """Reads what ``torch.save`` wrote, on the CPU: tensors and plain values, never code.

    Raises:
        ValueError: It is damaged or holds something else; the message is a few words.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        known = isinstance(error, OSError)  # torch's own words advise to run what is in the file
        reason = "it is damaged, or holds more than tensors and plain values"
        raise ValueError(first_line(error) if known else reason) from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays that ``np.savez`` wrote, by name; never code.

    Raises:
        ValueError: It is damaged or holds something else; the message is a few words.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    except _UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """Returns what an error says in its first line, in at most 200 printable characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200])


def printable(text: str) -> str:
    """Returns a text of a file's for one line: what would break or color it becomes ``?``."""
    return "".join(each if each.isprintable() else "?" for each in text)


@contextmanager
def only_one(
    folder: Path, what: str, wait: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Keeps a second process out of a folder; the lock ends with the process.

    Args:
        folder: The folder or file, which is there.
        what: What is under way in it, for the message.
        wait: Is told once that another process is at work, whose end is then waited for.

    Raises:
        FileExistsError: Another process is at work in it, and `wait` is None.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise FileExistsError(
                    f"expected no other {what} in {str(folder)!r}, got one that is under way; "
                    "wait until it has ended, or name another folder"
                ) from None
            wait(f"waiting for another process with {str(folder)!r}")
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
