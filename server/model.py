"""The ensemble of experts: load it, encode a prompt, plan an image, make one network call, decode the latents.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023: the base denoises
the high-noise share of a schedule, and the refiner, an expert of the low-noise share, finishes the same schedule in the
same latent space. The networks run one call at a time, so the caller can decide between any two which image continues.
"""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.acceleration import compilation, layers, quantization
from server.acceleration.compilation import CompiledCall, EagerOrCompiled
from server.acceleration.kernels import convolution, cpu
from server.acceleration.kernels.cpu_library import BuildError
from server.domain import (
    Environment,
    ImageRequest,
    ModelInfo,
    Stage,
    StepFailed,
    default_request,
)
from server.engine.interface import LaunchedStep
from server.ensemble import autoencoder, checkpoint, preview
from server.ensemble.checkpoint import Experts
from server.ensemble.conditioning import time_ids, truncation_warning
from server.ensemble.devices import (
    check_memory,
    choose_device,
    choose_precision,
    compute_dtype,
    loading_weights,
    run_within_memory,
)
from server.ensemble.loading import describe, load_pipelines
from server.ensemble.optimization import (
    Networks,
    OptimizationPlan,
    Options,
    Target,
    called_part,
    choose,
    optimize,
    optimize_copy,
    scale_name,
    sizes_text,
    unsupported_layers,
)
from server.ensemble.text_encoder import TextEncoder
from server.ensemble.trajectory import Conditioning, Planner, Trajectory
from server.errors import CompileError

log = logging.getLogger(__name__)

# A few short images calibrate fp8: prompts of several kinds, through all noise levels.
_CALIBRATION_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a watercolour of a lighthouse at night",
    "a bowl of fruit",
)
_CALIBRATION_STEPS = 10


Previewer = preview.LinearPreview | preview.TinyDecoder


class NonFiniteImage(Exception):
    """The networks overflowed: there is no image to show."""


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
    compile_sizes: Sequence[tuple[int, int]] = (),
    offload: bool = False,
) -> "Ensemble":
    """Load experts, from folders that `checkpoint.inspect` has checked, onto a device.

    `device` is auto, cuda, mps or cpu; `precision` is auto, fp32, bf16, fp16 or fp8. Without a refiner the base makes
    all steps. `max_batch` images, 1 or more, may share a network call; every call costs as much as a full one. A TAESD
    from the folder `preview_decoder` draws previews, or else a linear map. With `overlap`, by default on CUDA, prompts
    are encoded and images decoded during the steps of other images.

    `compile` is off for diffusers' own layers, blocks for fused ones, or auto: blocks on a CPU if its C++ kernels are
    found or can be built, else off. Compiling takes seconds to minutes, for images of the sizes `compile_sizes`, pairs
    of width and height; by default the size that the base was trained on. The folder `compile_cache` keeps compiled
    kernels, and the scales of fp8, for later processes. With `compile_while_serving`, on CUDA, `Ensemble.compile`
    compiles later. With `offload` only the network that works is on the device; `compile` must be off or auto.

    Raises a StartupError, before the weights are loaded where that is possible.
    """
    if preview_decoder is not None:
        checkpoint.inspect_preview_decoder(preview_decoder)
    experts.hasher.start()
    device = choose_device(device)
    precision = choose_precision(precision, device, max_batch)
    options = Options(compile, compile_while_serving, offload, overlap, max_batch)
    target = Target(device, precision, cpu_kernels=device == "cpu" and cpu.is_supported())
    choose(options, target)  # what contradicts itself is reported before the weights are loaded
    check_memory(experts, device, precision, offload)

    dtype = compute_dtype(precision, device)
    with loading_weights(device):
        base, refiner = load_pipelines(experts, dtype)
        pipelines = {Stage.BASE: base} | ({Stage.REFINER: refiner} if refiner is not None else {})
        info = describe(experts, base, device, precision, name, max_batch)
        sizes = compile_sizes or [(info.native_side, info.native_side)]
        _check_sides(sizes, info.side_multiple)
        plan = _plan(options, target, pipelines, compile_cache)
        networks = Networks.of(pipelines, plan)
        previewer = _previewer(base, preview_decoder, torch.device(device), dtype)

        def ensemble(plan: OptimizationPlan) -> Ensemble:
            return Ensemble(pipelines, networks, plan, info, previewer, max_batch, sizes)

        eager = replace(plan, execution="eager")
        optimize(networks, plan, lambda: _fp8_scales(ensemble(eager), networks, compile_cache), max_batch)
        loaded = ensemble(plan)
        if plan.compiles and not compile_while_serving:
            loaded.use_compiled(loaded.compile_calls())
        return loaded


