"""Run network calls in their fast form: by C++ kernels on a CPU, as one graph on CUDA.

On CUDA, and on a CPU that can run the C++ kernels, a network has the fused layers of layers.py. On such a CPU a call of
any shape runs the kernels. On CUDA a call of the shapes seen while `capturing_shapes` is captured once and replayed
from then on, because Python launches kernels more slowly than the device runs them. Elsewhere torch.compile compiles
the layers that a network repeats, for the shapes seen while `capturing_shapes`. Calls of other shapes run eagerly.
"""

import contextlib
import errno
import os
import sys
import tempfile
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
from torch.utils._pytree import tree_map

from server.acceleration.kernels import cpu
from server.acceleration.kernels.cpu_library import BuildError

Mode = Literal["auto", "off", "blocks"]
Execution = Literal["cpu_kernels", "cuda_graphs", "torch_compile"]
Call = Callable[..., Any]

_REPEATED_LAYERS = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)
# A folder that a compiler cannot use is reported in these words, or in those of the dynamic loader.
_FOLDER_ERRORS = [os.strerror(each) for each in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
_FOLDER_ERRORS += ["failed to map segment"]
_CALLS_BEFORE_CAPTURE = 2  # they load kernels and allocate workspaces
_SWITCH_SECONDS = 1e-5  # between requests for the interpreter; less slowed other threads down again
_RECOMPILE_LIMIT = 1024  # of one function, which layers of all sizes share


def set_cache_dir(folder: Path) -> None:
    """Keep compiled code in a folder from now on, and look for it there first."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    cpu.set_cache(folder)


class CacheNotWritable(Exception):
    """Nothing can be written to a folder; the message names it and says why."""


def check_writable(folder: Path) -> None:
    """Raise CacheNotWritable unless a file in the folder can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)  # a full disk still takes a name
    except OSError as error:
        raise CacheNotWritable(f"nothing can be written to {folder}: {error.strerror}") from error


def explain(error: Exception) -> tuple[str, str]:
    """Return why compiling failed, and what to do about it."""
    if isinstance(error, BuildError):
        return error.reason, error.advice
    from torch._inductor.exc import InvalidCxxCompiler  # whatever compiled has imported it

    inner = getattr(error, "inner_exception", error)
    text = f"{type(inner).__name__}: {inner}"
    reason = next(line.strip() for line in text.splitlines() if line.strip())
    folder_error = inner.strerror if isinstance(inner, OSError) else None
    if folder_error is None:
        folder_error = next((each for each in _FOLDER_ERRORS if each in text), None)
    if folder_error is None:
        is_absent = isinstance(inner, InvalidCxxCompiler)
        return reason, "install a C++ compiler" if is_absent else "see that the C++ compiler works"
    # inductor sets the variable itself if it is not set.
    folder = getattr(inner, "filename", None) or os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    return f"{folder}: {folder_error}", (
        "let --compile-cache, or TMPDIR without one, name a folder that can be written to, has room, and is not "
        "mounted noexec"
    )


class EagerOrCompiled:
    """Dispatch a network call to its compiled form inside `running(compiled=True)`, otherwise to the eager one.

    `compile_lazily` makes the compiled form in the thread that needs it first.
    """

    def __init__(
        self,
        eager: Call,
        compiled: "CompiledCall | None" = None,
        compile_lazily: "Callable[[], CompiledCall] | None" = None,
    ) -> None:
        self._eager, self._compiled, self._compile_lazily = eager, compiled, compile_lazily

    @property
    def shapes(self) -> int:
        """The number of shapes that are compiled."""
        return 0 if self._compiled is None else self._compiled.shapes

    def discard(self) -> None:
        """Discard the compiled form: all calls are eager from now on."""
        self._compiled = self._compile_lazily = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if not _compiled.get():
            return self._eager(*inputs)
        if self._compiled is None and self._compile_lazily is not None:
            self._compiled = self._compile_lazily()
            self._compile_lazily = None
        return (self._compiled or self._eager)(*inputs)


