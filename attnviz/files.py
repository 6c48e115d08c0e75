"""Files that are whole: who reads, or dies here, leaves the old one or the new one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["only_one", "write_whole"]


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


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Keeps a second process out of a folder; the lock ends with the process.

    Args:
        folder: The folder, which is there.
        what: What is under way in it, for the message.

    Raises:
        FileExistsError: Another process is at work in it.
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
            raise FileExistsError(
                f"expected no other {what} in {str(folder)!r}, got one that is under way; wait "
                "until it has ended, or name another folder"
            ) from None
        yield
    finally:
        os.close(opened)
