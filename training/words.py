"""Common words of English that are near one concept, so that captions can use them in place of its name.

One formula says which: the cosine of the gloss of a word's commonest sense with what is known of the concept, a quarter
of its greatest cosine with a name, and 0.15 for a synonym, above 0.55; or, of a word that is no noun, the cosine with a
name above 0.65.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence

from training import captions, synonyms
from training.art import RUNS, Concept
from training.synonyms import WordNet
from training.vocabulary import english

log = logging.getLogger(__name__)

_MEANT_BY_GLOSS, _MEANT, _BY_NAME, _BY_SYNONYM = 0.55, 0.65, 0.25, 0.15


def everything(concepts: Sequence[Concept], lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Common words for each concept, found the first time; `lists` are its synonyms, of which some are such words."""
    file = RUNS / "words.json"
    if not file.is_file():
        file.write_text(json.dumps(_found(concepts, lists, synonyms.read_wordnet(RUNS / "packages"))))
    found: list[list[str]] = json.loads(file.read_text())
    return found


def _found(concepts: Sequence[Concept], lists: Sequence[Sequence[str]], wordnet: WordNet) -> list[list[str]]:
    lent: dict[str, list[int]] = defaultdict(list)
    for at, some in enumerate(lists):
        for word in some:
            lent[word].append(at)
    taken = {word for each in concepts for word in (each.name, *each.keywords)}
    taken |= set(" ".join(captions.frames()).replace(",", "").split())
    words = [word for word in dict.fromkeys([*english(None), *sorted(lent)])
             if word not in taken and " " not in word and not synonyms.held_out(word)
             and (word in lent or wordnet.has(word))]  # fmt: skip
    senses = [wordnet.commonest.get(word) or wordnet.commonest.get(word.removesuffix("s"), "") for word in words]
    told = wordnet.told(sorted({key for key in senses if key}))
    all_known = synonyms.all_known(concepts)
    found: list[list[str]] = [[] for _ in concepts]
    for word, key, near in zip(words, senses, synonyms.nearness(words, concepts), strict=True):
        score = all_known @ told[key] + _BY_NAME * near if key else near
        score[lent[word]] += _BY_SYNONYM
        if float(score.max()) > (_MEANT_BY_GLOSS if key else _MEANT):
            found[int(score.argmax())].append(word)
    log.info("words: %d of %d mean a concept", sum(map(len, found)), len(words))
    return found
