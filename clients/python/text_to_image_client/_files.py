"""Write files atomically."""

import contextlib
import itertools
import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes, overwrite: bool = True) -> Path:
    """Write `data` to the file `path`, and return the path of the written file.

    The data goes to a temporary file in the same folder, which then replaces `path`. So a full disk leaves the old
    file, and no reader sees a partial one. If `overwrite` is false and `path` exists, the file gets the first free name
    of cat.1.jpg, cat.2.jpg and so on. Raises OSError.
    """
    target = Path(os.path.realpath(path))  # the symbolic link stays
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        target.write_bytes(data)  # a device or a pipe must not be replaced by a file
        return path
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if overwrite and target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(data)
        if overwrite:
            temporary.replace(target)
            return path
        free = _reserve(path)
        temporary.replace(free)
        return free
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # name the file, not the temporary one
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _reserve(path: Path) -> Path:
    """Create an empty file under the first free name, so that no other process takes the name."""
    for number in itertools.count(1):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            stem = path.stem if number == 1 else path.stem.removesuffix(f".{number - 1}")
            path = path.with_name(f"{stem}.{number}{path.suffix}")
        else:
            return path
    raise AssertionError("count() has no end")
