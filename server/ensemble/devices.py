"""Choose the device and the precision, and keep networks within the device's memory."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from server.domain import OutOfMemory
from server.ensemble.checkpoint import Experts
from server.errors import NoDevice, NotEnoughMemory

AVAILABLE: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "cpu": lambda: True,
}
"""The kinds of device, best first, and whether this machine has one."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_CGROUP = Path("/sys/fs/cgroup")  # of the container, version 2
_FP8_BYTES = 1.2  # per weight of a U-Net on average: less than a fifth of them stay in bf16

Result = TypeVar("Result")


def choose_device(requested: str) -> str:
    """Return cuda, mps or cpu for auto or one of these. Raises NoDevice."""
    available = [name for name, is_available in AVAILABLE.items() if is_available()]
    if requested == "auto":
        return available[0]
    if requested not in available:
        raise NoDevice(f"no {requested} device is here, but {' and '.join(available)}; choose another --device")
    return requested


def choose_precision(requested: str, device: str, max_batch: int) -> str:
    """Return fp32, bf16, fp16 or fp8 for auto or one of these. Raises NoDevice where fp8 cannot run."""
    if requested == "fp8":
        if device == "mps" or (device == "cuda" and torch.cuda.get_device_capability() < (8, 9)):
            raise NoDevice("this device cannot multiply in fp8, which Nvidia's do from Ada on; take --precision auto")
        if device == "cpu" and max_batch > 1:
            raise NoDevice(
                "on a CPU --precision fp8 is there to try it out, one image to a call: leave --max-batch at 1"
            )
    if requested != "auto":
        return requested
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "fp16" if device == "mps" else "fp32"


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """Return the dtype of networks in a precision; for fp8, of the layers that do not multiply in it."""
    if precision == "fp8":
        return torch.float32 if device == "cpu" else torch.bfloat16  # CPUs are slow in bf16
    return PRECISIONS[precision]


def check_memory(experts: Experts, device: str, precision: str, offload: bool) -> None:
    """Raise NotEnoughMemory unless the device has room for the weights."""
    base, refiner = experts.base, experts.refiner
    size = compute_dtype(precision, device).itemsize
    unets = [base.parameters(("unet",))]
    others = base.parameters(("text_encoder", "text_encoder_2", "vae"))
    if refiner is not None:
        unets.append(refiner.parameters(("unet",)))
        others += 0 if experts.share("text_encoder_2") else refiner.parameters(("text_encoder_2",))
    needed: float = (sum(unets) + others) * size
    if offload or precision == "fp8":
        needed = max(*unets, others) * size
    if precision == "fp8" and not offload:
        needed = max(needed, sum(unets) * _FP8_BYTES + others * size)
    free = free_bytes(device)
    if needed > free:
        raise NotEnoughMemory(
            f"the weights need {needed / 2**30:.1f} GiB on {device} and {free / 2**30:.1f} GiB are free; take a larger "
            "device, a --precision of half the size, --offload, or leave the refiner out"
        )


def free_bytes(device: str) -> int:
    """Return the bytes of memory that are free, within the container's limit on a CPU."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free: int = psutil.virtual_memory().available
    limit, used, kinds = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()) != "max":
        # The page cache, which holds the weight files, counts as used until the memory is needed.
        of_kind = dict(line.split() for line in kinds.read_text().splitlines())
        cached = int(of_kind["active_file"]) + int(of_kind["inactive_file"])
        free = min(free, int(bound) - int(used.read_text()) + cached)
    return free


def run_within_memory(device: torch.device, call: Callable[[], Result]) -> Result:
    """Return the result of the call. Raises OutOfMemory if it ran out, after all its memory has been released."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = str(error)
    # The frames of the error's traceback hold the activations. Only here is the traceback gone.
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    raise OutOfMemory(message)


@contextlib.contextmanager
def loading_weights(device: str) -> Iterator[None]:
    """Raise NotEnoughMemory if the device runs out of memory inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"{device} ran out of memory while the weights were loaded; take a larger device"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On accelerators torch raises an error of its own; on a CPU the message is the only sign.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
