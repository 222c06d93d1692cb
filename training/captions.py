"""Write captions of the art and of scenes made from it, and plain English phrases about its concepts."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.art import OUTLINE, STYLES, Art, Concept
from training.synonyms import distinctive
from training.vocabulary import english

COLOURS = "red orange yellow green blue purple pink brown black white grey".split()
_MORE_COLOURS = {"grey": ("gray", "silver"), "yellow": ("golden",), "purple": ("violet",), "blue": ("light blue",)}
_ADJECTIVES = (
    "big small tiny happy sad angry funny cute old young fluffy shiny wooden round tall short hot cold wild lazy "
    "sleepy tired hungry bright dark sweet fresh broken little lovely scary magic beautiful fast slow"
).split()
_ACTIONS = [
    *"napping sleeping sitting standing running jumping flying swimming eating drinking dancing laughing".split(),
    *"crying smiling playing singing resting waiting walking reading cooking working flying away driving by".split(),
    *"lying down looking up".split(),
    *"in the rain|in the snow|on a table|at night|at the beach|in the garden|with a hat|in space|on a hill".split("|"),
    *"by the sea|in love|at work|on a plate|in the sky|under a tree|with friends".split("|"),
]
_OPENINGS = (
    "a {}",
    "an image of a {}",
    "a picture of a {}",
    "{} emoji",
    "a drawing of a {}",
    "the {}",
    "one {}",
    "my {}",
    "icon of a {}",
    "an illustration of a {}",
    "{} on a white background",
)
_PAIRS = (
    "a {} and a {}",
    "a {} and a {}",
    "{} and {}",
    "a {} next to a {}",
    "a {} beside a {}",
    "a {} with a {}",
    "a {}, a {}",
    "one {} and one {}",
)
_BACKGROUNDS = ("{} on a {} background", "{} on {}", "{} in front of a {} background", "{}, {} background")
_STYLED = 0.35  # share of captions that name the style; captions of outlines always do
_SMALL = ("small", "tiny", "little")
_SOMEONE = ("someone", "somebody", "a person")
_PEOPLE = {"smileys-emotion": 0.3, "people-body": 0.15}  # share of captions about what someone is or does
_FACE = ("{}", "{} face")  # other captions of a smiley by what it does
_SHARED = 8  # maximum number of concepts with a keyword that is used in "someone laughing"


@dataclass(frozen=True)
class Named:
    """One thing in a caption: its concept, and the colour it was painted in, if any."""

    concept: int
    colour: str = ""


class Captioner:
    """Sample captions for pictures of an art, as a person might type them.

    `synonyms` and `common` have more words for each concept. Captions use them, and distinctive keywords, instead of
    its name. Keywords of many concepts ("animal") are only added to a name.
    """

    def __init__(self, art: Art, synonyms: Sequence[Sequence[str]], common: Sequence[Sequence[str]], seed: int) -> None:
        self._art = art
        self._random = random.Random(seed)
        self._distinctive = distinctive(art.concepts)
        keywords = zip(distinctive(art.concepts, _SHARED), art.concepts, strict=True)
        self._doing = [_doing(some) if it.group in _PEOPLE else () for some, it in keywords]
        self._synonyms, self._common = synonyms, common

    def caption(self, concept: int, style: str, colour: str = "") -> str:
        """Return a caption of a concept in a style. `colour` is that of the whole picture; few captions name it."""
        choose = self._random
        subject = self._subject(concept)
        if colour and choose.random() < 0.15 and not set(COLOURS) & set(subject.split()):
            subject = f"{self._colour(colour)} {subject}"
        elif choose.random() < 0.15:
            # The model must ignore words that are not in the picture.
            subject = choose.choice((f"{choose.choice(_ADJECTIVES)} {subject}", f"{subject} {choose.choice(_ACTIONS)}"))
        return self._dressed(subject, style)

    def painted(self, thing: Named, style: str) -> str:
        """Return a caption of a picture in another colour than its own, which names the colour."""
        return self._dressed(self._thing(thing), style)

    def pair(self, one: Named, other: Named, style: str) -> str:
        """Return a caption of two things next to each other."""
        pair = self._random.choice(_PAIRS).format(self._thing(one), self._thing(other))
        return self._styled(pair, style) if self._random.random() < _STYLED or style == OUTLINE else pair

    def on_background(self, thing: Named, style: str, background: str) -> str:
        """Return a caption of a thing on a background of a colour."""
        subject = self._random.choice(("{}", "a {}")).format(self._thing(thing))
        place = self._random.choice(_BACKGROUNDS).format(subject, self._colour(background))
        return self._styled(place, style) if self._random.random() < _STYLED or style == OUTLINE else place

    def small(self, thing: Named, style: str) -> str:
        """Return a caption of a picture that leaves most of the canvas empty."""
        return self._dressed(f"{self._random.choice(_SMALL)} {self._thing(thing)}", style)

    def phrase(self) -> tuple[str, int]:
        """Return a phrase about a concept for which no picture exists, and the concept, or -1 for several."""
        choose = self._random
        about = choose.randrange(len(self._art.concepts))
        concept = self._art.concepts[about]
        other = choose.choice(self._art.concepts).name
        noun = choose.choice((concept.name, self._other_name(about) or concept.name))
        kind = choose.random()
        if kind < 0.3:
            noun = f"{noun} {choose.choice(_ACTIONS)}"
        elif kind < 0.45:
            noun = f"{choose.choice(_ADJECTIVES)} {noun}"
        elif kind < 0.6:
            noun = f"{self._colour(choose.choice(COLOURS))} {noun}"
        elif kind < 0.7:
            noun, about = choose.choice(_PAIRS).format(noun, other), -1
        elif kind < 0.78:
            noun = f"{choose.choice(_ADJECTIVES)} {noun} {choose.choice(_ACTIONS)}"
        elif kind < 0.82:
            noun = choose.choice(_BACKGROUNDS).format(noun, choose.choice(COLOURS))
        elif kind < 0.85:
            noun, about = f"{choose.choice(_SOMEONE)} {choose.choice(_ACTIONS)}", -1
        elif kind < 0.89:
            noun, about = ", ".join(choose.choice(self._art.concepts).name for _ in range(choose.randint(3, 24))), -1
        return (choose.choice(_OPENINGS).format(noun) if choose.random() < 0.5 else noun), about

    def reworded(self) -> tuple[str, str]:
        """Return a phrase with another word for a concept, and the same with its name, without invisible details."""
        choose = self._random
        concept = choose.randrange(len(self._art.concepts))
        it, word = self._art.concepts[concept], self._other_name(concept)
        frames = ["{}", choose.choice(_OPENINGS)]
        kind = choose.random()
        if it.group in _PEOPLE and kind < 0.3:
            return self._of_someone(concept) or f"{choose.choice(_SOMEONE)} {word or it.name}", it.name
        said = word or it.name
        if kind < 0.45:
            said = f"{said} {choose.choice(_ACTIONS)}"
        elif kind < 0.55:
            said = f"{choose.choice(_ADJECTIVES)} {said}"
        elif kind < 0.65:
            frames = [f"{self._colour(choose.choice(COLOURS))} {{}}"]
        elif kind < 0.75:
            frames = [self._styled("{}", choose.choice(list(STYLES)))]
        elif kind < 0.85:
            other = choose.choice(self._art.concepts).name
            frames = [choose.choice(_PAIRS).format(*each) for each in (("{}", other), (other, "{}"))]
        frame = choose.choice(frames)
        return frame.format(said), frame.format(it.name)

    def is_of_someone(self, text: str) -> bool:
        """Return whether a text contains what someone is or does."""
        return any(some in text for some in _SOMEONE) or any(text in doing for doing in self._doing)

    def _subject(self, concept: int) -> str:
        choose, it = self._random, self._art.concepts[concept]
        if choose.random() < _PEOPLE.get(it.group, 0) and (of_someone := self._of_someone(concept)):
            return of_someone
        kind = choose.random()
        if kind < 0.4 and (other := self._other_name(concept)):
            return other
        if kind < 0.52 and it.keywords:
            extra = choose.sample(it.keywords, min(len(it.keywords), choose.randint(1, 3)))
            return ", ".join((it.name, *extra))
        if kind < 0.58 and it.keywords:
            return f"{it.name} {choose.choice(it.keywords)}"
        return it.name

    def _of_someone(self, concept: int) -> str:
        """Return what a person or a smiley is or does, "someone laughing", or "" if no keyword says it."""
        choose = self._random
        if not (doing := self._doing[concept]):
            return ""
        frames = [f"{some} {{}}" for some in _SOMEONE]
        frames += _FACE if self._art.concepts[concept].group == "smileys-emotion" else ()
        return choose.choice(frames).format(choose.choice(doing))

    def _other_name(self, concept: int) -> str:
        """Return a distinctive keyword, a synonym or a common word of the concept, or "" if there is none."""
        every = (self._distinctive[concept], self._synonyms[concept], self._common[concept])
        sources = [some for some in every if some]
        return self._random.choice(self._random.choice(sources)) if sources else ""

    def _thing(self, thing: Named) -> str:
        """Return a short name. The name of a painted thing has its new colour and no others."""
        name = self._art.concepts[thing.concept].name
        if self._random.random() < 0.3:
            name = self._other_name(thing.concept) or name
        if not thing.colour:
            return name
        rest = " ".join(word for word in name.split() if word not in COLOURS)
        return f"{self._colour(thing.colour)} {rest or self._art.concepts[thing.concept].name}"

    def _dressed(self, subject: str, style: str) -> str:
        choose = self._random
        if choose.random() < _STYLED or style == OUTLINE:
            return self._styled(subject, style)
        return choose.choice(_OPENINGS).format(subject) if choose.random() < 0.4 else subject

    def _styled(self, subject: str, style: str) -> str:
        word = self._random.choice(STYLES[style])
        return f"{word} {subject}" if self._random.random() < 0.6 else f"{subject}, {word}"

    def _colour(self, colour: str) -> str:
        return self._random.choice((colour, colour, *_MORE_COLOURS.get(colour, ())))


def _doing(keywords: Sequence[str]) -> tuple[str, ...]:
    """Return keywords of a person, and as many participles of those that are verbs."""
    common = _participles()
    doing = [common[word] for word in keywords if word in common]
    return (*keywords, *(doing * (len(keywords) // len(doing)) if doing else ()))


@functools.cache
def _participles() -> dict[str, str]:
    """Return common words that end in "ing", by their possible stems: "laugh", "cycle", "run"."""
    participles: dict[str, str] = {}
    for word in english(None):
        stem = word.removesuffix("ing")
        if len(stem) > 2 and stem != word:
            participles |= {stem: word, f"{stem}e": word} | ({stem[:-1]: word} if stem[-1] == stem[-2] else {})
    return participles


def words(concepts: Sequence[Concept], synonyms: Sequence[Sequence[str]]) -> list[str]:
    """Return all words of captions and phrases, for the vocabulary."""
    parts = [word for concept in concepts for word in (concept.name, *concept.keywords)]
    parts += [word for some in synonyms for word in some]
    return parts + frames() + _ACTIONS


def frames() -> list[str]:
    """Return all words of captions except the names of things."""
    styles = [word for style in STYLES.values() for word in style]
    colours = [*COLOURS, *(word for more in _MORE_COLOURS.values() for word in more)]
    templates = [part for template in (*_OPENINGS, *_PAIRS, *_BACKGROUNDS) for part in template.split("{}")]
    return styles + colours + templates + _ADJECTIVES + [*_SMALL, *_SOMEONE]
