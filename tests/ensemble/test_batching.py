"""Images that share network calls: no bit of an image changes, and no failure spreads to a neighbour."""

import contextlib
import itertools
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server import model
from server.acceleration import compilation
from server.acceleration.kernels import cpu
from server.domain import ImageRequest, OutOfMemory, Stage, StepFailed
from server.ensemble import checkpoint
from server.ensemble.trajectory import SCHEDULERS, Trajectory
from server.settings import EMBEDDED

ROOM = 8  # images to a call
REQUEST = ImageRequest("a cat", "a dog", (1,), 6, 5.0, 0.6, "euler", 32, 32)


@pytest.fixture(scope="module")
def ensemble(folders: tuple[Path, Path], device: str) -> model.Ensemble:
    return model.load(checkpoint.inspect(*folders), device=device, precision="fp32", max_batch=ROOM)


@pytest.fixture(params=[2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def planned(ensemble: model.Ensemble, request: ImageRequest, seed: int = 1) -> Trajectory:
    return ensemble.plan(request, ensemble.encode(request), seed)


def finish(ensemble: model.Ensemble, *together: Trajectory) -> None:
    """Step those of like batch key together until none has a step left."""
    while unfinished := [each for each in together if each.position < len(each.stages)]:
        key = unfinished[0].batch_key
        ensemble.step([each for each in unfinished if each.batch_key == key])


def image(ensemble: model.Ensemble, request: ImageRequest) -> np.ndarray:
    """The image of a request that has every call for itself."""
    trajectory = planned(ensemble, request)
    finish(ensemble, trajectory)
    return ensemble.decode(trajectory)


def neighbour(ensemble: model.Ensemble, like: Trajectory, request: ImageRequest, chance: random.Random):
    """An image that may share the next call, and has nothing else in common but what a call demands."""
    other = replace(
        request,
        prompt=chance.choice(["a house", "x" * 300, "the sea"]),
        negative_prompt=chance.choice(["", "fog"]),
        scheduler=chance.choice(list(SCHEDULERS)),
        steps=chance.randint(3, 12),
        guidance_scale=chance.uniform(1.5, 12) if request.guidance_scale > 1 else chance.uniform(0, 1),
        high_noise_frac=chance.choice([0.3, 0.6]),
    )
    trajectory = planned(ensemble, other, seed=chance.randrange(2**32))
    if like.stages[like.position] is Stage.REFINER:  # it may as well begin there, with all its noise
        trajectory.position = trajectory.stages.count(Stage.BASE)
    assert trajectory.batch_key == like.batch_key
    return trajectory


def image_in_company(
    ensemble: model.Ensemble, request: ImageRequest, company: int, chance: random.Random
) -> np.ndarray:
    """The image of a request whose every step others share, at steps of their own; they come, and go half-way."""
    mine = planned(ensemble, request)
    others: list[Trajectory] = []
    while mine.position < len(mine.stages):
        staying = [each for each in others if each.position < len(each.stages) and chance.random() < 0.7]
        others = [each for each in staying if each.batch_key == mine.batch_key]
        others += [neighbour(ensemble, mine, request, chance) for _ in range(company - len(others))]
        together = [mine, *others]
        chance.shuffle(together)
        ensemble.step(together)
    return ensemble.decode(mine)


@pytest.mark.parametrize("company", [1, 3, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0},
        {"scheduler": "dpmpp_2m_karras"},
        {"scheduler": "ddim"},
        {"scheduler": "euler_ancestral"},
        {"scheduler": "heun", "steps": 4},
        {"width": 26, "height": 42},
        {"width": 54, "height": 26, "guidance_scale": 0.0},
    ],
    ids=str,
)
def test_image_has_the_same_bytes_whatever_shares_its_calls(ensemble, changes: dict, company: int):
    request = replace(REQUEST, **changes)
    alone = image(ensemble, request)
    assert np.array_equal(image_in_company(ensemble, request, company, random.Random(company)), alone)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (26, 42)], ids=str)
