"""What people call a picture: captions of the art, and plain phrases for teaching the text encoders more English."""

import random
from collections import Counter
from collections.abc import Sequence

from training.art import SETS, Art, Concept

_COLOURS = "red orange yellow green blue purple pink brown black white grey golden silver".split()
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
    "a {}", "an image of a {}", "a picture of a {}", "{} emoji", "a drawing of a {}", "the {}", "one {}", "my {}",
    "icon of a {}", "an illustration of a {}", "{} on a white background",
)  # fmt: skip


class Captioner:
    """Draws captions for pictures of an art, each as a person might have typed it."""

    def __init__(self, art: Art, seed: int) -> None:
        self._art = art
        self._random = random.Random(seed)
        uses = Counter(word for concept in art.concepts for word in {concept.name, *concept.keywords})
        # A keyword of many concepts ("animal") says little of any one: it may stand beside a name, never alone.
        self._telling = [tuple(word for word in each.keywords if uses[word] <= 3) for each in art.concepts]

    def caption(self, concept: int, style: str) -> str:
        """One caption of a concept drawn in a style."""
        choose = self._random
        subject = self._subject(concept)
        if choose.random() < 0.3:
            word = choose.choice(SETS[style][2])
            subject = f"{word} {subject}" if choose.random() < 0.6 else f"{subject}, {word}"
        elif choose.random() < 0.4:
            subject = choose.choice(_OPENINGS).format(subject)
        return subject

    def phrase(self) -> str:
        """Plain English around the concepts, of which no picture exists: for the text encoders alone."""
        choose = self._random
        concept = choose.choice(self._art.concepts)
        noun = choose.choice((concept.name, concept.name, *concept.keywords))
        kind = choose.random()
        if kind < 0.3:
            noun = f"{noun} {choose.choice(_ACTIONS)}"
        elif kind < 0.55:
            noun = f"{choose.choice(_COLOURS if kind < 0.42 else _ADJECTIVES)} {noun}"
        elif kind < 0.7:
            noun = f"{noun} and a {choose.choice(self._art.concepts).name}"
        elif kind < 0.8:
            noun = f"{choose.choice(_ADJECTIVES)} {noun} {choose.choice(_ACTIONS)}"
        elif kind < 0.85:
            noun = ", ".join(choose.choice(self._art.concepts).name for _ in range(choose.randint(3, 24)))
        return choose.choice(_OPENINGS).format(noun) if choose.random() < 0.5 else noun

    def _subject(self, concept: int) -> str:
        choose, it = self._random, self._art.concepts[concept]
        kind = choose.random()
        if kind < 0.2 and self._telling[concept]:
            return choose.choice(self._telling[concept])
        if kind < 0.4 and it.keywords:
            extra = choose.sample(it.keywords, min(len(it.keywords), choose.randint(1, 3)))
            return ", ".join((it.name, *extra))
        if kind < 0.5 and it.keywords:
            return f"{it.name} {choose.choice(it.keywords)}"
        return it.name


def words(concepts: Sequence[Concept]) -> list[str]:
    """All that captions and phrases are made of, for the vocabulary."""
    parts = [word for concept in concepts for word in (concept.name, *concept.keywords)]
    styles = [word for _, _, style in SETS.values() for word in style]
    return parts + styles + _COLOURS + _ADJECTIVES + _ACTIONS + [opening.format("") for opening in _OPENINGS]
