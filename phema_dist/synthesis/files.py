"""Files of a local disk that appear whole or not at all, written in parts by several processes at once.

A file is written under a hidden name, `.NAME.<random>.tmp`, on which all who write it hold a shared lock. It gets its
own name once all of it is on the disk. A hidden file that nobody has locked was left by a process that was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phema_dist.errors import AccessError, PhemaError, SettingsError, StorageError
from phema_dist.shard import Box, flat_span
from phema_dist.storage.document import parse_json
from phema_dist.storage.store import make_folder, name_file, sync_folder

if TYPE_CHECKING:
    from collections.abc import Collection

_log = logging.getLogger("phema_dist")
_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_LARGEST_HEADER = 100_000_000  # what safetensors itself accepts


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else in who asks the same, and wait until nobody is; a folder that was made for it goes if unused."""
    with _telling("writing", folder):
        made = not folder.exists()
        make_folder(os.fspath(folder.absolute()))
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _lock(fd, fcntl.LOCK_EX):
            _log.warning("another process is writing into %s: waiting for it", folder)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(fd)


def create(path: Path, head: bytes, num_bytes: int) -> tuple[Path, int]:
    """Begin a file of that size under a hidden name: its place, and a descriptor that keeps it locked."""
    with _telling("writing", path):
        make_folder(os.fspath(path.parent.absolute()))
        while True:
            hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if _lock(fd, fcntl.LOCK_SH) and os.fstat(fd).st_nlink:  # or somebody took it for litter meanwhile
                    write_at(fd, head, 0)
                    os.truncate(fd, num_bytes)
                    return hidden, fd
            except BaseException:
                discard(hidden, fd)
                raise
            os.close(fd)


@contextmanager
def shared(hidden: Path) -> Iterator[int]:
    """Write a part of a file that another process began; what was written is on the disk afterwards."""
    try:
        fd = os.open(hidden, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SettingsError(
            f"all ranks must see the folder {hidden.parent.absolute()} of rank 0, to write into it together; this one "
            "does not. Choose a folder on a disk that they share, or start one process."
        ) from error
    try:
        with _telling("writing", hidden.parent):
            _lock(fd, fcntl.LOCK_SH)
            yield fd
            os.fsync(fd)
    finally:
        os.close(fd)


def publish(hidden: Path, fd: int, path: Path, *, replace: bool) -> None:
    """Give a file its name, durably. Raises SettingsError if something has it, unless that is to be replaced."""
    with _telling("writing", path):
        os.fsync(fd)
        if replace:
            hidden.replace(path)
        else:
            try:
                name_file(fd, os.fspath(hidden), os.fspath(path))
            except FileExistsError as error:
                raise SettingsError(
                    f"{path} has appeared while it was made: another process makes it too. Look at what is there, and "
                    "run this again."
                ) from error
            hidden.unlink(missing_ok=True)
        sync_folder(os.fspath(path.parent))


def discard(hidden: Path, fd: int) -> None:
    """Forget a file that was begun, if it has not got its name."""
    with suppress(OSError):
        hidden.unlink(missing_ok=True)
    os.close(fd)


def write_file(path: Path, content: bytes, *, replace: bool) -> None:
    """Write a whole file at once, durably; errors as `publish`."""
    hidden, fd = create(path, content, len(content))
    try:
        publish(hidden, fd, path, replace=replace)
    finally:
        discard(hidden, fd)


def remove(paths: Collection[Path]) -> None:
    """Delete files, durably."""
    for path in paths:
        with _telling("deleting", path):
            path.unlink(missing_ok=True)
            sync_folder(os.fspath(path.parent))


def named_alike(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose whole name fits; those that killed processes left behind are removed."""
    found: list[Path] = []
    if not folder.is_dir():
        return found
    with _telling("listing", folder):
        for entry in sorted(os.listdir(folder)):  # noqa: PTH208  names, not paths
            if pattern.fullmatch(entry):
                found.append(folder / entry)
            elif (match := _HIDDEN.fullmatch(entry)) and pattern.fullmatch(match[1]):
                _remove_litter(folder / entry)
    return found


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of some bytes at a position."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)  # at most 2 GiB a call
        view, offset = view[written:], offset + written


def write_box(fd: int, position: int, box: Box, within: Box, values: torch.Tensor) -> None:
    """Write a box of a row-major tensor; the box `within` is what begins at a position of the file."""
    if not box.numel:
        return
    first, _, dense = flat_span(box, within)
    if not dense:
        for i in range(box.sizes[0]):
            write_box(fd, position, box.rows(i, i + 1), within, values[i : i + 1])
        return
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    write_at(fd, data, position + first * values.itemsize)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and where its data begin. Raises ValueError if it is none, or has another size.

    A StorageError says that the disk would not answer.
    """
    with _telling("reading", path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size  # noqa: PLR2004  as the format says
        if 8 + length > size or length > _LARGEST_HEADER:
            raise ValueError("it is no safetensors file")
        table = parse_json(file.read(length))
    if not isinstance(table, dict):
        raise ValueError("it is no safetensors file")  # noqa: TRY004  told like the other ways of being none
    try:
        end = max((f["data_offsets"][1] for name, f in table.items() if name != "__metadata__"), default=0)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("it is no safetensors file") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes instead of the {8 + length + end} that its header tells of")
    return table, 8 + length


def _remove_litter(hidden: Path) -> None:
    with suppress(OSError):  # somebody else removes it, or may
        fd = os.open(hidden, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.unlink()
        finally:
            os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    """Whether nobody else holds it; where there are no locks, nobody takes them for litter either."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _telling(doing: str, path: Path) -> Iterator[None]:
    """Say what was attempted on which file when the disk refuses."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PhemaError):
            raise
        kind = AccessError if isinstance(error, PermissionError) else StorageError
        raise kind(f"{doing} {path}: the disk answered: {error.strerror or type(error).__name__}.") from error