def test_place_in_the_batch_changes_no_bit_for_any_number_of_threads(
    ensemble, threads, size: tuple[int, int], guidance_scale: float
):
    # Latents, whose every bit counts: eight-bit pixels would hide most of what could go wrong.
    request = replace(REQUEST, width=size[0], height=size[1], guidance_scale=guidance_scale, steps=2)
    latents = []
    for place in range(ROOM):
        together = [planned(ensemble, request, seed) for seed in range(2, ROOM + 1)]
        mine = planned(ensemble, request)
        together.insert(place, mine)
        finish(ensemble, *together)
        latents.append(mine.latents)
    assert all(torch.equal(each, latents[0]) for each in latents)


BY_KERNELS = pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"compile": "blocks", "compile_sizes": [(192, 168)]}, marks=BY_KERNELS)]
)
def test_embedded_image_has_the_same_bytes_whatever_shares_its_calls(options: dict):
    experts = checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner")
    ensemble = model.load(experts, device="cpu", max_batch=4, **options)
    request = replace(REQUEST, width=192, height=168, steps=5)
    assert ensemble.encode(request).compiled == bool(options)
    alone = image(ensemble, request)
    for company in (1, 3):
        assert np.array_equal(image_in_company(ensemble, request, company, random.Random(company)), alone)


def test_every_call_has_the_rows_of_a_full_batch(ensemble):
    shapes = []
    hooks = [
        unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        for unet in ensemble._unets.values()
    ]
    try:
        for company, guidance_scale in itertools.product((1, 3, ROOM), (5.0, 1.0)):
            request = replace(REQUEST, guidance_scale=guidance_scale)
            finish(ensemble, *(planned(ensemble, request, seed) for seed in range(company)))
            rows = 2 * ROOM if guidance_scale > 1 else ROOM
            assert shapes == [(rows, 4, 16, 16)] * REQUEST.steps
            shapes.clear()
    finally:
        for hook in hooks:
            hook.remove()


class Products(TorchDispatchMode):
    """Keeps the shapes of the products of matrices: how many at once, of how many rows, of and to how many columns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, int, int, int]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        kind = function.overloadpacket.__name__
        if kind in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            values = args[1] if kind in ("addmm", "baddbmm") else args[0]
            count = len(values) if "bmm" in kind else 1
            channels, outputs = values.shape[-1], result.shape[-1]
            self.shapes.add((count, values.numel() // channels // count, channels, outputs))
        return result


@pytest.mark.parametrize("mode", ["off", pytest.param("blocks", marks=BY_KERNELS)])
def test_no_matrix_product_on_cpu_has_rows_of_two_images(folders, mode: compilation.Mode):
    """MKL's code for AVX2 sums the last rows of a product in another order; not every CPU runs that code."""
    several = model.load(checkpoint.inspect(*folders), device="cpu", precision="fp32", max_batch=ROOM, compile=mode)
    shapes = {}
    for images in (ROOM, 1):
        several.limit_batch(images)
        together = [planned(several, REQUEST, seed) for seed in range(images)]
        with Products() as products:
            finish(several, *together)
        shapes[images] = products.shapes
    assert len(shapes[1]) > {"off": 10, "blocks": 5}[mode]
    assert shapes[ROOM] == shapes[1]


def test_only_same_expert_shape_and_guidance_share_a_call(ensemble):
    one = planned(ensemble, REQUEST)
    assert one.batch_key == planned(ensemble, replace(REQUEST, scheduler="ddim", steps=9, guidance_scale=7.0)).batch_key
    at_the_refiner = planned(ensemble, REQUEST)
    while at_the_refiner.stages[at_the_refiner.position] is Stage.BASE:
        ensemble.step([at_the_refiner])
    unlike = [
        at_the_refiner,
        planned(ensemble, replace(REQUEST, width=48)),
        planned(ensemble, replace(REQUEST, guidance_scale=1.0)),
    ]
    for other in unlike:
        with pytest.raises(ValueError, match="of one batch key"):
            ensemble.step([one, other])
    with pytest.raises(ValueError, match=f"1 to {ROOM}"):
        ensemble.step([planned(ensemble, REQUEST) for _ in range(ROOM + 1)])
    assert one.position == 0