class Ensemble:
    """The loaded experts. A call returns when the device has finished it, except `launch`.

    One thread at a time may call it, except that another thread may call `preview` and `compile` during any call, and
    with `overlaps` a second thread may call `encode` and `decode`. The results of these are complete when a call
    receives them, so CUDA streams need not wait for one another.
    """

    def __init__(
        self,
        pipelines: Mapping[Stage, Any],
        networks: Networks,
        plan: OptimizationPlan,
        info: ModelInfo,
        previewer: Previewer,
        max_batch: int,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Take networks that run as planned. `sizes` are pairs of width and height, for `compile_calls`."""
        self.max_batch = max_batch
        self.overlaps = plan.overlap
        # Replaced as a whole, because another thread reads it: the model's description, and whether calls are compiled.
        self._serving = info, False
        self._sizes = sizes
        self._plan = plan
        self._tokenizing = threading.Lock()  # a tokenizer is for one thread at a time
        self._pipelines = pipelines
        self._networks = networks
        self._unets, self._vae = networks.unets, networks.vae
        base = pipelines[Stage.BASE]
        self._tokenizer = base.tokenizer
        self._planner = Planner(
            base.scheduler.config, base.unet.config.in_channels, info.side_multiple, Stage.REFINER in pipelines
        )
        self._device = torch.device(info.device)
        on_streams = plan.overlap and self._device.type == "cuda"
        self._side_stream = torch.cuda.Stream(self._device) if on_streams else None  # type: ignore[no-untyped-call]
        self._dtype = compute_dtype(info.precision, info.device)
        self._previewer = previewer
        self._looks_ahead = self._device.type == "cuda"
        self._moved: list[int] = []  # ids of the trajectories of the last call
        self._lookahead: _Lookahead | None = None
        self._predictors = {stage: self._dispatched(_predict, unet) for stage, unet in self._unets.items()}
        self._decoders: dict[torch.dtype, EagerOrCompiled] = {}
        self._finish()

    @property
    def compiles(self) -> bool:
        """Whether there are calls to compile."""
        return self._plan.compiles

    @property
    def info(self) -> ModelInfo:
        """The description of what is served."""
        return self._serving[0]

    def set_info(self, info: ModelInfo) -> None:
        """Describe what is served from now on; images whose prompts are encoded later have its environment."""
        self._serving = info, self._serving[1]

    def use_compiled(self, info: ModelInfo) -> None:
        """Use the compiled calls for images whose prompts are encoded from now on, and describe them by `info`."""
        self._serving = info, True

    def compile_calls(self, requests: Sequence[ImageRequest] = ()) -> ModelInfo:
        """Compile the calls of images by making each call of these requests; by default, of the default sizes.

        Returns the `info` to describe images that are made by compiled calls. Raises CompileError.
        """
        began = time.monotonic()
        environment = replace(self.info.environment, compiled=self._plan.describe(self._sizes))
        if not requests:
            default = default_request(self.info, "warm-up", seed=0)
            requests = [replace(default, width=width, height=height) for width, height in self._sizes]
        with _compiling(), compilation.capturing_shapes():
            for request in requests:
                trajectory = self.plan(request, self._encode(request, environment, compiled=True), seed=0)
                for stage in dict.fromkeys(trajectory.stages):
                    trajectory.position = trajectory.stages.index(stage)
                    self.step([trajectory])
                self.decode(trajectory)
        calls: list[EagerOrCompiled | TextEncoder] = [*self._predictors.values(), *self._decoders.values()]
        calls += self._networks.text_encoders.values()
        return replace(
            self.info,
            environment=environment,
            compiled_calls=sum(each.shapes for each in calls),
            compile_seconds=time.monotonic() - began,
        )

    def compile(self, request: ImageRequest) -> tuple[ModelInfo, NDArray[np.uint8]]:
        """Compile the calls, and make the first image of a request by them.

        Another thread may call it during any other call. `use_compiled` takes the `info` that it returns. If it fails,
        the compiled calls are discarded, and their memory with them.
        """
        per_image = list(self._networks.per_image)
        try:
            with compilation.yielding_gil():
                info = self.compile_calls()
                conditioning = self._encode(request, info.environment, compiled=True)
                trajectory = self.plan(request, conditioning, request.seeds[0])
                for _ in trajectory.stages:
                    self.step([trajectory])
                return info, self.decode(trajectory)
        except Exception:
            for call in (*self._predictors.values(), *self._decoders.values()):
                call.discard()  # it may have failed for want of their memory
            self._networks.per_image[:] = per_image
            raise

    def limit_batch(self, images: int) -> None:
        """Limit the images that share a call from now on, to at most the `max_batch` of `load`.

        Every later call has the bytes of an ensemble that was loaded with this `max_batch`, and needs as much memory.
        """
        self.max_batch = images
        self._networks.set_images_per_call(images)

    def encode(self, request: ImageRequest) -> Conditioning:
        """Encode the prompts of a request, once, for both experts.

        An empty negative prompt is the unconditional embedding that the expert was trained with: zeros for a base with
        `force_zeros_for_empty_prompt`, the encoded empty string otherwise.
        """
        info, compiled = self._serving
        return self._encode(request, info.environment, compiled)

    @torch.inference_mode()
    def _encode(self, request: ImageRequest, environment: Environment, compiled: bool) -> Conditioning:
        prompts = {"data.prompt": request.prompt, "parameter.negative-prompt": request.negative_prompt}
        with self._tokenizing, torch.cuda.stream(self._side_stream), compilation.running(compiled):
            hidden, added = run_within_memory(self._device, partial(self._encode_prompts, request))
            self._finish()
            tails = {field: self._tail(prompt) for field, prompt in prompts.items()}
        warnings = tuple(truncation_warning(field, tail) for field, tail in tails.items() if tail)
        return Conditioning(hidden, added, warnings, environment, compiled)

    def _encode_prompts(
        self, request: ImageRequest
    ) -> tuple[dict[Stage, torch.Tensor], dict[Stage, dict[str, torch.Tensor]]]:
        """Return `hidden` and `added` of the conditioning."""
        hidden, added = {}, {}
        self._networks.offloader.ensure_on_device(*self._networks.text_encoders)
        for stage, pipeline in self._pipelines.items():
            positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
                request.prompt,
                device=self._device,
                do_classifier_free_guidance=request.guidance_scale > 1,
                negative_prompt=request.negative_prompt or None,
            )
            ids, negative_ids = time_ids(pipeline, request, positive.dtype)
            if request.guidance_scale > 1:
                positive, pooled = torch.cat([negative, positive]), torch.cat([negative_pooled, pooled])
                ids = torch.cat([negative_ids, ids])
            hidden[stage] = positive
            added[stage] = {"text_embeds": pooled, "time_ids": ids.to(self._device)}
        return hidden, added

    def plan(self, request: ImageRequest, conditioning: Conditioning, seed: int) -> Trajectory:
        """Plan the schedule of one image, as `Planner.plan` describes."""
        return self._planner.plan(request, conditioning, seed)

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
        return run_within_memory(self._device, partial(self._predicted, trajectories, inputs))

    def _predicted(self, trajectories: list[Trajectory], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the expert's prediction for each trajectory's rows, in fp32.

        The network always gets the rows of `max_batch` images; the last image fills the places that are free. On every
        device the kernels, and with them the last bits of a row, depend on the number of rows.
        """
        missing = self.max_batch - len(trajectories)
        trajectories, inputs = trajectories + trajectories[-1:] * missing, inputs + inputs[-1:] * missing
        stage, rows = trajectories[0].stages[trajectories[0].position], len(inputs[0])
        self._networks.offloader.ensure_on_device(self._unets[stage])
        added = [each.conditioning.added[stage] for each in trajectories]
        with compilation.running(trajectories[0].conditioning.compiled):
            predicted = self._predictors[stage](
                _concatenate(inputs).to(self._dtype),
                _concatenate([each.device_timesteps[each.position].expand(rows) for each in trajectories]),
                _concatenate([each.conditioning.hidden[stage] for each in trajectories]),
                *(_concatenate([each[name] for each in added]) for name in ("text_embeds", "time_ids")),
            )
        return [predicted[place * rows :][:rows].float() for place in range(len(trajectories) - missing)]

    def preview(self, trajectory: Trajectory) -> NDArray[np.uint8]:
        """Draw a small picture of the image that the last step predicted: RGB of (height / 8, width / 8, 3).

        A TAESD draws it at full size, (height, width, 3). Another thread may call this during any other call.
        """
        return self._previewer(trajectory.denoised)

    @torch.inference_mode()
    def decode(self, trajectory: Trajectory) -> NDArray[np.uint8]:
        """Decode finished latents to RGB of shape (height, width, 3). Raises NonFiniteImage; an image is never black.

        The published SDXL autoencoder overflows in fp16, and others can in half precision; they then decode in fp32.
        """
        with torch.cuda.stream(self._side_stream), compilation.running(trajectory.conditioning.compiled):
            if not torch.isfinite(trajectory.latents).all():
                raise NonFiniteImage(
                    "the latents are not finite; the prompt, the guidance scale or the precision overflowed"
                )
            pixels = run_within_memory(self._device, partial(self._pixels, trajectory.latents))
            if not torch.isfinite(pixels).all():
                raise NonFiniteImage("the autoencoder overflowed, even in fp32")
            rgb = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            return rgb.cpu().numpy()

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode in the precision that is served, or in fp32 where that overflows."""
        if not (self._dtype == torch.float16 and self._vae.config.force_upcast):
            pixels = self._decoded(latents, self._dtype)
            if self._dtype == torch.float32 or torch.isfinite(pixels).all():
                return pixels
        return self._decoded(latents, torch.float32)

    def _decoded(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decode latents in a dtype to pixels of shape (1, 3, height, width), -1 to 1, in fp32."""
        self._networks.offloader.ensure_on_device(self._vae)
        if dtype not in self._decoders:
            vae = self._vae if dtype == self._dtype else copy.deepcopy(self._vae).to(dtype)
            self._decoders[dtype] = self._dispatched(autoencoder.decode, vae)
        pixels: torch.Tensor = self._decoders[dtype](autoencoder.unscale(self._vae, latents).to(dtype)).float()
        return pixels

    def _dispatched(self, call: compilation.Call, network: torch.nn.Module) -> EagerOrCompiled:
        """Make a call of a U-Net or of an autoencoder, its first argument, that can be compiled as planned."""
        eager, execution = partial(call, network), self._plan.execution
        if execution == "eager":
            return EagerOrCompiled(eager)
        if self._plan.shared_weight_copies:
            shared = self._networks.copies.pop(network, None)
            shared = layers.share_weights(network) if shared is None else shared
            return EagerOrCompiled(eager, compile_lazily=partial(self._compile_copy, call, shared))
        with _compiling():
            return EagerOrCompiled(eager, CompiledCall(called_part(network), eager, execution, self._device))

    @torch.inference_mode(mode=False)
    def _compile_copy(self, call: compilation.Call, network: torch.nn.Module) -> CompiledCall:
        optimize_copy(network, self._networks, self._plan, self.max_batch)
        execution = self._plan.execution
        assert execution != "eager"
        return CompiledCall(called_part(network), partial(call, network), execution, self._device)

    def _tail(self, prompt: str) -> str:
        """Return the part of a prompt that the text encoders drop: from the first token beyond their window on."""
        window = self._tokenizer.model_max_length - 2  # the start and end tokens
        offsets = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return prompt[offsets[window][0] :].strip() if len(offsets) > window else ""

    def _finish(self) -> None:
        """Wait for the work that this thread has launched, and not for another thread's."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif self._device.type != "cpu":
            torch.accelerator.synchronize()


def _plan(
    options: Options, target: Target, pipelines: Mapping[Stage, Any], compile_cache: Path | None
) -> OptimizationPlan:
    """Choose the plan for loaded pipelines, with the C++ kernels if they can be found or built."""
    networks = [*(pipeline.unet for pipeline in pipelines.values()), pipelines[Stage.BASE].vae.decoder]
    device, dtype = torch.device(target.kind), networks[0].dtype
    target = replace(
        target,
        convolution_kernels=convolution.supports(device, dtype),
        unsupported=unsupported_layers(networks),
    )
    plan = choose(options, target)
    if compile_cache is not None and _can_cache(compile_cache, plan):
        compilation.set_cache_dir(compile_cache)
    if options.compile != "auto" or target.kind != "cpu":
        return plan
    without = "images are made without the C++ kernels"
    if plan.execution == "cpu_kernels":
        try:
            cpu.prepare()
        except BuildError as error:
            log.warning("%s, more slowly: %s", without, error)
            return choose(options, replace(target, cpu_kernels=False))
    elif not target.cpu_kernels:
        log.info("%s: they are for x86-64 CPUs with AVX2 and FMA, which torch may use", without)
    else:
        log.info("%s: they are for SDXL's own layers in fp32 without --offload", without)
    return plan


def _previewer(pipeline: Any, decoder: Path | None, device: torch.device, dtype: torch.dtype) -> Previewer:
    """Fit a linear preview to the pipeline's autoencoder, or load a TAESD from the folder `decoder`.

    It is done at the start, because on a CPU torch's work belongs to the thread that runs the networks.
    """
    if decoder is None:
        return preview.fit(partial(autoencoder.encode, pipeline.vae, device), pipeline.vae_scale_factor)
    return preview.load(decoder, pipeline.unet.config.in_channels, device, dtype)


def _can_cache(folder: Path, plan: OptimizationPlan) -> bool:
    """Whether inductor and Triton can write to the folder, as they must. Raises CompileError if calls are compiled.

    The C++ kernels check the folder themselves, if they must be built.
    """
    if plan.execution == "cpu_kernels" or (plan.kind == "cpu" and not plan.compiles):
        return True
    try:
        compilation.check_writable(folder)
    except compilation.CacheNotWritable as error:
        if plan.compiles:
            raise CompileError(f"{error}; let --compile-cache name another folder, or leave it out") from error
        log.warning("%s; what is compiled is not kept there", error)
        return False
    return True


def _fp8_scales(ensemble: Ensemble, networks: Networks, folder: Path | None) -> Mapping[str, torch.Tensor]:
    """Load the scales of all quantizable layers by name, or calibrate and save them.

    To calibrate, an ensemble that is not quantized yet makes a few images.
    """
    found = {
        scale_name(stage, name): layer
        for stage, of_unet in networks.quantizable().items()
        for name, layer in of_unet.items()
    }
    file = None if folder is None else folder / f"fp8-scales-{ensemble.info.fingerprint[:16]}.safetensors"
    scales = {} if file is None else quantization.load_scales(file)
    if scales.keys() == found.keys():
        return scales
    with quantization.calibrating():
        for seed, prompt in enumerate(_CALIBRATION_PROMPTS):
            request = replace(default_request(ensemble.info, prompt, seed=seed), steps=_CALIBRATION_STEPS)
            trajectory = ensemble.plan(request, ensemble.encode(request), seed)
            for _ in trajectory.stages:
                ensemble.step([trajectory])
    scales = {name: layer.calibration_scale().cpu() for name, layer in found.items()}
    if file is not None:
        try:
            quantization.save_scales(scales, file)
        except OSError as error:
            log.warning("the scales of fp8 are not kept: %s: %s", file.parent, error.strerror)
    return scales


def _check_sides(sizes: Sequence[tuple[int, int]], multiple: int) -> None:
    if wrong := [size for size in sizes if any(side % multiple for side in size)]:
        raise CompileError(f"sides must be multiples of {multiple}: --compile-sizes cannot have {sizes_text(wrong)}")


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, BuildError, OSError) as error:
        reason, advice = compilation.explain(error)
        raise CompileError(
            f"the networks cannot be compiled here ({reason}); {advice}, or leave --compile off"
        ) from error


def _concatenate(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _predict(
    unet: Any,
    rows: torch.Tensor,
    timesteps: torch.Tensor,
    hidden: torch.Tensor,
    pooled: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Call a U-Net for rows (rows, channels, height, width) at timesteps (rows,)."""
    added = {"text_embeds": pooled, "time_ids": ids}
    predicted: torch.Tensor = unet(
        rows, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    return predicted


@contextlib.contextmanager
def _contained(failures: dict[int, Exception], place: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  # one trajectory's failure must not reach its neighbours
        failures[place] = error
