"""The ensemble of experts: load it, encode a prompt, plan an image, make one step, decode the latents.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023: the base denoises
the high-noise share of a schedule, and the refiner, an expert of the low-noise share, finishes the same schedule in the
same latent space. One step here is one network call, so that whoever calls can decide between any two what comes next.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.activations import GEGLU
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from server.acceleration import compilation, layers
from server.acceleration.compilation import Compiled, Ways
from server.acceleration.kernels import convolution, cpu
from server.acceleration.kernels.cpu_library import BuildError
from server.domain import (
    Environment,
    ImageRequest,
    ModelInfo,
    Notice,
    OutOfMemory,
    Stage,
    StepFailed,
    Warning,
    default_request,
)
from server.engine.interface import LaunchedStep
from server.ensemble import checkpoint, preview, provenance
from server.ensemble.checkpoint import Checkpoint, Experts
from server.ensemble.residency import Residency
from server.ensemble.text_encoder import TextEncoder
from server.errors import CompileError, MissingPart, NoDevice, NotEnoughMemory

log = logging.getLogger(__name__)

# Named as in k-diffusion. A new sampler is a line here and nothing anywhere else.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "euler": partial(EulerDiscreteScheduler.from_config, use_karras_sigmas=False),
    "euler_karras": partial(EulerDiscreteScheduler.from_config, use_karras_sigmas=True),
    "euler_ancestral": EulerAncestralDiscreteScheduler.from_config,
    "heun": partial(HeunDiscreteScheduler.from_config, use_karras_sigmas=False),
    "heun_karras": partial(HeunDiscreteScheduler.from_config, use_karras_sigmas=True),
    "dpmpp_2m": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=False),
    "dpmpp_2m_karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    # Clipping is for pixels, which end at 1; latents do not. A configuration that does not say so would get it.
    "ddim": partial(DDIMScheduler.from_config, clip_sample=False),
}

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Images that show how large what is multiplied in fp8 becomes: prompts of several kinds, few steps through all noise.
_SHOWN = ("a photograph of an astronaut riding a horse", "a watercolour of a lighthouse at night", "a bowl of fruit")
_SHOWN_STEPS = 10
# Blocks at the end of each U-Net that stay out of fp8: no later layer evens out what they round, and guidance makes it
# several times larger. What the refiner rounds no later expert evens out either, and its steps are few.
_SPARED_BLOCKS = {Stage.BASE: 1, Stage.REFINER: 2}
_CGROUP = Path("/sys/fs/cgroup")  # of the container, version 2
_SCHEDULES = 16  # kept, of kinds and numbers of steps
_FP8_BYTES = 1.2  # of a U-Net's weight, on average: less than a fifth of them stay in bf16

# What the refiner is told about beauty: the values it was published with, for the prompt and for the negative one.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


Result = TypeVar("Result")


class NonFiniteImage(Exception):
    """The networks overflowed: there is no image to show."""


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompts, for each expert as its U-Net takes them.

    `hidden` has shape (rows, 77, width), `added` holds "text_embeds" (rows, width) and "time_ids" (rows, 5 or 6). With
    guidance there are two rows, the negative prompt's first; otherwise one. `environment` is what makes all images of
    it, from the first call to the last, and `compiled` whether that is by compiled calls.
    """

    hidden: Mapping[Stage, torch.Tensor]
    added: Mapping[Stage, Mapping[str, torch.Tensor]]
    warnings: tuple[Warning, ...]
    environment: Environment
    compiled: bool


