"""Run network calls in their fast form: by C++ kernels on a CPU, as one graph on CUDA.

On CUDA, and on a CPU that can run the C++ kernels, a network has the fused layers of layers.py. On such a CPU a call of
any shape runs the kernels. On CUDA a call of the shapes seen while `warming` is captured once and replayed from then
on, because Python launches kernels more slowly than the device runs them. Elsewhere torch.compile compiles the layers
that a network repeats, for the shapes seen while `warming`. Calls of other shapes run eagerly.
"""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
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

from server.acceleration import layers
from server.acceleration.kernels import common, cpu
from server.acceleration.kernels.cpu_library import BuildError

Mode = Literal["auto", "off", "blocks"]
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
# What a folder does to a compiler, in its own words and in those of what loads a library.
_NO_PLACE = [os.strerror(each) for each in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
_NO_PLACE += ["failed to map segment"]
_BEFORE = 2  # calls before one is recorded, in which kernels are loaded and workspaces made
_SWITCH_SECONDS = 1e-5  # after which the interpreter is left to others: less made these slower again
_CODES = 1024  # versions of one function that may be compiled: layers of all sizes share theirs
# On Hopper the first of these that can compute an attention does: cuDNN's was the fastest there by measurement.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def keep_in(folder: Path) -> None:
    """Let what is compiled from now on be kept in a folder, and taken from there by later processes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    cpu.set_cache(folder)


class CannotKeep(Exception):
    """Nothing can be written to a folder; the message names it and says why."""


def check_writable(folder: Path) -> None:
    """Raises CannotKeep."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)  # a full disk still takes a name
    except OSError as error:
        raise CannotKeep(f"nothing can be written to {folder}: {error.strerror}") from error


def explain(error: Exception) -> tuple[str, str]:
    """Say why something could not be compiled, and what to do about it."""
    if isinstance(error, BuildError):
        return error.reason, error.advice
    from torch._inductor.exc import InvalidCxxCompiler  # what compiles has imported it

    inner = getattr(error, "inner_exception", error)
    words = f"{type(inner).__name__}: {inner}"
    reason = next(line.strip() for line in words.splitlines() if line.strip())
    no_place = inner.strerror if isinstance(inner, OSError) else None
    if no_place is None:
        no_place = next((each for each in _NO_PLACE if each in words), None)
    if no_place is None:
        is_absent = isinstance(inner, InvalidCxxCompiler)
        return reason, "install a C++ compiler" if is_absent else "see that the C++ compiler works"
    # inductor sets the variable itself where nobody has.
    folder = getattr(inner, "filename", None) or os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    return f"{folder}: {no_place}", (
        "let --compile-cache, or TMPDIR without one, name a folder that can be written to, has room, and is not "
        "mounted noexec"
    )


class Ways:
    """A call of a network with tensors, in the way that is wanted: as it is, or `Compiled`, where that is `running`.

    What is compiled can be `made` when it is wanted first, by the thread that wants it.
    """

    def __init__(self, plain: Call, compiled: "Compiled | None" = None, made: "Callable[[], Compiled] | None" = None):
        self._plain, self._compiled, self._made = plain, compiled, made

    @property
    def shapes(self) -> int:
        """How many are compiled."""
        return 0 if self._compiled is None else self._compiled.shapes

    def forget(self) -> None:
        """From now on what is compiled is not wanted."""
        self._compiled = self._made = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        with _attention:
            if not _compiled.get():
                return self._plain(*inputs)
            if self._compiled is None and self._made is not None:
                self._compiled = self._made()
            return (self._compiled or self._plain)(*inputs)


class Compiled:
    """A call of a network with tensors, compiled for the shapes and dtypes that it is called with while `warming`.

    `call` takes tensors and makes some with `network`, which is, or will be, on `device`. It is for one thread at a
    time, and on CUDA for one stream; a tensor that was passed before must not have been written into since.
    """

    def __init__(self, network: nn.Module, call: Call, device: torch.device) -> None:
        self._call = call
        self._made: dict[Hashable, Call] = {}
        self._pool: Any = None
        self._stream: Any = None
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its convolutions want it
            self._pool = torch.cuda.graph_pool_handle()
            # Graphs recorded on one stream share a workspace of cuBLAS, and those of two networks may run at one time.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compiled = call
        self._takes_any_shape = layers.run_cpu_kernels(network)
        if self._takes_any_shape:
            self._compiled = _by_cpu_kernels(call)
        elif device.type != "cuda":
            _compile_blocks(network)

    @property
    def shapes(self) -> int:
        """How many are compiled."""
        return len(self._made)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        key = tuple((each.shape, each.dtype) for each in inputs)
        if _warming.get() and key not in self._made:
            self._made[key] = self._recorded(inputs) if self._pool is not None else self._compiled
        if key in self._made:
            return self._made[key](*inputs)
        if self._takes_any_shape:
            return self._compiled(*inputs)
        with running(compiled=False):
            return self._call(*inputs)

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


# Of each thread its own: one can compile while another makes images.
_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
_warming: ContextVar[bool] = ContextVar("warming", default=False)


def runs() -> bool:
    """Whether this thread makes the compiled calls, where there are any."""
    return _compiled.get()


@contextlib.contextmanager
def running(compiled: bool) -> Iterator[None]:
    """While this lasts, this thread makes the compiled calls, where there are any, or none of them."""
    token = _compiled.set(compiled)
    try:
        yield
    finally:
        _compiled.reset(token)


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """While this lasts, shapes that this thread sees for the first time where it is `running` compiled are compiled."""
    token = _warming.set(True)
    try:
        # What is configured holds for the thread that does it. inductor keeps the C++ that it writes by a key without
        # the instructions that it is for, and would compile it for others: that fails, or computes nonsense.
        keys = torch.compiler.config.cache_key_tag + torch.backends.cpu.get_cpu_capability()
        with (
            torch._dynamo.config.patch(recompile_limit=_CODES, accumulated_recompile_limit=_CODES),
            torch.compiler.config.patch(cache_key_tag=keys),  # type: ignore[attr-defined]
        ):
            yield
    finally:
        _warming.reset(token)


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """While this lasts, a thread that compiles, mostly in Python, leaves the interpreter to others soon after they ask.

    Each of a network's thousands of operations lets go of it, and by Python's default waits 5 ms to have it back.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class _Attention(contextlib.AbstractContextManager[None]):
    """The order of `_ATTENTION`, which torch has for the whole process: it stands as long as any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._order = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0 and _has_hopper():
                self._order.enter_context(sdpa_kernel(_ATTENTION, set_priority=True))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._order.close()


_attention = _Attention()


@functools.cache
def _has_hopper() -> bool:
    return torch.cuda.is_available() and common.is_hopper(torch.device("cuda"))


class _Block(nn.Module):
    """A layer that runs compiled or as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._ways: dict[bool, Callable[..., Any]] = {
            True: torch.compile(layer, fullgraph=True, dynamic=False),
            False: layer,
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._ways[_compiled.get()](*inputs, **named)


def _by_cpu_kernels(call: Call) -> Call:
    def made(*inputs: torch.Tensor) -> Any:
        with cpu.active():
            return call(*inputs)

    return made


def _compile_blocks(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, _BLOCKS):
                setattr(module, name, _Block(layer))
