"""Files of certificates or tokens that are read again when they change, without a restart."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from server.errors import CredentialsError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_BYTES = 16 * 2**20  # of a file


class WatchedFiles(Generic[_T]):
    """The parsed content of some files, parsed again when they have changed.

    `parse` takes the content of each file and raises CredentialsError, as the constructor does then. A later change
    that cannot be parsed is logged and the previous content stays, so that a mistake while files are exchanged does not
    lock everybody out.
    """

    def __init__(self, what: str, parse: Callable[..., _T], *paths: Path) -> None:
        self._what = what
        self._parse = parse
        self._paths = paths
        self._seen = self._stamps()
        self._content = self._read()

    def content(self) -> _T:
        """Return the current content. Costs one `stat` per file while they are unchanged."""
        if self._stamps() != self._seen:
            self.reload()
        return self._content

    def reload(self) -> None:
        """Read the files again, changed or not, and log the result."""
        self._seen = self._stamps()
        try:
            self._content = self._read()
        except CredentialsError as error:
            log.warning("the changed %s cannot be used, keeping the previous ones: %s", self._what, error)
        else:
            log.info("read the %s again", self._what)

    def _read(self) -> _T:
        try:
            content = self._parse(*(_read_file(path) for path in self._paths))
        except OSError as error:
            raise CredentialsError(f"cannot read {error.filename}: {error.strerror}") from error
        if self._stamps() != self._seen:  # the next call of `content` reads the new files
            raise CredentialsError("they change while they are being read")
        return content

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _read_file(path: Path) -> bytes:
    """Return the content of a file. Raises OSError, and CredentialsError for one without end such as /dev/zero."""
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise CredentialsError(
            f"{path} has more than {_MAX_BYTES} bytes, which no file of certificates or tokens needs"
        )
    return content


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return values that change when a file is written or replaced, by a rename or, as in Kubernetes, behind a link."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