@dataclass
class Trajectory:
    """One image on its way from noise to clean latents.

    `latents` are fp32 of shape (1, 4, height / 8, width / 8) for an autoencoder that shrinks by 8, and `denoised` is
    what the last call took them to be without their noise. A step puts new tensors in the place of both and never
    writes into one, so another thread that has taken one may keep it. `stages` names the expert of every network call,
    `position` counts the calls made. Each expert has a scheduler of its own. All is on the CPU until the first step:
    to copy it to a GPU would make whoever plans wait for the step in flight there.
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
        """Equal for those that may share their next network call: of one expert, shape, number of rows, and way."""
        stage = self.stages[self.position]
        return stage, self.latents.shape, len(self.conditioning.hidden[stage]), self.conditioning.compiled

    def move_to(self, device: torch.device) -> None:
        self.latents, self.denoised = self.latents.to(device), self.denoised.to(device)
        self.device_timesteps = self.device_timesteps.to(device)

    def network_input(self) -> torch.Tensor:
        """The rows of the next network call, scaled as the schedule wants. Calling it again gives the same."""
        if self._input is None or self._input[0] != self.position:
            stage = self.stages[self.position]
            rows = torch.cat([self.latents] * len(self.conditioning.hidden[stage]))
            scaled = self.schedulers[stage].scale_model_input(rows, self.timesteps[self.position])
            self._input = self.position, scaled
        return self._input[1]

    def advance(self, predicted: torch.Tensor) -> None:
        """Move on by what the network made of `network_input`.

        Classifier-free guidance (Ho and Salimans, 2022) joins its two rows, the unconditional one first.
        """
        scheduler = self.schedulers[self.stages[self.position]]
        if len(predicted) == 2:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + self.guidance_scale * (conditional - unconditional)
        noise = {"generator": self.generator} if _takes_generator(scheduler) else {}
        moved = scheduler.step(predicted, self.timesteps[self.position], self.latents, **noise)
        self.latents, self.denoised = moved.prev_sample, _denoised(scheduler, moved)
        self.position += 1


class _Lookahead:
    """The prediction of an expert for the next call of some trajectories, launched before that call was requested."""

    def __init__(self, trajectories: list[Trajectory], max_batch: int, predicted: list[torch.Tensor]) -> None:
        self.predicted = predicted
        self._max_batch = max_batch
        self._states = [(each, each.position) for each in trajectories]

    def matches(self, trajectories: list[Trajectory], max_batch: int) -> bool:
        """Return whether a call for these trajectories would make the same prediction."""
        return (
            max_batch == self._max_batch
            and len(trajectories) == len(self._states)
            and all(
                one is other and one.position == position
                for one, (other, position) in zip(trajectories, self._states, strict=True)
            )
        )


def load(
    experts: Experts,
    device: str = "auto",
    precision: str = "auto",
    name: str | None = None,
    max_batch: int = 1,
    preview_decoder: Path | None = None,
    overlap: bool | None = None,
    compile: compilation.Mode = "off",  # noqa: A002  # the flag's name
    compile_cache: Path | None = None,
    compile_while_serving: bool = False,
    warm_up: Sequence[tuple[int, int]] = (),
    offload: bool = False,
) -> "Ensemble":
    """Load experts from the folders that `checkpoint.inspect` found whole onto a device.

    `device` is auto, cuda, mps or cpu; `precision` is auto, fp32, bf16, fp16 or fp8. Without a refiner the base works
    alone. `max_batch` images, 1 or more, may share a network call; every call then costs as much as a full one.
    Previews are drawn by a TAESD from the folder `preview_decoder`, or else by a linear map. With `overlap`, by default
    on CUDA, prompts are encoded and images decoded beside steps: small calls fill what steps leave idle there; the
    cores of a CPU have nothing idle. `compile` makes the networks faster for images of the sizes `warm_up`, pairs of
    width and height, by default the one that the base was trained on, with guidance as by default; that takes from
    seconds to minutes, and less where `compile_cache` is a folder that keeps what an earlier process compiled, and with
    fp8 what it observed. It is off, blocks, full, or auto: blocks on a CPU that has the C++ kernels, if these are found
    or can be built, and else off. With `compile_while_serving` nothing is compiled before `Ensemble.compile`. With
    `offload` only the network that works is on the device, nothing overlaps, and `compile` has to be off or auto.
    Raises a CheckpointError, before anything is loaded where that is possible.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

    if preview_decoder is not None:
        checkpoint.inspect_preview_decoder(preview_decoder)
    device = _device(device)
    if compile_while_serving:
        _check_compiles_while_serving(device)
    precision = _precision(precision, device, max_batch)
    shared = experts.share("text_encoder_2")
    _check_memory(experts, shared, device, precision, offload)

    dtype = _dtype(precision, device)
    with _loading_on(device):
        base_pipeline = _pipeline(StableDiffusionXLPipeline, experts.base, dtype)
        refiner_pipeline = None
        if experts.refiner is not None:
            parts: dict[str, Any] = {"vae": base_pipeline.vae}  # both experts work in the latents of one autoencoder
            if shared:
                parts |= {"text_encoder_2": base_pipeline.text_encoder_2, "tokenizer_2": base_pipeline.tokenizer_2}
            refiner_pipeline = _pipeline(StableDiffusionXLImg2ImgPipeline, experts.refiner, dtype, **parts)
        native = base_pipeline.default_sample_size * base_pipeline.vae_scale_factor
        sizes = warm_up or [(native, native)]
        _check_sides(sizes, base_pipeline.vae_scale_factor)
        info = _info(experts, base_pipeline, device, precision, name, max_batch)
        overlaps = device == "cuda" and not offload if overlap is None else overlap
        if compile_cache is not None and _keeps(compile_cache, compile, device):
            compilation.keep_in(compile_cache)
        turns = offload or precision == "fp8"
        # The eager networks serve until the compiled ones are ready, which are copies that share their weights.
        twins = compile_while_serving and precision != "fp8"
        ensemble = Ensemble(
            base_pipeline, refiner_pipeline, info, max_batch, preview_decoder, overlaps, compile, sizes, turns, twins
        )
        if precision == "fp8":
            ensemble.quantise(compile_cache)
        ensemble.make_place_irrelevant()
        ensemble.multiply_by_cpu_kernels()
        if not offload:
            ensemble.end_turns()
        if ensemble.compiles and not compile_while_serving:
            ensemble.info = ensemble.warm_up()
        return ensemble