def test_limited_batch_has_the_bytes_of_an_ensemble_loaded_for_it(ensemble, folders, device: str):
    alone = model.load(checkpoint.inspect(*folders), device=device, precision="fp32")
    assert alone.max_batch == 1
    ensemble.limit_batch(1)
    try:
        assert np.array_equal(image(ensemble, REQUEST), image(alone, REQUEST))
        with pytest.raises(ValueError, match="1 to 1"):
            ensemble.step([planned(ensemble, REQUEST) for _ in range(2)])
    finally:
        ensemble.limit_batch(ROOM)


def test_latents_that_are_not_finite_affect_no_neighbour(ensemble):
    alone = image(ensemble, REQUEST)
    mine, broken = planned(ensemble, REQUEST), planned(ensemble, REQUEST, seed=2)
    broken.latents = broken.latents * float("nan")
    finish(ensemble, broken, mine)
    assert np.array_equal(ensemble.decode(mine), alone)
    with pytest.raises(model.NonFiniteImage):
        ensemble.decode(broken)


@pytest.mark.parametrize("broken_at", ["scale_model_input", "step"])
def test_scheduler_error_fails_only_its_own_image(ensemble, broken_at: str, monkeypatch: pytest.MonkeyPatch):
    alone = image(ensemble, REQUEST)
    mine, broken, other = (planned(ensemble, REQUEST, seed) for seed in (1, 2, 3))

    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a step of no length")

    monkeypatch.setattr(broken.schedulers[Stage.BASE], broken_at, breaks)
    with pytest.raises(StepFailed, match="image 1 of the step: a step of no length") as failed:
        ensemble.step([mine, broken, other])
    assert [(place, type(cause)) for place, cause in failed.value.failures.items()] == [(1, ZeroDivisionError)]
    assert [each.position for each in (mine, broken, other)] == [1, 0, 1]
    with pytest.raises(StepFailed):
        ensemble.step([broken])
    finish(ensemble, mine, other)
    assert np.array_equal(ensemble.decode(mine), alone)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_out_of_memory_moves_no_image(ensemble, scheduler: str, error: Exception):
    request = replace(REQUEST, scheduler=scheduler, steps=4)
    alone = image(ensemble, request)
    together = [planned(ensemble, request, seed) for seed in (1, 2, 3)]

    def full(*_: object) -> None:
        raise error

    for _ in range(4):
        before = [(each.position, each.latents.clone()) for each in together]
        with contextlib.ExitStack() as hooks:
            for unet in ensemble._unets.values():  # late in the network, after most of the call's work
                hooks.callback(unet.conv_out.register_forward_pre_hook(full).remove)
            with pytest.raises(OutOfMemory, match="memory"):
                ensemble.step(together)
        for each, (position, latents) in zip(together, before, strict=True):
            assert each.position == position
            assert torch.equal(each.latents.cpu(), latents.cpu())  # a call moves latents to the device first
        for each in together:  # again, and apart this time
            ensemble.step([each])
    finish(ensemble, *together)
    assert np.array_equal(ensemble.decode(together[0]), alone)


def test_text_encoder_out_of_memory_is_reported(ensemble, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ensemble._pipelines[Stage.REFINER], "encode_prompt", full)
    with pytest.raises(OutOfMemory, match="memory"):
        ensemble.encode(REQUEST)


def test_out_of_memory_releases_the_activations(ensemble):
    alive = []

    def full(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        alive.append(weakref.ref(inputs[0]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = ensemble._unets[Stage.BASE].conv_out.register_forward_pre_hook(full)
    try:
        with pytest.raises(OutOfMemory) as raised:
            ensemble.step([planned(ensemble, REQUEST)])
    finally:
        hook.remove()
    assert raised.value.__cause__ is None
    assert [reference() for reference in alive] == [None]
