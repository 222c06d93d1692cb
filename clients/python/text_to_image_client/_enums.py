"""Convert between the contract's enums and this client's words, by the names in the Protobuf descriptors.

A later contract may add values that this client has no word for, so every conversion from a number can fail quietly.
"""

import enum
from typing import Any, Generic, TypeVar, cast

from ._types import Format, OnDisconnect, Stage, WarningCode
from .v1 import text_to_image_pb2 as pb

Word = TypeVar("Word", bound=enum.StrEnum)


class EnumWords(Generic[Word]):
    """The two-way table of one enum: FORMAT_JPEG is Format.JPEG. UNSPECIFIED has a word only if the StrEnum has it."""

    def __init__(self, words: type[Word], numbers: Any) -> None:
        self.words = words
        prefix = numbers.Name(0).removesuffix("UNSPECIFIED")
        self._numbers = {word: int(numbers.Value(prefix + word.name)) for word in words}
        self._words = {number: word for word, number in self._numbers.items()}

    def word(self, number: int) -> Word | None:
        """Return the word of `number`, None for a value that is newer than this client."""
        return self._words.get(number)

    def number(self, word: object) -> int:
        """Return the number of `word`. Raises ValueError for one that is not in the StrEnum."""
        return self._numbers[self.words(cast("str", word))]


FORMATS = EnumWords(Format, pb.Format)
ON_DISCONNECT = EnumWords(OnDisconnect, pb.OnDisconnect)
STAGES = EnumWords(Stage, pb.Stage)
WARNING_CODES = EnumWords(WarningCode, pb.Warning.Code)
