"""A CLIP text encoder as pipelines of diffusers call one, without what need not be done in every call."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Literal

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from server.acceleration import compilation
from server.acceleration.compilation import Compiled, Ways

_KEPT = 2  # texts: those of one request


class Encoded:
    """What pipelines read of a text encoder's output: its first value, and the states before the last layer."""

    def __init__(self, first: torch.Tensor, penultimate: torch.Tensor) -> None:
        self._first = first
        self.hidden_states = {-2: penultimate}

    def __getitem__(self, at: Literal[0]) -> torch.Tensor:
        return self._first


class TextEncoder(nn.Module):
    """Answers for a text encoder that is, or will be, on `device`; by a recorded call if it `records`, on CUDA.

    It keeps what it made of the last two texts: the experts share an encoder and read the same prompt, and many
    requests have the same negative prompt, or none. The encoder is not among its modules, all of which pipelines ask
    before every call whether they are offloaded; that takes milliseconds.
    """

    def __init__(
        self, encoder: CLIPTextModel | CLIPTextModelWithProjection, device: torch.device, records: bool
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = encoder.config, encoder.dtype, device
        self._hidden = (encoder,)
        self._call = Ways(self._states, Compiled(encoder, self._states, device) if records else None)
        self._kept: OrderedDict[Hashable, Encoded] = OrderedDict()

    @property
    def shapes(self) -> int:
        """How many are compiled."""
        return self._call.shapes

    def forward(self, ids: torch.Tensor, output_hidden_states: bool = True) -> Encoded:
        """Of token ids, (1, 77)."""
        text = compilation.runs(), ids.cpu().numpy().tobytes()
        if text not in self._kept:
            self._kept[text] = Encoded(*self._call(ids))
        self._kept.move_to_end(text)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[text]

    def _states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self._hidden[0](ids, output_hidden_states=True)
        return encoded[0], encoded.hidden_states[-2]
