"""Find common English words that are near one concept, which captions use in place of its name.

A noun's score is the cosine of its commonest sense's gloss with the concept's name and keywords, plus a quarter of its
greatest cosine with a name, plus 0.15 for a synonym; it must exceed 0.55. For another word, the cosine with a name must
exceed 0.65.
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
    """Return common words for each concept. Finds them on the first call. `lists` are the concepts' synonyms."""
    file = RUNS / "words.json"
    if not file.is_file():
        file.write_text(json.dumps(_found(concepts, lists, synonyms.read_wordnet(RUNS / "packages"))))
    found: list[list[str]] = json.loads(file.read_text())
    return found


def _found(concepts: Sequence[Concept], lists: Sequence[Sequence[str]], wordnet: WordNet) -> list[list[str]]:
    synonyms_of: dict[str, list[int]] = defaultdict(list)
    for at, some in enumerate(lists):
        for word in some:
            synonyms_of[word].append(at)
    taken = {word for each in concepts for word in (each.name, *each.keywords)}
    taken |= set(" ".join(captions.frames()).replace(",", "").split())
    words = [
        word
        for word in dict.fromkeys([*english(None), *sorted(synonyms_of)])
        if word not in taken
        and " " not in word
        and not synonyms.held_out(word)
        and (word in synonyms_of or wordnet.has(word))
    ]
    senses = [wordnet.commonest.get(word) or wordnet.commonest.get(word.removesuffix("s"), "") for word in words]
    embeddings = wordnet.gloss_embeddings(sorted({key for key in senses if key}))
    all_known = synonyms.all_known(concepts)
    found: list[list[str]] = [[] for _ in concepts]
    for word, key, near in zip(words, senses, synonyms.nearness(words, concepts), strict=True):
        score = all_known @ embeddings[key] + _BY_NAME * near if key else near
        score[synonyms_of[word]] += _BY_SYNONYM
        if float(score.max()) > (_MEANT_BY_GLOSS if key else _MEANT):
            found[int(score.argmax())].append(word)
    log.info("words: %d of %d mean a concept", sum(map(len, found)), len(words))
    return found
