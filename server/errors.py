"""The errors that end the server's process, each with its exit code.

StartupError                 1: unexpected
├── InvalidSettings          2: flags or variables cannot be used
├── BindError                3: an address cannot be bound
├── ReadyFileError           4: the ready file cannot be written
├── WarmUpError              5: the model is loaded but cannot make an image
├── DeviceHung               6: the device does not answer any more
├── CredentialsError         7: certificates or tokens cannot be used
├── ContentFilterError       8: the content filter cannot be used
├── CheckpointError
│   ├── MissingPart         10: a part of the checkpoint is not there or not readable
│   ├── GitLfsPointer       11: the repository was cloned without its weights
│   ├── TruncatedFile       12: a weights file is not whole
│   ├── WrongExpert         13: a base is in the refiner's place, or the reverse
│   └── FingerprintMismatch 16: the weights are whole, but not the requested ones
├── NotEnoughMemory         14: the device cannot hold the weights
├── NoDevice                15: the requested device is not there, or cannot do what is requested
└── CompileError            17: the networks cannot be compiled on this machine

0 means stopped on request. The message is one sentence for the operator. Errors of calls are in api/errors.py.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar


class StartupError(Exception):
    """The server cannot start, or cannot go on."""

    exit_code: ClassVar[int] = 1
    reason: ClassVar[str] = "unexpected error"


class InvalidSettings(StartupError):
    """Flags or variables cannot be used. `problems` has one sentence for each."""

    exit_code = 2
    reason = "bad flags"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class BindError(StartupError):
    """An address cannot be bound."""

    exit_code = 3
    reason = "cannot listen"


class ReadyFileError(StartupError):
    """The ready file cannot be written."""

    exit_code = 4
    reason = "cannot write the ready file"


class WarmUpError(StartupError):
    """The model is loaded but cannot make an image."""

    exit_code = 5
    reason = "the model makes no image"


class DeviceHung(StartupError):
    """The device does not answer any more."""

    exit_code = 6
    reason = "the device does not answer any more"


class CredentialsError(StartupError):
    """The files of certificates or tokens cannot be used."""

    exit_code = 7
    reason = "certificates or tokens cannot be used"


class ContentFilterError(StartupError):
    """The content filter cannot be used."""

    exit_code = 8
    reason = "no such content filter"


class CheckpointError(StartupError):
    """The weights cannot be served."""

    exit_code = 10
    reason = "a missing or incomplete checkpoint"


class MissingPart(CheckpointError):
    """There is no checkpoint, or a part of it is not there or not readable."""


class GitLfsPointer(CheckpointError):
    """The repository was cloned without its weights."""

    exit_code = 11
    reason = "a checkpoint cloned without its weights"


class TruncatedFile(CheckpointError):
    """A weights file is not whole."""

    exit_code = 12
    reason = "a truncated weights file"


class WrongExpert(CheckpointError):
    """A base is in the refiner's place, or the reverse."""

    exit_code = 13
    reason = "base and refiner mixed up"


class NotEnoughMemory(StartupError):
    """The device cannot hold the weights."""

    exit_code = 14
    reason = "not enough memory"


class NoDevice(StartupError):
    """The requested device is not there, or cannot do what is requested."""

    exit_code = 15
    reason = "no such device"


class FingerprintMismatch(CheckpointError):
    """The weights are whole, but not the requested ones."""

    exit_code = 16
    reason = "other weights than named"


class CompileError(StartupError):
    """The networks cannot be compiled on this machine."""

    exit_code = 17
    reason = "networks that cannot be compiled"


def exit_codes() -> dict[int, str]:
    """Return every exit code of the server with its reason, in ascending order."""
    reasons = {kind.exit_code: kind.reason for kind in _tree(StartupError)}
    return {0: "stopped when asked", **dict(sorted(reasons.items()))}


def _tree(kind: type[StartupError]) -> Iterator[type[StartupError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _tree(each)
