"""Teach the text encoders more words of English once the experts are done, with the U-Nets left as they are.

A word that is near one concept is to be read as the concept's name is, in plain phrases too. What the base's U-Net
reads of a text is what its cross-attention takes from the hidden states, whichever tokens these belong to, and the
pooled output: that is compared with what it takes of the name as the encoders were. Captions are to be read as before.
"""

import copy
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from training import captions, denoisers, synonyms, text
from training.art import RUNS, Art, Concept
from training.captions import Captioner, Named
from training.colours import PAINTS
from training.denoisers import Encoders
from training.optimisation import Trainer
from training.synonyms import Synonyms, WordNet
from training.vocabulary import CONTEXT, english

log = logging.getLogger(__name__)

# How near a word is to be to the concept it means, by its gloss or, where it is no noun, by names alone. Beside the
# gloss counts how near the word is to a name; that it is known as a synonym counts in both.
_MEANT_BY_GLOSS, _MEANT, _BY_NAME, _BY_SYNONYM = 0.55, 0.65, 0.25, 0.15
_PHRASE = 16  # tokens that nearly all plain phrases have room in
_QUERIES = 8  # of each cross-attention, by which texts are compared
_TEMPERATURE = 0.07
_NAMING = 0.2  # weight of telling the concepts apart
_HELD = 4.0  # weight of reading captions as before
_SHARE = 0.7  # of the way from the encoders before to those that were taught: most words, and half the harm


@dataclass(frozen=True)
class Word:
    """A word of English, the concept that it is taught to mean, and how often beside others."""

    word: str
    concept: int
    often: float


def everything(concepts: Sequence[Concept], known: Synonyms) -> list[Word]:
    """Common words that are near one concept, and its synonyms that are one word, found the first time."""
    file = RUNS / "words.json"
    if not file.is_file():
        found = _found(concepts, known.seen, synonyms.read_wordnet(RUNS / "packages"))
        file.write_text(json.dumps([astuple(word) for word in found]))
    return [Word(*fields) for fields in json.loads(file.read_text())]