class CompiledCall:
    """A call of a network with tensors, compiled for the shapes and dtypes that it sees while `capturing_shapes`.

    `call` takes tensors and returns some, by `network`, which is, or will be, on `device`. One thread at a time may
    call it, on CUDA on one stream. A tensor that it has seen must not be written into afterwards.
    """

    def __init__(self, network: nn.Module, call: Call, execution: Execution, device: torch.device) -> None:
        self._eager, self._execution = call, execution
        self._compiled: dict[Hashable, Call] = {}
        self._fast = call
        if execution == "cuda_graphs":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # for cuDNN's convolutions
            self._pool = torch.cuda.graph_pool_handle()
            # Graphs captured on one stream share a workspace of cuBLAS, and two networks may run at the same time.
            self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        elif execution == "cpu_kernels":
            self._fast = _by_cpu_kernels(call)
        else:
            _compile_repeated_layers(network)

    @property
    def shapes(self) -> int:
        """The number of shapes that are compiled."""
        return len(self._compiled)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        key = tuple((each.shape, each.dtype) for each in inputs)
        if _capturing.get() and key not in self._compiled:
            self._compiled[key] = self._capture(inputs) if self._execution == "cuda_graphs" else self._fast
        if key in self._compiled:
            return self._compiled[key](*inputs)
        if self._execution == "cpu_kernels":
            return self._fast(*inputs)
        with running(compiled=False):
            return self._eager(*inputs)

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Call:
        """Capture a call of these shapes as one graph, with input and output tensors of its own."""
        static_inputs = [each.clone() for each in inputs]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                self._fast(*static_inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            static_output = self._fast(*static_inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

        last: list[torch.Tensor | None] = [None] * len(inputs)

        def replay(*inputs: torch.Tensor) -> Any:
            for at, each in enumerate(inputs):
                if each is not last[at]:  # the text embedding is the same for all steps
                    static_inputs[at].copy_(each)
                    last[at] = each
            graph.replay()
            return tree_map(torch.clone, static_output)  # the next replay overwrites it

        return replay


# Per thread: one can compile while another makes images.
_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


def is_running_compiled() -> bool:
    """Return whether this thread makes compiled calls, where there are any."""
    return _compiled.get()


@contextlib.contextmanager
def running(compiled: bool) -> Iterator[None]:
    """Let this thread make compiled calls, where there are any, or eager ones."""
    token = _compiled.set(compiled)
    try:
        yield
    finally:
        _compiled.reset(token)


@contextlib.contextmanager
def capturing_shapes() -> Iterator[None]:
    """Let this thread compile calls for the shapes that it sees, where it is `running` compiled ones."""
    token = _capturing.set(True)
    try:
        # The configuration applies to this thread. inductor caches C++ code under a key that lacks the CPU's
        # instruction set. Code for another instruction set would fail, or compute nonsense.
        keys = torch.compiler.config.cache_key_tag + torch.backends.cpu.get_cpu_capability()
        with (
            torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT),
            torch.compiler.config.patch(cache_key_tag=keys),  # type: ignore[attr-defined]
        ):
            yield
    finally:
        _capturing.reset(token)


@contextlib.contextmanager
def yielding_gil() -> Iterator[None]:
    """Make Python threads, above all one that compiles, yield the interpreter soon after another requests it.

    Each of a network's thousands of operations releases it, and by default waits 5 ms to have it back.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


class CompiledLayer(nn.Module):
    """A layer that torch.compile compiles, or the eager layer where this thread is not `running` compiled calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._forms: dict[bool, Callable[..., Any]] = {
            True: torch.compile(layer, fullgraph=True, dynamic=False),
            False: layer,
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the layer."""
        return self._forms[_compiled.get()](*inputs, **named)


def _by_cpu_kernels(call: Call) -> Call:
    def by_kernels(*inputs: torch.Tensor) -> Any:
        with cpu.active():
            return call(*inputs)

    return by_kernels


def _compile_repeated_layers(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, _REPEATED_LAYERS):
                setattr(module, name, CompiledLayer(layer))
