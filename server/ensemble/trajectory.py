"""Move one image from noise to clean latents: the samplers, the schedule of both experts, and one step of it."""

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from server.domain import Environment, ImageRequest, Notice, Stage, Warning

# Named as in k-diffusion. To add a sampler, add a line here.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "euler": partial(EulerDiscreteScheduler.from_config, use_karras_sigmas=False),
    "euler_karras": partial(EulerDiscreteScheduler.from_config, use_karras_sigmas=True),
    "euler_ancestral": EulerAncestralDiscreteScheduler.from_config,
    "heun": partial(HeunDiscreteScheduler.from_config, use_karras_sigmas=False),
    "heun_karras": partial(HeunDiscreteScheduler.from_config, use_karras_sigmas=True),
    "dpmpp_2m": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=False),
    "dpmpp_2m_karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    # Clipping is for pixels, which end at 1. Latents do not, and a configuration without the setting clips.
    "ddim": partial(DDIMScheduler.from_config, clip_sample=False),
}

_CACHED_SCHEDULES = 16  # by sampler and number of steps


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompts of one request, for each expert in the form that its U-Net takes.

    `hidden` has shape (rows, 77, width). `added` has "text_embeds" (rows, width) and "time_ids" (rows, 5 or 6). With
    guidance there are two rows, the negative prompt's first; otherwise one. `environment` is that of all
    images of the request, and `compiled` says whether all their calls are compiled ones.
    """

    hidden: Mapping[Stage, torch.Tensor]
    added: Mapping[Stage, Mapping[str, torch.Tensor]]
    warnings: tuple[Warning, ...]
    environment: Environment
    compiled: bool


@dataclass
class Trajectory:
    """One image on its way from noise to clean latents.

    `latents` are fp32 of shape (1, channels, height / 8, width / 8) for an autoencoder that shrinks by 8. `denoised` is
    the last call's estimate of the clean latents, of the same shape. A step replaces both tensors and never writes into
    them, so another thread may keep one. `stages` names the expert of every network call, `position` counts the calls
    made. Each expert has a scheduler of its own. All tensors are on the CPU until the first step: copying them to a GPU
    would make the planning thread wait for the step in flight there.
    """

    latents: torch.Tensor
    denoised: torch.Tensor
    stages: tuple[Stage, ...]
    timesteps: torch.Tensor
    device_timesteps: torch.Tensor
    schedulers: Mapping[Stage, Any]
    conditioning: Conditioning
    guidance_scale: float
    generator: torch.Generator
    warnings: tuple[Warning, ...]
    position: int = 0
    _input: tuple[int, torch.Tensor] | None = None  # of the call at a position

    @property
    def batch_key(self) -> Hashable:
        """Equal for trajectories that may share a network call: same expert, shape, number of rows, and compilation."""
        stage = self.stages[self.position]
        return stage, self.latents.shape, len(self.conditioning.hidden[stage]), self.conditioning.compiled

    def move_to(self, device: torch.device) -> None:
        """Move the latents and timesteps to a device."""
        self.latents, self.denoised = self.latents.to(device), self.denoised.to(device)
        self.device_timesteps = self.device_timesteps.to(device)

    def network_input(self) -> torch.Tensor:
        """Return the rows of the next network call, (rows, channels, height, width), scaled for its noise level."""
        if self._input is None or self._input[0] != self.position:
            stage = self.stages[self.position]
            rows = torch.cat([self.latents] * len(self.conditioning.hidden[stage]))
            scaled = self.schedulers[stage].scale_model_input(rows, self.timesteps[self.position])
            self._input = self.position, scaled
        return self._input[1]

    def advance(self, predicted: torch.Tensor) -> None:
        """Move on by the network's prediction for `network_input`.

        Classifier-free guidance (Ho and Salimans, 2022) combines its two rows, the unconditional one first.
        """
        scheduler = self.schedulers[self.stages[self.position]]
        if len(predicted) == 2:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + self.guidance_scale * (conditional - unconditional)
        noise = {"generator": self.generator} if _takes_generator(scheduler) else {}
        moved = scheduler.step(predicted, self.timesteps[self.position], self.latents, **noise)
        self.latents, self.denoised = moved.prev_sample, _denoised(scheduler, moved)
        self.position += 1


class Planner:
    """Plan trajectories for one checkpoint: `config` is its scheduler's, `shrink` its autoencoder's factor."""

    def __init__(self, config: Any, channels: int, shrink: int, has_refiner: bool) -> None:
        self._channels, self._shrink, self._has_refiner = channels, shrink, has_refiner

        @functools.lru_cache(_CACHED_SCHEDULES)
        def scheduler(name: str, steps: int) -> Any:
            made = SCHEDULERS[name](config)
            made.set_timesteps(steps, device="cpu")
            return made

        self._cached_scheduler = scheduler

    def plan(self, request: ImageRequest, conditioning: Conditioning, seed: int) -> Trajectory:
        """Plan the schedule of one image: the expert of each call, and the noise at the beginning.

        The base owns the steps that begin at or above timestep (1 - high_noise_frac) * 1000, like diffusers'
        `denoising_end`, and always the first. The refiner has a scheduler of its own and so an empty multistep history,
        like the stock two-pipeline recipe. Both calls of a step of Heun, which makes two in every step but the last,
        belong to the expert that began it.
        """
        scheduler = self._scheduler(request.scheduler, request.steps, begin=0)
        starts = scheduler.timesteps[:: scheduler.order]
        trained = scheduler.config.num_train_timesteps
        cutoff = round(trained - request.high_noise_frac * trained)
        base_steps = int((starts >= cutoff).sum()) if self._has_refiner else len(starts)
        base_steps = max(1, len(starts) if request.high_noise_frac == 1 else base_steps)
        calls = len(scheduler.timesteps)
        split = min(base_steps * scheduler.order, calls)

        schedulers = {Stage.BASE: scheduler}
        if split < calls:
            schedulers[Stage.REFINER] = self._scheduler(request.scheduler, request.steps, begin=split)
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self._channels, request.height // self._shrink, request.width // self._shrink)
        noise = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
        latents = noise * scheduler.init_noise_sigma
        return Trajectory(
            latents=latents,
            denoised=latents,
            stages=(Stage.BASE,) * split + (Stage.REFINER,) * (calls - split),
            timesteps=scheduler.timesteps,
            device_timesteps=scheduler.timesteps.to(torch.float32),
            schedulers=schedulers,
            conditioning=conditioning,
            guidance_scale=request.guidance_scale,
            generator=generator,
            warnings=_idle_experts(request, starts, cutoff, split < calls),
        )

    def _scheduler(self, name: str, steps: int, begin: int) -> Any:
        """Return a scheduler that is about to make call number `begin`.

        Computing its tables can take 60 ms, so they are computed once and copied.
        """
        made = copy.deepcopy(self._cached_scheduler(name, steps))
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(begin)
        return made


def _denoised(scheduler: Any, moved: Any) -> torch.Tensor:
    """Return a step's estimate of the clean latents: for multistep schedulers, the newest of their history."""
    denoised: torch.Tensor | None = moved.get("pred_original_sample")
    if denoised is None:
        denoised = scheduler.model_outputs[-1]
    return denoised


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _idle_experts(request: ImageRequest, starts: torch.Tensor, cutoff: int, refines: bool) -> tuple[Warning, ...]:
    if request.high_noise_frac == 1:
        return ()
    if not refines:
        idle = f"the refiner has none of the {request.steps} steps: none begins below timestep {cutoff}"
    elif starts[0] < cutoff:
        idle = f"the base made the first step, although all {request.steps} begin below timestep {cutoff}"
    else:
        return ()
    return (Warning(Notice.EXPERT_IDLE, "sampling.highNoiseFrac", f"{idle}; take more steps or another share"),)
