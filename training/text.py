"""Teach the two text encoders: what a sentence means, from a larger encoder, and which concept a caption names.

Each encoder's pooled output learns to predict the sentence embedding of all-MiniLM-L6-v2 (Apache-2.0, used here only)
of captions, of plain phrases and of single English words, so that words which no caption has lie near those that
captions have, and to tell the concepts of the art apart. The base later teaches them which of it can be seen, see
denoisers.py.
"""

import logging
import random
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture, teacher
from training.art import Art
from training.captions import Captioner
from training.vocabulary import english

log = logging.getLogger(__name__)

LENGTH = 24  # tokens that nearly all captions and phrases have room in
_TEMPERATURE = 0.07


def train(
    art: Art,
    captioner: Captioner,
    tokenizer: CLIPTokenizer,
    seconds: float,
    device: torch.device,
    batch: int = 256,
    seed: int = 0,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two encoders, taught for so many seconds in batches of so many sentences."""
    torch.manual_seed(seed)
    narrow, wide = (encoder.to(device) for encoder in architecture.text_encoders(tokenizer))
    choose = random.Random(seed)
    texts, about = spoken(art, captioner, seed)
    concepts = torch.tensor(about, device=device)
    taught = teacher.meanings(texts, device)
    tokens = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]

    widths = (architecture.NARROW, architecture.WIDE)
    heads = nn.ModuleList([_Head(width, len(art.concepts)) for width in widths]).to(device)
    parameters = [*narrow.parameters(), *wide.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    began, losses = time.monotonic(), torch.zeros(2, device=device)
    for step, rows in enumerate(_batches([len(each) for each in tokens], batch, choose), start=1):
        passed = (time.monotonic() - began) / seconds
        if passed >= 1:
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 200, (1 - passed) / 0.4 + 0.01)
        end = tokenizer.eos_token_id
        ids = nn.utils.rnn.pad_sequence([tokens[row] for row in rows], batch_first=True, padding_value=end).to(device)
        chosen = torch.tensor(rows, device=device)
        pooled = narrow(ids).pooler_output, wide(ids).text_embeds
        meaning = naming = torch.zeros((), device=device)
        for head, features in zip(heads, pooled, strict=True):
            one, other = head(features, taught[chosen], concepts[chosen])
            meaning, naming = meaning + one, naming + other
        optimizer.zero_grad()
        (meaning + 0.25 * naming).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses += torch.stack([meaning.detach(), naming.detach()])
        if step % 200 == 0:
            log.info("text: step %d, 1 - cosine %.4f, naming %.4f", step, *(losses / 400).tolist())
            losses.zero_()
    return narrow.eval(), wide.eval()


def spoken(
    art: Art, captioner: Captioner, seed: int = 0, captions: int = 40_000, phrases: int = 50_000
) -> tuple[list[str], list[int]]:
    """Captions, plain phrases and single English words, and the concept that each is about or -1."""
    choose = random.Random(seed)
    said = [(captioner.caption(each.concept, each.style), each.concept)
            for each in choose.choices(art.pictures, k=captions)]  # fmt: skip
    said += [captioner.phrase() for _ in range(phrases)]
    said += [(word, -1) for word in english()]
    return [text for text, _ in said], [about for _, about in said]


def meant(
    art: Art, synonyms: Sequence[Sequence[str]], common: Sequence[Sequence[str]], count: int = 60_000
) -> tuple[list[str], list[str]]:
    """Sentences and what each is to mean: itself, but another word for a concept what its name means.

    What someone is or does is not held at what it meant: which pictures show it, the base has yet to teach.
    """
    taught = {word for some in common for word in some}
    said, _ = spoken(art, Captioner(art, synonyms, [()] * len(art.concepts), seed=0))
    captioner = Captioner(art, synonyms, common, seed=0)
    held = [text for text in said if text not in taught and not captioner.is_of_someone(text)]
    reworded = [captioner.reworded() for _ in range(count)]
    return [*held, *(text for text, _ in reworded)], [*held, *(text for _, text in reworded)]


class _Head(nn.Module):
    """Reads a pooled output: predicts the teacher's embedding, and the concept."""

    def __init__(self, width: int, concepts: int) -> None:
        super().__init__()
        self.meaning = nn.Linear(width, teacher.WIDTH)
        self.concepts = nn.Parameter(torch.randn(concepts, width) / width**0.5)

    def forward(
        self, features: torch.Tensor, meanings: torch.Tensor, concepts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        meaning = (1 - F.cosine_similarity(self.meaning(features), meanings)).mean()
        logits = F.normalize(features, dim=-1) @ F.normalize(self.concepts, dim=-1).T / _TEMPERATURE
        return meaning, F.cross_entropy(logits, concepts, ignore_index=-1, label_smoothing=0.05)


def _batches(lengths: list[int], size: int, choose: random.Random) -> Iterator[list[int]]:
    """Random batches without end, each of texts about as long as one another, so that little is padding."""
    while True:
        some = sorted(choose.sample(range(len(lengths)), 16 * size), key=lengths.__getitem__)
        batches = [some[at : at + size] for at in range(0, len(some), size)]
        choose.shuffle(batches)
        yield from batches
