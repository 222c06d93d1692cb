"""A CLIP text encoder that diffusers' pipelines call, without work that need not be done in every call."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Literal

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from server.acceleration import compilation
from server.acceleration.compilation import CompiledCall, EagerOrCompiled

_CACHED_TEXTS = 2  # the prompt and the negative prompt of one request


class Encoded:
    """The parts of a text encoder's output that pipelines read: its first value, and the penultimate hidden state."""

    def __init__(self, first: torch.Tensor, penultimate: torch.Tensor) -> None:
        self._first = first
        self.hidden_states = {-2: penultimate}

    def __getitem__(self, at: Literal[0]) -> torch.Tensor:
        return self._first


class TextEncoder(nn.Module):
    """Call a text encoder that is, or will be, on `device`; on CUDA as a graph if `captures`.

    It caches the last two texts: the experts share an encoder and read the same prompt, and many requests have the same
    negative prompt, or none. The encoder is not among its modules: before every call pipelines ask all their modules
    whether they are offloaded, which takes milliseconds.
    """

    def __init__(
        self, encoder: CLIPTextModel | CLIPTextModelWithProjection, device: torch.device, captures: bool
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = encoder.config, encoder.dtype, device
        self._hidden = (encoder,)
        compiled = CompiledCall(encoder, self._states, "cuda_graphs", device) if captures else None
        self._call = EagerOrCompiled(self._states, compiled)
        self._cache: OrderedDict[Hashable, Encoded] = OrderedDict()

    @property
    def shapes(self) -> int:
        """The number of shapes that are compiled."""
        return self._call.shapes

    def forward(self, ids: torch.Tensor, output_hidden_states: bool = True) -> Encoded:
        """Encode token ids, (1, 77)."""
        text = compilation.is_running_compiled(), ids.cpu().numpy().tobytes()
        if text not in self._cache:
            self._cache[text] = Encoded(*self._call(ids))
        self._cache.move_to_end(text)
        while len(self._cache) > _CACHED_TEXTS:
            self._cache.popitem(last=False)
        return self._cache[text]

    def _states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self._hidden[0](ids, output_hidden_states=True)
        return encoded[0], encoded.hidden_states[-2]
