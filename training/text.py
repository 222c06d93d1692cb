"""Train the two text encoders on a teacher's sentence embeddings, and to classify the concept of a caption.

Each encoder's pooled output learns to predict the embedding by all-MiniLM-L6-v2 (Apache-2.0, used here only) of
captions, of plain phrases and of single English words, so that words without captions lie near words with captions. It
also learns to classify the concepts of the art. denoisers.py later trains the encoders with the base.
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

LENGTH = 24  # tokens; nearly all captions and phrases are shorter
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
    """Train the two encoders for `seconds` in batches of `batch` sentences."""
    torch.manual_seed(seed)
    narrow, wide = (encoder.to(device) for encoder in architecture.text_encoders(tokenizer))
    choose = random.Random(seed)
    texts, about = sentences(art, captioner, seed)
    concepts = torch.tensor(about, device=device)
    targets = teacher.meanings(texts, device)
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
            one, other = head(features, targets[chosen], concepts[chosen])
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


def sentences(
    art: Art, captioner: Captioner, seed: int = 0, captions: int = 40_000, phrases: int = 50_000
) -> tuple[list[str], list[int]]:
    """Return captions, plain phrases and single English words, and the concept of each, or -1."""
    choose = random.Random(seed)
    labelled = [
        (captioner.caption(each.concept, each.style), each.concept) for each in choose.choices(art.pictures, k=captions)
    ]
    labelled += [captioner.phrase() for _ in range(phrases)]
    labelled += [(word, -1) for word in english()]
    return [text for text, _ in labelled], [concept for _, concept in labelled]


def meaning_pairs(
    art: Art, synonyms: Sequence[Sequence[str]], common: Sequence[Sequence[str]], count: int = 60_000
) -> tuple[list[str], list[str]]:
    """Return texts and their targets: the text itself, or the same text with the name of a reworded concept.

    Texts about what someone is or does are excluded: the base still has to learn which pictures show it.
    """
    common_words = {word for some in common for word in some}
    texts, _ = sentences(art, Captioner(art, synonyms, [()] * len(art.concepts), seed=0))
    captioner = Captioner(art, synonyms, common, seed=0)
    held = [text for text in texts if text not in common_words and not captioner.is_of_someone(text)]
    reworded = [captioner.reworded() for _ in range(count)]
    return [*held, *(text for text, _ in reworded)], [*held, *(text for _, text in reworded)]


class _Head(nn.Module):
    """Predict the teacher's embedding and the concept from a pooled output, and return both losses."""

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
    """Yield endless random batches of texts of similar length, so that there is little padding."""
    while True:
        some = sorted(choose.sample(range(len(lengths)), 16 * size), key=lengths.__getitem__)
        batches = [some[at : at + size] for at in range(0, len(some), size)]
        choose.shuffle(batches)
        yield from batches