class Ensemble:
    """The loaded experts. Every call returns when the device is done with it.

    Not for more than one thread at a time, but for `preview`, for `compile` and, where it `overlaps`, for a second
    thread that encodes and decodes. What these make is complete when another call gets it, so the streams need not wait
    for one another. `info` tells what images are made by that are encoded from now on, and decides it: whether by
    compiled calls.
    """

    def __init__(
        self,
        base: StableDiffusionXLPipeline,
        refiner: StableDiffusionXLImg2ImgPipeline | None,
        info: ModelInfo,
        max_batch: int,
        preview_decoder: Path | None,
        overlaps: bool,
        compile: compilation.Mode,  # noqa: A002
        sizes: Sequence[tuple[int, int]],
        turns: bool,
        twins: bool,
    ) -> None:
        """As `load` says; networks take `turns` on the device until `end_turns`, and `twins` of them are compiled."""
        self.info = info
        self._sizes = sizes
        self._encoding = threading.Lock()  # tokenizers are for one thread at a time
        self._pipelines = {Stage.BASE: base} | ({Stage.REFINER: refiner} if refiner is not None else {})
        self._unets = {stage: pipeline.unet for stage, pipeline in self._pipelines.items()}
        self._vae = base.vae
        self._tokenizer = base.tokenizer
        self._scheduler = _schedulers(base.scheduler.config)
        self._device = torch.device(info.device)
        self.overlaps = overlaps
        on_streams = overlaps and self._device.type == "cuda"
        self._side_stream = torch.cuda.Stream(self._device) if on_streams else None  # type: ignore[no-untyped-call]
        self._dtype = _dtype(info.precision, info.device)
        on_cpu = self._device.type == "cpu"
        self._twins = twins
        self.max_batch = max_batch
        self._made_over: list[torch.nn.Module] = []
        if compile == "auto":
            compile = "blocks" if on_cpu and self._finds_cpu_kernels(turns) else "off"
        # On a CPU without the kernels diffusers' own layers are compiled, or run as they are.
        self._runs_cpu_kernels = on_cpu and compile == "blocks" and self._suits_cpu_kernels()
        fuses = self._runs_cpu_kernels or (compile == "blocks" and self._device.type == "cuda")
        if (fuses and not twins) or info.precision == "fp8":
            for network in (*self._unets.values(), self._vae.decoder):
                self._make_over(network)
                self._made_over.append(network)
        records = compile != "off" and self._device.type == "cuda"
        self._text_encoders: dict[torch.nn.Module, TextEncoder] = {}  # the experts share some
        for pipeline, name in itertools.product(self._pipelines.values(), ("text_encoder", "text_encoder_2")):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                if encoder not in self._text_encoders:
                    self._text_encoders[encoder] = TextEncoder(encoder, self._device, records)
                setattr(pipeline, name, self._text_encoders[encoder])
        networks = (*self._text_encoders, *self._unets.values(), self._vae)
        self._residency = Residency(networks, self._device, turns)
        self._by_image: list[_ImageByImage | layers.OfImages] = []
        # Here and not at the first preview: what torch does on the CPU belongs to the thread that runs the networks.
        self._preview: preview.LinearPreview | preview.TinyDecoder
        if preview_decoder is None:
            self._preview = preview.fit(self._encoded, info.side_multiple)
        else:
            channels = self._unets[Stage.BASE].config.in_channels
            self._preview = preview.load(preview_decoder, channels, self._device, self._dtype)
        self._looks_ahead = self._device.type == "cuda"
        self._moved: list[int] = []  # ids of the trajectories of the last call
        self._lookahead: _Lookahead | None = None
        self._compile = compile
        self._networks = {stage: self._ways(_called, unet) for stage, unet in self._unets.items()}
        self._decoders: dict[torch.dtype, Ways] = {}
        self._finish()

    def _suits_cpu_kernels(self) -> bool:
        """Whether this CPU has the kernels' instructions and the networks have layers that the kernels compute."""
        if not cpu.is_supported() or self._dtype != torch.float32:
            return False
        try:
            for network in (*self._unets.values(), self._vae.decoder):
                layers.check(network)
        except layers.CannotFuse:
            return False
        return True

    def _finds_cpu_kernels(self, turns: bool) -> bool:
        """Whether the C++ kernels can run all networks, and are found or built; if not, a line of the log says why."""
        if not cpu.is_supported():
            why = "they are for x86-64 CPUs with AVX2 and FMA, which torch may use"
        elif turns or not self._suits_cpu_kernels():
            why = "they are for SDXL's own layers in fp32 without --offload"
        else:
            try:
                cpu.prepare()
            except BuildError as error:
                log.warning("images are made without the C++ kernels, more slowly: %s", error)
                return False
            return True
        log.info("images are made without the C++ kernels: %s", why)
        return False

    @property
    def compiles(self) -> bool:
        """Whether there is anything to `warm_up`."""
        return self._compile != "off"

    def end_turns(self) -> None:
        """From now on all networks are on the device."""
        self._residency.end_turns()

    def quantise(self, kept_in: Path | None) -> None:
        """Let the U-Nets multiply in fp8 where they can, but for their last blocks.

        Their scales are those that are kept in the folder, or else of a few images drawn without, and then kept.
        """
        names = {stage: layers.quantisable(unet, _SPARED_BLOCKS[stage]) for stage, unet in self._unets.items()}
        every = {f"{stage.name.lower()}.{name}": layer for stage in names for name, layer in names[stage].items()}
        kept = None if kept_in is None else kept_in / f"fp8-scales-{self.info.fingerprint[:16]}.safetensors"
        scales = layers.kept_scales(kept) if kept is not None else {}
        if scales.keys() != every.keys():
            scales = self._observed(every)
            if kept is not None:
                try:
                    layers.keep_scales(scales, kept)
                except OSError as error:
                    log.warning("what fp8 observed is not kept: %s: %s", kept.parent, error.strerror)
        for stage, unet in self._unets.items():
            self._residency.bring(unet)
            for name, layer in names[stage].items():
                layer.quantise(scales[f"{stage.name.lower()}.{name}"])
            self._convolve_for_batches(unet)

    def make_place_irrelevant(self) -> None:
        """From now on no image's bytes depend on its place in a call. Convolutions by a kernel never let them."""
        for unet in self._unets.values():
            self._make_place_irrelevant(unet)

    def _make_place_irrelevant(self, unet: torch.nn.Module) -> None:
        if self.max_batch > 1:
            self._by_image += _take_by_image(unet, self._device.type)
            self.limit_batch(self.max_batch)

    def multiply_by_cpu_kernels(self) -> None:
        """Let a CPU run the kernels, if that was chosen. From now on no network changes its device or precision."""
        if self._runs_cpu_kernels:
            for network in self._made_over:
                layers.multiply_by_cpu_kernels(network)

    def _observed(self, every: Mapping[str, layers.Quantisable]) -> dict[str, torch.Tensor]:
        """The scales of layers by name, on the CPU, of images of several prompts through both experts."""
        with layers.observing():
            for seed, prompt in enumerate(_SHOWN):
                request = replace(default_request(self.info, prompt, seed=seed), steps=_SHOWN_STEPS)
                trajectory = self.plan(request, self.encode(request), seed)
                for _ in trajectory.stages:
                    self.step([trajectory])
        return {name: layer.observed().cpu() for name, layer in every.items()}

    def _make_over(self, network: torch.nn.Module) -> None:
        """Let a U-Net's or a decoder's layers take fewer passes. Raises CompileError if they are unusual."""
        try:
            layers.fuse(network, self._device.type)
        except layers.CannotFuse as error:
            raise CompileError(f"{error}; leave --compile off, and --precision auto") from error
        if isinstance(network, UNet2DConditionModel) and self.info.precision != "fp8":  # in which `quantise` does this
            self._convolve_for_batches(network)

    def _convolve_for_batches(self, unet: torch.nn.Module) -> None:
        """Let a U-Net convolve by kernels where cuDNN would have to take image by image, and is not the faster."""
        if self.max_batch > 1 and convolution.supports(self._device, self._dtype):
            layers.convolve_by_kernel(unet)

    def _ways(self, call: compilation.Call, network: torch.nn.Module) -> Ways:
        """A `call` of a U-Net or of an autoencoder, which takes that first."""
        plain = partial(call, network)
        if self._compile == "off":
            return Ways(plain)
        if self._twins:
            return Ways(plain, made=partial(self._compiled_twin, call, network))
        with _compiling():
            return Ways(plain, Compiled(_working(network), plain, self._device))

    @torch.inference_mode(mode=False)
    def _compiled_twin(self, call: compilation.Call, network: torch.nn.Module) -> Compiled:
        twin = layers.share_weights(network)
        _undo_by_image(twin)
        self._make_over(_working(twin))
        if isinstance(twin, UNet2DConditionModel):
            self._make_place_irrelevant(twin)
        return Compiled(_working(twin), partial(call, twin), self._device)

    def _compiled_for(self) -> str:
        """Say how the networks are compiled, and for images of which sizes, as Environment.compiled does."""
        if self._compile == "off":
            return "off"
        return f"blocks for {'all sizes' if self._runs_cpu_kernels else _told(self._sizes)}"

    def warm_up(self) -> ModelInfo:
        """Compile the calls for images of the sizes that it was loaded for, by making one of each.

        Returns the `info` with which images are made by them. Raises CompileError.
        """
        began = time.monotonic()
        environment = replace(self.info.environment, compiled=self._compiled_for())
        with _compiling(), compilation.warming():
            for width, height in self._sizes:
                request = replace(default_request(self.info, "warm-up", seed=0), width=width, height=height)
                trajectory = self.plan(request, self._encode(request, environment, compiled=True), seed=0)
                kinds = dict.fromkeys(trajectory.stages)
                for stage in kinds:
                    trajectory.position = trajectory.stages.index(stage)
                    self.step([trajectory])
                self.decode(trajectory)
        calls: list[Ways | TextEncoder] = [*self._networks.values(), *self._decoders.values()]
        calls += self._text_encoders.values()
        return replace(
            self.info,
            environment=environment,
            compiled_calls=sum(each.shapes for each in calls),
            compile_seconds=time.monotonic() - began,
        )

    def compile(self, request: ImageRequest) -> tuple[ModelInfo, NDArray[np.uint8]]:
        """`warm_up`, and the first image of a request as it is made by what was compiled.

        This may come from another thread, beside any other call. If it fails, all is as it was before.
        """
        try:
            with compilation.beside_others():
                info = self.warm_up()
                conditioning = self._encode(request, info.environment, compiled=True)
                trajectory = self.plan(request, conditioning, request.seeds[0])
                for _ in trajectory.stages:
                    self.step([trajectory])
                return info, self.decode(trajectory)
        except Exception:
            for ways in (*self._networks.values(), *self._decoders.values()):
                ways.forget()  # and give back memory, for want of which it may have failed
            raise

    def limit_batch(self, images: int) -> None:
        """From now on let no more than so many images share a call, at most as many as the ensemble was loaded for.

        Every later call has the bytes of an ensemble that was loaded with this `max_batch`, and needs as much memory.
        """
        self.max_batch = images
        for layer in self._by_image:
            layer.images = images

    def encode(self, request: ImageRequest) -> Conditioning:
        """Encode the prompts of a request, once, for both experts.

        An empty negative prompt is the unconditional embedding that the expert was trained with: zeros for a base with
        `force_zeros_for_empty_prompt`, the encoded empty string otherwise.
        """
        info = self.info  # which another thread may replace
        return self._encode(request, info.environment, compiled=info.compiled_calls > 0)

    @torch.inference_mode()
    def _encode(self, request: ImageRequest, environment: Environment, compiled: bool) -> Conditioning:
        prompts = {"data.prompt": request.prompt, "parameter.negative-prompt": request.negative_prompt}
        with self._encoding, torch.cuda.stream(self._side_stream), compilation.running(compiled):
            hidden, added = _within_memory(self._device, partial(self._encoded_prompts, request))
            self._finish()
            tails = {field: self._tail(prompt) for field, prompt in prompts.items()}
        warnings = tuple(_truncation(field, tail) for field, tail in tails.items() if tail)
        return Conditioning(hidden, added, warnings, environment, compiled)

    def _encoded_prompts(
        self, request: ImageRequest
    ) -> tuple[dict[Stage, torch.Tensor], dict[Stage, dict[str, torch.Tensor]]]:
        """What both experts are told: `hidden` and `added` of the conditioning."""
        hidden, added = {}, {}
        self._residency.bring(*self._text_encoders)
        for stage, pipeline in self._pipelines.items():
            positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
                request.prompt,
                device=self._device,
                do_classifier_free_guidance=request.guidance_scale > 1,
                negative_prompt=request.negative_prompt or None,
            )
            ids, negative_ids = _time_ids(pipeline, request, positive.dtype)
            if request.guidance_scale > 1:
                positive, pooled = torch.cat([negative, positive]), torch.cat([negative_pooled, pooled])
                ids = torch.cat([negative_ids, ids])
            hidden[stage] = positive
            added[stage] = {"text_embeds": pooled, "time_ids": ids.to(self._device)}
        return hidden, added

    def plan(self, request: ImageRequest, conditioning: Conditioning, seed: int) -> Trajectory:
        """The whole schedule of one image, who owns each call of it, and the noise it begins with.

        The base owns the steps that begin at or above timestep (1 - high_noise_frac) * 1000, as in diffusers'
        `denoising_end`, and always the first. The refiner begins with a scheduler of its own and so with a fresh
        multistep history, as the stock two-pipeline recipe does. A second-order step is never cut in two: both its
        calls belong to the expert that began it.
        """
        scheduler = self._scheduler(request.scheduler, request.steps, begin=0)
        starts = scheduler.timesteps[:: scheduler.order]
        trained = scheduler.config.num_train_timesteps
        cutoff = round(trained - request.high_noise_frac * trained)
        base_steps = int((starts >= cutoff).sum()) if Stage.REFINER in self._pipelines else len(starts)
        base_steps = max(1, len(starts) if request.high_noise_frac == 1 else base_steps)
        calls = len(scheduler.timesteps)
        split = min(base_steps * scheduler.order, calls)

        schedulers = {Stage.BASE: scheduler}
        if split < calls:
            schedulers[Stage.REFINER] = self._scheduler(request.scheduler, request.steps, begin=split)
        generator = torch.Generator("cpu").manual_seed(seed)
        shrink = self.info.side_multiple
        shape = (1, self._unets[Stage.BASE].config.in_channels, request.height // shrink, request.width // shrink)
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

    def step(self, trajectories: Sequence[Trajectory]) -> None:
        """Launch one network call and wait for it."""
        self.launch(trajectories).wait()

    def launch(self, trajectories: Sequence[Trajectory]) -> LaunchedStep:
        """Launch one network call of one expert, which moves 1 to `max_batch` trajectories on by one call.

        The trajectories must have the same `batch_key`; timesteps, guidance scales and schedulers may differ. The bytes
        of a trajectory do not depend on its place in the list, nor on its neighbours. An accelerator computes from here
        on; a CPU computes in `LaunchedStep.wait`.

        If a GPU launches a call for the same trajectories twice in a row, it launches their next call as well, so that
        it is never idle between the two. Other trajectories that come instead wait for that call. This is for CUDA
        graphs alone: launching an eager call takes longer than running it.

        Raises StepFailed when some trajectories failed and the others have moved on. After any other error, such as
        OutOfMemory, none has moved, and each can be stepped again. `LaunchedStep.wait` raises the same.
        """
        if not 1 <= len(trajectories) <= self.max_batch or len({each.batch_key for each in trajectories}) > 1:
            raise ValueError(f"a step is for 1 to {self.max_batch} trajectories of one batch key")
        if self._device.type == "cpu":
            return LaunchedStep(lambda: self._wait(*self._advance(trajectories)))
        return LaunchedStep(partial(self._wait, *self._advance(trajectories)))

    @torch.inference_mode()
    def _advance(self, trajectories: Sequence[Trajectory]) -> tuple[torch.cuda.Event | None, dict[int, Exception]]:
        """Move the trajectories on by one network call.

        Returns the CUDA event after which they have moved, if the next call has been launched behind it, and the
        failures by place.
        """
        failures: dict[int, Exception] = {}
        inputs = {}
        for place, trajectory in enumerate(trajectories):
            with _contained(failures, place):
                trajectory.move_to(self._device)
                inputs[place] = trajectory.network_input()
        moved: torch.cuda.Event | None = None
        if inputs:
            with_input = [trajectories[place] for place in inputs]
            for place, rows in zip(inputs, self._take_prediction(with_input, list(inputs.values())), strict=True):
                with _contained(failures, place):
                    trajectories[place].advance(rows)
                    with contextlib.suppress(Exception):  # the next call raises it again, if there is one
                        trajectories[place].network_input()  # now, so that the device does not wait for it later
            if self._looks_ahead and not failures:
                if self._device.type == "cuda":
                    moved = torch.cuda.current_stream(self._device).record_event()
                self._launch_next_step(with_input)
        return moved, failures

    def _wait(self, moved: torch.cuda.Event | None, failures: Mapping[int, Exception]) -> None:
        if moved is not None:
            moved.synchronize()
        else:
            self._finish()
        if failures:
            raise StepFailed(failures) from next(iter(failures.values()))

    def _launch_next_step(self, trajectories: list[Trajectory]) -> None:
        """Launch the next call of trajectories that have just moved, if it is likely to be the next of all."""
        before, self._moved = self._moved, [id(each) for each in trajectories]
        stages = {each.stages[each.position] if each.position < len(each.stages) else None for each in trajectories}
        recorded = all(each.conditioning.compiled for each in trajectories)
        if recorded and before == self._moved and len(stages) == 1 and None not in stages:
            with contextlib.suppress(Exception):  # the next call raises it again, if there is one
                inputs = [each.network_input() for each in trajectories]
                self._lookahead = _Lookahead(trajectories, self.max_batch, self._predicted(trajectories, inputs))

    def _take_prediction(self, trajectories: list[Trajectory], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the result of `_predicted`, from the look-ahead if that was launched for this call."""
        lookahead, self._lookahead = self._lookahead, None
        if lookahead is not None and lookahead.matches(trajectories, self.max_batch):
            return lookahead.predicted
        return _within_memory(self._device, partial(self._predicted, trajectories, inputs))

    def _predicted(self, trajectories: list[Trajectory], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the expert predicts for each trajectory's rows, in fp32.

        The network always gets the rows of `max_batch` images, the last one's over again where there are fewer: on
        every device the kernels, and with them the last bits of a row, depend on the number of rows.
        """
        missing = self.max_batch - len(trajectories)
        trajectories, inputs = trajectories + trajectories[-1:] * missing, inputs + inputs[-1:] * missing
        stage, rows = trajectories[0].stages[trajectories[0].position], len(inputs[0])
        self._residency.bring(self._unets[stage])
        added = [each.conditioning.added[stage] for each in trajectories]
        with compilation.running(trajectories[0].conditioning.compiled):
            predicted = self._networks[stage](
                _joined(inputs).to(self._dtype),
                _joined([each.device_timesteps[each.position].expand(rows) for each in trajectories]),
                _joined([each.conditioning.hidden[stage] for each in trajectories]),
                *(_joined([each[name] for each in added]) for name in ("text_embeds", "time_ids")),
            )
        return [predicted[place * rows :][:rows].float() for place in range(len(trajectories) - missing)]

    def preview(self, trajectory: Trajectory) -> NDArray[np.uint8]:
        """A small picture of the image as the last step foresaw it: RGB of (height / 8, width / 8, 3).

        With a TAESD it is (height, width, 3). This one call may come from another thread, beside any other.
        """
        return self._preview(trajectory.denoised)

    @torch.inference_mode()
    def decode(self, trajectory: Trajectory) -> NDArray[np.uint8]:
        """The image of finished latents: RGB of shape (height, width, 3). Raises NonFiniteImage, never a black image.

        The published SDXL autoencoder overflows in fp16, and can in other half precisions; it then decodes in fp32.
        """
        with torch.cuda.stream(self._side_stream), compilation.running(trajectory.conditioning.compiled):
            if not torch.isfinite(trajectory.latents).all():
                raise NonFiniteImage(
                    "the latents are not finite; the prompt, the guidance scale or the precision overflowed"
                )
            pixels = _within_memory(self._device, partial(self._pixels, trajectory.latents))
            if not torch.isfinite(pixels).all():
                raise NonFiniteImage("the autoencoder overflowed, even in fp32")
            rgb = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            return rgb.cpu().numpy()

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels as of `_decoded`, in the precision that is served where that does not overflow."""
        if not (self._dtype == torch.float16 and self._vae.config.force_upcast):
            pixels = self._decoded(latents, self._dtype)
            if self._dtype == torch.float32 or torch.isfinite(pixels).all():
                return pixels
        return self._decoded(latents, torch.float32)

    def _decoded(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pixels of shape (1, 3, height, width) in -1 to 1, fp32."""
        self._residency.bring(self._vae)
        if dtype not in self._decoders:
            vae = self._vae if dtype == self._dtype else copy.deepcopy(self._vae).to(dtype)
            self._decoders[dtype] = self._ways(_decoded, vae)
        mean, deviation = self._latent_statistics()
        unscaled = latents / self._vae.config.scaling_factor * deviation + mean
        pixels: torch.Tensor = self._decoders[dtype](unscaled.to(dtype)).float()
        return pixels

    @torch.no_grad()
    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latents, fp32, that `_decoded` brings back to about these pixels."""
        mean, deviation = self._latent_statistics()
        vae = copy.deepcopy(self._vae).to(self._device, torch.float32)
        distribution = vae.encode(pixels.to(self._device, torch.float32), return_dict=False)[0]
        latents: torch.Tensor = (distribution.mode() - mean) / deviation * self._vae.config.scaling_factor
        return latents

    def _latent_statistics(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and standard deviation of the autoencoder's latents, by channel where it was published with them."""
        config = self._vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return 0.0, 1.0
        mean, deviation = (
            torch.tensor(values, device=self._device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    def _tail(self, prompt: str) -> str:
        """What the text encoders do not see of a prompt: all from the first token beyond their window on."""
        window = self._tokenizer.model_max_length - 2  # the start and end tokens
        offsets = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return prompt[offsets[window][0] :].strip() if len(offsets) > window else ""

    def _finish(self) -> None:
        """Wait for what this thread has asked of the device, and not for what another has."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif self._device.type != "cpu":
            torch.accelerator.synchronize()


class _ImageByImage(torch.nn.Module):
    """A layer that is given the rows of `images` images, and takes those of each in a call of their own."""

    images: int

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, torch.nn.Linear):
            self.in_features = layer.in_features  # which diffusers' pipelines read of an embedding

    def forward(self, rows: torch.Tensor) -> Any:
        if self.images == 1:
            return self.layer(rows)
        return torch.cat([self.layer(of_one_image) for of_one_image in rows.chunk(self.images)])


# Layers that would make an image's bytes depend on its place in the batch. On the CPU, torch shares the values of SiLU
# and GELU out to threads without regard to rows, and computes the last few of each share by scalar code, which rounds
# otherwise than vector code; and MKL sums up the last rows of a product in another order, as `linear.linear` says. On
# CUDA, cuDNN cuts up the sums of some convolutions without regard to rows.
_PLACE_MATTERS: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "cpu": (torch.nn.SiLU, GEGLU, torch.nn.Linear),
    "cuda": (torch.nn.Conv2d,),
}


def _take_by_image(network: torch.nn.Module, device: str) -> Iterator[_ImageByImage | layers.OfImages]:
    for name, layer in list(network.named_children()):
        if isinstance(layer, layers.OfImages) and device == "cpu":  # which sees to the layers within itself
            yield from (each for each in layer.modules() if isinstance(each, layers.OfImages))
        elif isinstance(layer, _PLACE_MATTERS.get(device, ())):
            by_image = _ImageByImage(layer)
            setattr(network, name, by_image)
            yield by_image
        else:
            yield from _take_by_image(layer, device)


def _undo_by_image(unet: torch.nn.Module) -> None:
    for module in list(unet.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, _ImageByImage):
                setattr(module, name, layer.layer)


def _schedulers(config: Any) -> Callable[..., Any]:
    """What makes a scheduler of a kind, of so many steps, about to make call number `begin`; its tables are on the CPU.

    The tables are computed once, which can take 60 ms, and copied.
    """

    @functools.lru_cache(_SCHEDULES)
    def untouched(kind: str, steps: int) -> Any:
        scheduler = SCHEDULERS[kind](config)
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    def scheduler(kind: str, steps: int, begin: int) -> Any:
        made = copy.deepcopy(untouched(kind, steps))
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(begin)
        return made

    return scheduler


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors one after the other; of one alone, itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _working(network: Any) -> Any:
    """The part of a U-Net or of an autoencoder that is called."""
    return getattr(network, "decoder", network)


def _called(
    unet: Any,
    rows: torch.Tensor,
    timesteps: torch.Tensor,
    hidden: torch.Tensor,
    pooled: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """What an expert predicts."""
    added = {"text_embeds": pooled, "time_ids": ids}
    predicted: torch.Tensor = unet(
        rows, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    return predicted


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


def _denoised(scheduler: Any, moved: Any) -> torch.Tensor:
    """What a step took the latents to be without noise: multistep schedulers have it as the newest of their history."""
    denoised: torch.Tensor | None = moved.get("pred_original_sample")
    if denoised is None:
        denoised = scheduler.model_outputs[-1]
    return denoised


@contextlib.contextmanager
def _contained(failures: dict[int, Exception], place: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  # the wall between one trajectory's failure and its neighbours
        failures[place] = error


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _time_ids(pipeline: Any, request: ImageRequest, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's micro-conditioning, for the prompt and for the negative one, of shape (1, 5 or 6).

    Original and target size are the request's, nothing is cropped; the refiner hears a score instead of a target.
    """
    size = (request.height, request.width)
    width = pipeline.text_encoder_2.config.projection_dim
    if isinstance(pipeline, StableDiffusionXLPipeline):
        ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=width)
        return ids, ids
    scores = (_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE)
    both: tuple[torch.Tensor, torch.Tensor] = pipeline._get_add_time_ids(
        size, (0, 0), size, *scores, size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=width
    )
    return both


def _truncation(field: str, tail: str) -> Warning:
    told = tail if len(tail) <= 200 else f"{tail[:120]} ... {tail[-60:]}"
    return Warning(
        Notice.PROMPT_TRUNCATED, field, f'the text encoders read 77 tokens; beyond them and dropped: "{told}"'
    )


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


def _device(wanted: str) -> str:
    there = [name for name, is_there in _DEVICES.items() if is_there()]
    if wanted == "auto":
        return there[0]
    if wanted not in there:
        raise NoDevice(f"no {wanted} device is here, but {' and '.join(there)}; choose another --device")
    return wanted


_DEVICES: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "cpu": lambda: True,
}


def _precision(wanted: str, device: str, max_batch: int) -> str:
    if wanted == "fp8":
        if device == "mps" or (device == "cuda" and torch.cuda.get_device_capability() < (8, 9)):
            raise NoDevice("this device cannot multiply in fp8, which Nvidia's do from Ada on; take --precision auto")
        if device == "cpu" and max_batch > 1:
            raise NoDevice(
                "on a CPU --precision fp8 is there to try it out, one image to a call: leave --max-batch at 1"
            )
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "fp16" if device == "mps" else "fp32"


def _dtype(precision: str, device: str) -> torch.dtype:
    """What the networks compute in. With fp8 that is what is not multiplied in it, and processors are slow in bf16."""
    if precision == "fp8":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return PRECISIONS[precision]


def _check_memory(experts: Experts, shared: bool, device: str, precision: str, offload: bool) -> None:
    base, refiner = experts.base, experts.refiner
    size = _dtype(precision, device).itemsize
    unets = [base.parameters(("unet",))]
    others = base.parameters(("text_encoder", "text_encoder_2", "vae"))
    if refiner is not None:
        unets.append(refiner.parameters(("unet",)))
        others += 0 if shared else refiner.parameters(("text_encoder_2",))
    needed: float = (sum(unets) + others) * size
    if offload or precision == "fp8":
        needed = max(*unets, others) * size
    if precision == "fp8" and not offload:
        needed = max(needed, sum(unets) * _FP8_BYTES + others * size)
    free = _free_bytes(device)
    if needed > free:
        raise NotEnoughMemory(
            f"the weights need {needed / 2**30:.1f} GiB on {device} and {free / 2**30:.1f} GiB are free; take a larger "
            "device, a --precision of half the size, --offload, or leave the refiner out"
        )


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free: int = psutil.virtual_memory().available
    limit, used, kinds = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()) != "max":
        # Files that were read, the weights above all, count as used as well until the space is wanted.
        of_kind = dict(line.split() for line in kinds.read_text().splitlines())
        cached = int(of_kind["active_file"]) + int(of_kind["inactive_file"])
        free = min(free, int(bound) - int(used.read_text()) + cached)
    return free


def _within_memory(device: torch.device, call: Callable[[], Result]) -> Result:
    """What the call returns. Raises OutOfMemory where it ran out of memory, with all that it had taken given back."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        told = str(error)
    # Only here is the error gone, and with it its traceback, whose frames hold the activations.
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    raise OutOfMemory(told)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has an error of its own for this on accelerators, but on the CPU only words.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _loading_on(device: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"{device} ran out of memory while the weights were loaded; take a larger device"
        ) from error


def _check_sides(sizes: Sequence[tuple[int, int]], multiple: int) -> None:
    if wrong := [size for size in sizes if any(side % multiple for side in size)]:
        raise CompileError(f"sides must be multiples of {multiple}: --compile-sizes cannot have {_told(wrong)}")


def _told(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, BuildError, OSError) as error:
        reason, advice = compilation.explain(error)
        raise CompileError(
            f"the networks cannot be compiled here ({reason}); {advice}, or leave --compile off"
        ) from error


def _check_compiles_while_serving(device: str) -> None:
    if device != "cuda":
        raise CompileError(f"--compile-while-serving is for CUDA, and the device is {device}; leave it out")


def _keeps(cache: Path, compile: compilation.Mode, device: str) -> bool:  # noqa: A002
    """Whether the cache can be written to, which inductor and Triton have to. Raises CompileError.

    the C++ kernels have to if they must be built, and say so themselves.
    """
    if device == "cpu" and (compile == "auto" or (compile == "blocks" and cpu.is_supported())):
        return True
    try:
        compilation.check_writable(cache)
    except compilation.CannotKeep as error:
        if compile == "blocks":
            raise CompileError(f"{error}; let --compile-cache name another folder, or leave it out") from error
        log.warning("%s; what is compiled is not kept there", error)
        return False
    return True


def _pipeline(kind: Any, files: Checkpoint, dtype: torch.dtype, **parts: Any) -> Any:
    try:
        return kind.from_pretrained(
            files.folder,
            dtype=dtype,
            variant=files.variant,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
            **parts,
        )
    except ValueError as error:
        reason = str(error).partition(". ")[0]
        raise MissingPart(f"{files.folder} does not fit together ({reason}); fetch the checkpoint again") from error


def _info(
    experts: Experts,
    pipeline: StableDiffusionXLPipeline,
    device: str,
    precision: str,
    name: str | None,
    max_batch: int,
) -> ModelInfo:
    defaults = checkpoint.defaults(experts.base)
    return ModelInfo(
        name=name or defaults.name or experts.base.folder.resolve().name,
        fingerprint=experts.fingerprint(),
        has_refiner=experts.refiner is not None,
        device=device,
        precision=precision,
        schedulers=tuple(SCHEDULERS),
        native_side=pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        side_multiple=pipeline.vae_scale_factor,
        default_steps=defaults.steps,
        default_guidance_scale=defaults.guidance_scale,
        default_high_noise_frac=defaults.high_noise_frac if experts.refiner is not None else 1.0,
        default_scheduler="euler",
        environment=provenance.environment(device, precision, max_batch),
    )