def trainer(
    unet: UNet2DConditionModel,
    encoders: Encoders,
    tokenizer: CLIPTokenizer,
    art: Art,
    known: Synonyms,
    batch: int = 44,
    seed: int = 0,
) -> Trainer:
    """What teaches the encoders, in batches of so many phrases with a word and half as many captions."""
    device = next(unet.parameters()).device
    before = copy.deepcopy(encoders).requires_grad_(False)
    with torch.no_grad():
        read = [before(some) for some in _tokens(tokenizer, (each.name for each in art.concepts), device).split(64)]
        reader = Reader(unet.requires_grad_(False), *(torch.cat(part) for part in zip(*read, strict=True)))
        named = F.normalize(torch.cat([reader(*each) for each in read]), dim=1)
    captioner, choose = Captioner(art, known.seen, seed), random.Random(seed)
    words = everything(art.concepts, known)
    chosen = choose.choices(words, [word.often for word in words], k=60_000)
    phrases, names, concepts = zip(*(captioner.named(each.word, each.concept) for each in chosen), strict=True)
    said, meant = (_tokens(tokenizer, some, device, _PHRASE) for some in (phrases, names))
    about = torch.tensor(concepts, device=device)
    kept = _tokens(tokenizer, _captions(captioner, art, choose), device, text.LENGTH)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(said), (batch,), device=device)
        caption = kept[torch.randint(len(kept), (batch // 2,), device=device)]
        with torch.no_grad():
            wanted, then = reader(*before(meant[rows])), before(caption)
        read, now = reader(*encoders(said[rows])), encoders(caption)
        meaning = (1 - F.cosine_similarity(read, wanted)).mean()
        naming = F.cross_entropy(F.normalize(read, dim=1) @ named.T / _TEMPERATURE, about[rows], ignore_index=-1)
        moved = (reader(*now) - reader(*then)).square().sum(1).mean() + F.mse_loss(now[0], then[0]) / then[0].var()
        return meaning + _NAMING * naming + _HELD * moved

    return Trainer("words", encoders, {"words": loss}, {"words": 1.0}, 1e-3, decay=0.99, rise=60)


@torch.no_grad()
def tempered(before: Encoders, after: Encoders) -> Encoders:
    """The encoders most of the way from what they were to what they were taught."""
    for parameter, taught in zip(before.parameters(), after.parameters(), strict=True):
        parameter.lerp_(taught, _SHARE)
    return before


class Reader(nn.Module):
    """What a U-Net reads of texts, as features (n, width): zero for the mean of some texts, about one long for each.

    Its queries are those that it makes of noise, from which a picture begins, told some of these texts, of which
    `hidden`, (n, 77, 256), and `pooled`, (n, 160), are the encoders' outputs.
    """

    def __init__(self, unet: UNet2DConditionModel, hidden: torch.Tensor, pooled: torch.Tensor) -> None:
        super().__init__()
        self._attentions: list[Any] = [part for name, part in unet.named_modules() if name.endswith("attn2")]
        self._queries = _queries(unet, self._attentions, hidden[::20], pooled[::20])
        self._padding = hidden.mean(0, keepdim=True)
        parts = [torch.cat(some) for some in zip(
            *(self._parts(*each) for each in zip(hidden.split(64), pooled.split(64), strict=True)), strict=True)
        ]  # fmt: skip
        self._means = [part.mean(0) for part in parts]
        self._sizes = [(part - mean).norm(dim=1).mean() for part, mean in zip(parts, self._means, strict=True)]

    def forward(self, hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Features from hidden states (n, length, 256) and pooled outputs (n, 160)."""
        parts = self._parts(hidden, pooled)
        scaled = [(part - mean) / size for part, mean, size in zip(parts, self._means, self._sizes, strict=True)]
        return torch.cat(scaled, dim=1) / len(parts) ** 0.5

    def _parts(self, hidden: torch.Tensor, pooled: torch.Tensor) -> list[torch.Tensor]:
        """The pooled output, and what each cross-attention takes. Past the given length all texts are padded alike."""
        parts = [pooled]
        padding = self._padding[:, hidden.shape[1] :]
        for attention, query in zip(self._attentions, self._queries, strict=True):
            key, value = (
                _heads(attention, torch.cat([layer(hidden), layer(padding).expand(len(hidden), -1, -1)], dim=1))
                for layer in (attention.to_k, attention.to_v)
            )
            parts.append(F.scaled_dot_product_attention(query.expand(len(hidden), -1, -1, -1), key, value).flatten(1))
        return parts


def _queries(
    unet: UNet2DConditionModel, attentions: Sequence[Any], hidden: torch.Tensor, pooled: torch.Tensor
) -> list[torch.Tensor]:
    """Some queries that each cross-attention makes of noise, (1, heads, few, width)."""
    made: dict[nn.Module, torch.Tensor] = {}
    hooks = [layer.to_q.register_forward_hook(lambda layer, _, queries: made.update({layer: queries}))
             for layer in attentions]  # fmt: skip
    latents, count = unet.config.sample_size, len(hidden)
    noise = torch.randn(count, unet.config.in_channels, latents, latents, device=hidden.device)
    ids = torch.tensor([8 * latents, 8 * latents, 0, 0, 8 * latents, 8 * latents], device=hidden.device)
    added = {"text_embeds": pooled, "time_ids": ids.expand(count, -1)}
    unet(noise, torch.randint(500, 1000, (count,), device=hidden.device), hidden, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    flat = [made[layer.to_q].flatten(0, 1) for layer in attentions]
    few = (each[torch.randperm(len(each), device=each.device)[:_QUERIES]] for each in flat)
    return [_heads(layer, each[None]) for layer, each in zip(attentions, few, strict=True)]


def _heads(attention: Any, states: torch.Tensor) -> torch.Tensor:
    return states.unflatten(2, (attention.heads, -1)).transpose(1, 2)


def _captions(captioner: Captioner, art: Art, choose: random.Random, count: int = 60_000) -> list[str]:
    """What experts were told in training, of all kinds of scenes."""
    made = []
    for one, other in zip(*(choose.choices(art.pictures, k=count) for _ in range(2)), strict=True):
        thing = Named(one.concept, choose.choice(("", "", *PAINTS)))
        made.append(choose.choice((
            captioner.caption(one.concept, one.style),
            captioner.pair(thing, Named(other.concept), one.style),
            captioner.painted(Named(one.concept, choose.choice(PAINTS)), one.style),
            captioner.on_background(thing, one.style, choose.choice(PAINTS)),
            captioner.small(thing, one.style),
        )))  # fmt: skip
    return made


def _found(concepts: Sequence[Concept], lists: Sequence[Sequence[str]], wordnet: WordNet) -> list[Word]:
    """The concept that each word is nearest to, by the gloss of its commonest sense and by names, if it is near."""
    lent: dict[str, list[int]] = defaultdict(list)
    for at, some in enumerate(lists):
        for word in some:
            lent[word].append(at)
    taken = {
        word for each, some in zip(concepts, synonyms.telling(concepts), strict=True) for word in (each.name, *some)
    }
    taken |= set(" ".join(captions.frames()).replace(",", "").split())
    rank = {word: at for at, word in enumerate(english(None))}
    words = [word for word in dict.fromkeys([*rank, *sorted(lent)])
             if word not in taken and " " not in word and not synonyms.held_out(word)
             and (word in lent or wordnet.has(word))]  # fmt: skip
    senses = [wordnet.commonest.get(word) or wordnet.commonest.get(word.removesuffix("s"), "") for word in words]
    told = wordnet.told(sorted({key for key in senses if key}))
    all_known = synonyms.all_known(concepts)
    found = []
    for word, key, near in zip(words, senses, synonyms.nearness(words, concepts), strict=True):
        score = all_known @ told[key] + _BY_NAME * near if key else near
        score[lent[word]] += _BY_SYNONYM
        if float(score.max()) > (_MEANT_BY_GLOSS if key else _MEANT):
            found.append(Word(word, int(score.argmax()), (rank.get(word, len(rank)) + 500) ** -0.5))
    log.info("words: %d of %d mean a concept", len(found), len(words))
    return found


def _tokens(
    tokenizer: CLIPTokenizer, texts: Iterable[str], device: torch.device, length: int = CONTEXT
) -> torch.Tensor:
    return denoisers.tokens(tokenizer, list(texts), length).to(device)
