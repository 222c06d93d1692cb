"""Choose how the networks run on a device, and make them run that way.

`choose` is a pure function of the settings and the device. `optimize` carries its plan out, network by network.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from server.acceleration import layers, quantization
from server.acceleration.compilation import Execution, Mode
from server.acceleration.per_image import PerImageLayer
from server.acceleration.quantization import Quantizable
from server.domain import Stage
from server.ensemble.batch_invariance import PerImage, make_batch_invariant
from server.ensemble.offload import ModelOffloader
from server.ensemble.text_encoder import TextEncoder
from server.errors import CompileError

# Blocks at the end of each U-Net that stay out of fp8. No later layer evens out their rounding errors, and guidance
# multiplies them. After the refiner no expert follows either, and it makes few steps.
_UNQUANTIZED_BLOCKS = {Stage.BASE: 1, Stage.REFINER: 2}


@dataclass(frozen=True)
class Options:
    """The settings that decide how networks run, named like the flags."""

    compile: Mode = "off"
    compile_while_serving: bool = False
    offload: bool = False
    overlap: bool | None = None
    max_batch: int = 1


@dataclass(frozen=True)
class Target:
    """The device, the precision and the networks that a plan is for.

    `kind` is cuda, mps or cpu. `cpu_kernels` says whether the CPU can run the C++ kernels, `convolution_kernels`
    whether the GPU has a fast batch-invariant convolution. `unsupported` names the networks' layers that cannot be
    fused, and is empty if all can.
    """

    kind: str
    precision: str
    cpu_kernels: bool = False
    convolution_kernels: bool = False
    unsupported: str = ""


@dataclass(frozen=True)
class OptimizationPlan:
    """How the networks of an ensemble run.

    `execution` is eager for the layers as they are; cpu_kernels for fused layers by the C++ kernels, for all shapes;
    cuda_graphs for fused layers in one graph per call; torch_compile for diffusers' repeated layers, each compiled. All
    but eager count as compiled calls. With `shared_weight_copies` the eager networks have diffusers' own layers, and
    the compiled ones are copies of them that share their weights. `offload` is until_quantized where the weights fit
    only in fp8. `batch_invariant` is for calls of several images.
    """

    kind: str
    execution: Literal["eager"] | Execution
    fuse: bool = False
    quantize: bool = False
    shared_weight_copies: bool = False
    batch_invariant: bool = False
    convolution_kernels: bool = False
    offload: Literal["never", "until_quantized", "always"] = "never"
    overlap: bool = False

    @property
    def compiles(self) -> bool:
        """Whether there are compiled calls."""
        return self.execution != "eager"

    def describe(self, sizes: Sequence[tuple[int, int]]) -> str:
        """Describe the compiled calls, for images of these sizes, in the words of Environment.compiled."""
        if not self.compiles:
            return "off"
        return f"blocks for {'all sizes' if self.execution == 'cpu_kernels' else sizes_text(sizes)}"


def choose(options: Options, target: Target) -> OptimizationPlan:
    """Choose how networks run. Raises CompileError if they cannot run as the options demand."""
    if options.compile_while_serving and target.kind != "cuda":
        raise CompileError(f"--compile-while-serving is for CUDA, and the device is {target.kind}; leave it out")
    if options.offload and options.compile == "blocks":
        raise CompileError("--offload moves networks about, so leave --compile off")
    execution = _choose_execution(options, target)
    quantize = target.precision == "fp8"
    fuse = quantize or execution in ("cpu_kernels", "cuda_graphs")
    if fuse and target.unsupported:
        raise CompileError(f"{target.unsupported}; leave --compile off, and --precision auto")
    is_cuda = target.kind == "cuda"
    return OptimizationPlan(
        kind=target.kind,
        execution=execution,
        fuse=fuse,
        quantize=quantize,
        shared_weight_copies=options.compile_while_serving and not quantize,
        batch_invariant=options.max_batch > 1,
        convolution_kernels=fuse and options.max_batch > 1 and target.convolution_kernels,
        offload="always" if options.offload else "until_quantized" if quantize else "never",
        overlap=is_cuda and not options.offload if options.overlap is None else options.overlap,
    )


def _choose_execution(options: Options, target: Target) -> Literal["eager"] | Execution:
    if options.compile == "off":
        return "eager"
    can_run_kernels = target.cpu_kernels and not target.unsupported and target.precision in ("fp32", "fp8")
    if options.compile == "auto":
        wanted = target.kind == "cpu" and target.precision == "fp32" and not options.offload
        return "cpu_kernels" if wanted and can_run_kernels else "eager"
    if target.kind == "cuda":
        return "cuda_graphs"
    if target.kind == "cpu" and can_run_kernels:
        return "cpu_kernels"
    if target.precision == "fp8":
        raise CompileError("--precision fp8 has no compiled calls on this device; leave --compile off")
    return "torch_compile"


@dataclass
class Networks:
    """The networks of an ensemble, and the state that their calls share.

    `text_encoders` has the wrapper of each text encoder, which the pipelines call instead. `per_image` has the layers
    that compute image by image. `copies` has shared-weight copies of the U-Nets, if the plan has any.
    """

    unets: Mapping[Stage, UNet2DConditionModel]
    vae: Any
    text_encoders: Mapping[nn.Module, TextEncoder]
    offloader: ModelOffloader
    per_image: list[PerImage | PerImageLayer] = field(default_factory=list)
    copies: dict[nn.Module, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, pipelines: Mapping[Stage, Any], plan: OptimizationPlan) -> "Networks":
        """Take the networks of pipelines, and make the pipelines call the wrappers of their text encoders."""
        device = torch.device(plan.kind)
        text_encoders: dict[nn.Module, TextEncoder] = {}  # the experts share one
        for pipeline, name in itertools.product(pipelines.values(), ("text_encoder", "text_encoder_2")):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                if encoder not in text_encoders:
                    text_encoders[encoder] = TextEncoder(encoder, device, captures=plan.execution == "cuda_graphs")
                setattr(pipeline, name, text_encoders[encoder])
        unets, vae = {stage: pipeline.unet for stage, pipeline in pipelines.items()}, pipelines[Stage.BASE].vae
        offloader = ModelOffloader((*text_encoders, *unets.values(), vae), device, offload=plan.offload != "never")
        return cls(unets, vae, text_encoders, offloader)

    def set_images_per_call(self, images: int) -> None:
        """Set the number of images in the rows of every call."""
        for layer in self.per_image:
            layer.images = images

    def quantizable(self) -> dict[Stage, dict[str, Quantizable]]:
        """Return the layers of each fused U-Net that the plan quantizes, by name."""
        return {
            stage: quantization.quantizable(unet, skip_last_blocks=_UNQUANTIZED_BLOCKS[stage])
            for stage, unet in self.unets.items()
        }


def unsupported_layers(networks: Sequence[nn.Module]) -> str:
    """Name the layers of these U-Nets and decoders that cannot be fused, or return an empty string."""
    try:
        for network in networks:
            layers.check_supported(network)
    except layers.UnsupportedLayer as error:
        return str(error)
    return ""


def optimize(
    networks: Networks, plan: OptimizationPlan, calibrate: Callable[[], Mapping[str, torch.Tensor]], max_batch: int
) -> None:
    """Make the networks run as planned, with the rows of `max_batch` images in a call.

    `calibrate` returns the fp8 scales of the fused networks' quantizable layers, by name.
    """
    if plan.shared_weight_copies:
        networks.copies = {unet: layers.share_weights(unet) for unet in networks.unets.values()}
    elif plan.fuse:
        for network in (*networks.unets.values(), networks.vae.decoder):
            layers.fuse_layers(network, plan.kind)
    if plan.quantize:
        scales = calibrate()
        for stage, found in networks.quantizable().items():
            networks.offloader.ensure_on_device(networks.unets[stage])
            for name, layer in found.items():
                layer.quantize(scales[scale_name(stage, name)])
    for unet in networks.unets.values():
        networks.per_image += _prepare_batches(unet, plan, fused=plan.fuse and not plan.shared_weight_copies)
    networks.set_images_per_call(max_batch)
    if plan.execution == "cpu_kernels" and not plan.shared_weight_copies:
        for network in (*networks.unets.values(), networks.vae.decoder):
            layers.use_cpu_kernels(network)
    if plan.offload == "until_quantized":
        networks.offloader.disable_offload()


def optimize_copy(network: nn.Module, networks: Networks, plan: OptimizationPlan, max_batch: int) -> None:
    """Make a shared-weight copy of a U-Net or of an autoencoder run as planned."""
    called = called_part(network)
    layers.fuse_layers(called, plan.kind)
    if isinstance(network, UNet2DConditionModel):
        networks.per_image += _prepare_batches(network, plan, fused=True)
        networks.set_images_per_call(max_batch)
    if plan.execution == "cpu_kernels":
        layers.use_cpu_kernels(called)


def _prepare_batches(unet: nn.Module, plan: OptimizationPlan, fused: bool) -> list[PerImage | PerImageLayer]:
    """Prepare a U-Net for calls of several images, if there are any; returns its layers that compute image by image."""
    if not plan.batch_invariant:
        return []
    if fused and plan.convolution_kernels:
        layers.use_convolution_kernels(unet)
    return make_batch_invariant(unet, plan.kind)


def called_part(network: Any) -> Any:
    """Return the part of a U-Net or of an autoencoder that is called: the U-Net, or the decoder."""
    return getattr(network, "decoder", network)


def scale_name(stage: Stage, layer: str) -> str:
    """Return the name of a layer's fp8 scale among those of all experts."""
    return f"{stage.name.lower()}.{layer}"


def sizes_text(sizes: Sequence[tuple[int, int]]) -> str:
    """Format sizes like the flag: 1024x1024, 1152x896."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)
