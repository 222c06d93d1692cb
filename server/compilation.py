"""Networks at the speed of their device: layers are compiled or made over, and on CUDA a whole call is one graph.

What is compiled are the layers that a network repeats, or the whole of it, which takes far longer. On CUDA the layers
that repeat are not compiled but those of layers.py, which is faster both ways; and a call of the shapes seen while
`warming` is recorded once and replayed from then on, since Python is slower at launching kernels than such a device at
running them. Calls of other shapes are made as if nothing had been compiled.
"""

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from server import layers

Mode = Literal["off", "blocks", "full"]
Call = Callable[..., Any]

_BLOCKS = (
    ResnetBlock2D,
    Transformer2DModel,
    Downsample2D,
    Upsample2D,
    layers.Resnet,
    layers.Transformer,
    layers.Upsample,
)
_BEFORE = 2  # calls before one is recorded, in which kernels are loaded and workspaces made
_CODES = 1024  # versions of one function that may be compiled: layers of all sizes share theirs
# The first that can compute an attention does. cuDNN's was the fastest by measurement.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def keep_in(folder: Path) -> None:
    """Let what is compiled from now on be kept in a folder, and taken from there by later processes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


class Compiled:
    """A call of a network with tensors, compiled for the shapes and dtypes that it is called with while `warming`.

    `call` takes tensors and makes some with `network`, which is, or will be, on `device`. For one thread at a time, and
    on CUDA for one stream; a tensor that was passed before must not have been written into since.
    """

    warming = False  # in any thread: nothing is served until all is warm

    def __init__(self, network: nn.Module, call: Call, mode: Literal["blocks", "full"], device: torch.device) -> None:
        self._plain = call
        self._made: dict[Hashable, Call] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._switch = _Switch()
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its convolutions want it
            self._pool = torch.cuda.graph_pool_handle()
            # Graphs recorded on one stream share a workspace of cuBLAS, and those of two networks may run at one time.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _CODES
        self._fast = call
        if mode == "full":
            self._fast = torch.compile(call, fullgraph=True, dynamic=False)
        elif device.type != "cuda":
            _compile_blocks(network, self._switch)

    @property
    def shapes(self) -> int:
        """How many are compiled."""
        return len(self._made)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        key = tuple((each.shape, each.dtype) for each in inputs)
        if self.warming and key not in self._made:
            self._made[key] = self._recorded(inputs) if self._pool is not None else self._compiled
        return self._made.get(key, self._plain)(*inputs)

    def _compiled(self, *inputs: torch.Tensor) -> Any:
        with self._switch, sdpa_kernel(_ATTENTION, set_priority=True):
            return self._fast(*inputs)

    def _recorded(self, inputs: tuple[torch.Tensor, ...]) -> Call:
        """A call of these shapes as one graph, over inputs and an output of its own."""
        held = [each.clone() for each in inputs]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_BEFORE):
                self._compiled(*held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            made = self._compiled(*held)
        torch.cuda.current_stream().wait_stream(self._stream)

        last: list[torch.Tensor | None] = [None] * len(inputs)

        def replayed(*inputs: torch.Tensor) -> Any:
            for at, each in enumerate(inputs):
                if each is not last[at]:  # what the text says stays the same for all steps
                    held[at].copy_(each)
                    last[at] = each
            graph.replay()
            return tree_map(torch.clone, made)  # the next replay writes over it

        return replayed


def record_text_encoder(encoder: nn.Module, device: torch.device) -> Compiled:
    """Let a CLIP text encoder, which pipelines of diffusers call, answer them by a recorded call on CUDA."""
    plain = encoder.forward

    def states(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = plain(ids, output_hidden_states=True)
        return encoded[0], encoded.hidden_states[-2]

    compiled = Compiled(encoder, states, "blocks", device)

    def forward(ids: torch.Tensor, output_hidden_states: bool = True) -> _Encoded:
        return _Encoded(*compiled(ids))

    encoder.forward = forward
    return compiled


class _Encoded:
    """What pipelines read of a text encoder's output: its first value, and the states before the last layer."""

    def __init__(self, first: torch.Tensor, penultimate: torch.Tensor) -> None:
        self._first = first
        self.hidden_states = {-2: penultimate}

    def __getitem__(self, at: Literal[0]) -> torch.Tensor:
        return self._first


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """While this lasts, shapes that are seen for the first time are compiled."""
    Compiled.warming = True
    try:
        yield
    finally:
        Compiled.warming = False


class _Switch(contextlib.AbstractContextManager[None]):
    """Whether the blocks of one network run compiled."""

    def __init__(self) -> None:
        self.on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


class _Block(nn.Module):
    """A layer that runs compiled or as it is."""

    def __init__(self, layer: nn.Module, switch: _Switch) -> None:
        super().__init__()
        self.layer = layer
        self._switch = switch
        self._ways: dict[bool, Callable[..., Any]] = {
            True: torch.compile(layer, fullgraph=True, dynamic=False),
            False: layer,
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._ways[self._switch.on](*inputs, **named)


def _compile_blocks(network: nn.Module, switch: _Switch) -> None:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, _BLOCKS):
                setattr(module, name, _Block(layer, switch))
