"""Files that are written whole or not at all."""

import contextlib
import itertools
import os
import secrets
import stat
from pathlib import Path


def write_whole(path: Path, data: bytes, overwrite: bool = True) -> Path:
    """Write `data` into the file `path`, and return the path of the file that has it.

    It is written next to its place and moved there, so that a full disk leaves what was there before, and nobody reads
    half a file. If `overwrite` is false and `path` is taken, the file gets the first free of the names cat.1.jpg,
    cat.2.jpg and so on. Raises OSError.
    """
    place = Path(os.path.realpath(path))  # a symbolic link stays one
    if place.exists() and not stat.S_ISREG(place.stat().st_mode):
        place.write_bytes(data)  # a device or a pipe is never moved away
        return path
    unfinished = place.with_name(f".{place.name[:200]}.{secrets.token_hex(4)}")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if overwrite and place.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(place.stat().st_mode))
            file.write(data)
        if overwrite:
            unfinished.replace(place)
            return path
        free = _reserve(path)
        unfinished.replace(free)
        return free
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # not the name of the unfinished one
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _reserve(path: Path) -> Path:
    """Make an empty file under the first name that is free, so that nobody else takes it."""
    for number in itertools.count(1):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            stem = path.stem if number == 1 else path.stem.removesuffix(f".{number - 1}")
            path = path.with_name(f"{stem}.{number}{path.suffix}")
        else:
            return path
    raise AssertionError("count() has no end")
