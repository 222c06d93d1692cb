"""Layers of the U-Nets and of the decoder that compute what diffusers' do, made over for few passes over few bytes.

Residual networks, transformers and norms call `kernels`, and so do the convolutions of residual networks and of
upsampling where that is faster or they are told to; on Hopper a GEGLU is at the end of its product. On a GPU images are
not joined with what was kept of them on the way down, and the products of a transformer add in place. While
the C++ kernels run, residual networks convolve and linear layers multiply by those. Projections that all read the same
are one: queries, keys and values of a self-attention; keys and values of the whole network, which the text alone
decides; and what the timestep adds in each residual network. The networks' own forward is diffusers', over images in
channels-last order.

The linear layers of a U-Net's transformers and the convolutions of its residual networks and of its upsampling can
multiply in fp8 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022): one scale for each weight, or for each
channel that a convolution makes, and one for each input, which is the largest that `observing` has seen. All else stays
as it is: embeddings, the first and the last convolution, those of downsampling, shortcuts, and the projections into and
out of a transformer are few, and lose more. So do a U-Net's last blocks, which can be spared.
"""

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from server.acceleration.kernels import attention, common, convolution, cpu, fp8, geglu, linear, norms, pointwise, tiles
from server.acceleration.kernels.linear import PackedLinear
from server.acceleration.kernels.winograd import WinogradConvolution


class CannotFuse(Exception):
    """A network has layers of a kind that none here computes."""


def fuse(network: UNet2DConditionModel | Decoder, device: str = "cuda") -> None:
    """Make over the layers of a U-Net or a decoder, in place, for a kind of device.

    Raises CannotFuse, with the network as it was.
    """
    check(network)
    layers = list(network.modules())
    resnets = [layer for layer in layers if isinstance(layer, ResnetBlock2D)]
    transformers = [layer for layer in layers if isinstance(layer, Transformer2DModel)]
    made: dict[Any, nn.Module] = {}
    if isinstance(network, UNet2DConditionModel):
        shifts = _Together([each.time_emb_proj for each in resnets], [each.conv1.bias for each in resnets], F.silu)
        ways_up = [layer for layer in layers if isinstance(layer, UpBlock2D | CrossAttnUpBlock2D)]
        joining = {each for block in ways_up for each in block.resnets} if device != "cpu" else set()
        made |= {each: Resnet(each, columns, each in joining)
                 for each, columns in zip(resnets, shifts.columns, strict=True)}  # fmt: skip
        made |= {each: UpBlock(each) for each in ways_up}
        crossings = [block.attn2 for each in transformers for block in each.transformer_blocks]
        texts = _Together([projection for attention in crossings for projection in (attention.to_k, attention.to_v)])
        columns = iter(texts.columns)
        made |= {each: Transformer(each, [(next(columns), next(columns)) for _ in each.transformer_blocks], device)
                 for each in transformers}  # fmt: skip
        # The network gives these what its layers would get, and gives its layers what comes of it.
        network.time_embed_act = shifts
        network.encoder_hid_proj = _Once(texts) if device == "cpu" else texts
        network.register_to_config(encoder_hid_dim_type="text_proj")
    else:
        made |= {each: Resnet(each, None) for each in resnets}
        if device != "cpu":
            made |= {each: WideAttention(each) for each in layers if isinstance(each, Attention) and _is_wide(each)}
    made |= {each: Upsample(each, device) for each in layers if isinstance(each, Upsample2D)}
    if isinstance(network, UNet2DConditionModel) and convolution.supports(torch.device(device), network.dtype):
        for each in made.values():
            if isinstance(each, Upsample):  # for which cuDNN is up to four times slower
                each.become_kernel()
    made |= {network.conv_norm_out: GroupNorm(network.conv_norm_out, silu=True), network.conv_act: nn.Identity()}
    _replace(network, made)
    if device != "cpu":  # where oneDNN adds a bias for nothing
        convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.bias is not None]
        _replace(network, {each: Convolution(each) for each in convolutions})
    network.to(memory_format=torch.channels_last)


def check(network: nn.Module) -> None:
    """Raise CannotFuse unless `fuse` computes all layers of a U-Net or a decoder."""
    if odd := sorted({type(layer).__name__ for layer in network.modules() if not _is_usual(layer)}):
        raise CannotFuse(f"{type(network).__name__} has an unusual {' and '.join(odd)}")


def share_weights(network: nn.Module) -> nn.Module:
    """Another network of the same weights, which share their memory until the layers of either are made over."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    shared = {id(each): each.detach() if not isinstance(each, nn.Parameter) else nn.Parameter(each.detach(), False)
              for each in tensors}  # fmt: skip
    return copy.deepcopy(network, shared)


def run_cpu_kernels(network: nn.Module) -> bool:
    """Whether a network was made over, and the C++ kernels can compute what is between its products."""
    made_over = (each for each in network.modules() if isinstance(each, Resnet))
    weights = (each.norm1.weight for each in made_over)
    return cpu.is_supported() and any(each.device.type == "cpu" and each.dtype == torch.float32 for each in weights)


def multiply_by_cpu_kernels(network: nn.Module) -> None:
    """Let a network that was made over for a CPU multiply by the C++ kernels while these run, where that gains.

    From now on it must not change its device or precision.
    """
    for each in network.modules():
        if isinstance(each, ResnetConvolution | Linear | Projection):
            each.become_cpu_kernel()


def convolve_by_kernel(unet: nn.Module) -> None:
    """Let the residual networks and the upsampling of a U-Net that was made over convolve by a kernel of `kernels`."""
    for each in unet.modules():
        if isinstance(each, Convolving):
            each.become_kernel()


def _replace(network: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if layer in made:
                setattr(module, name, made[layer])


def _is_usual(layer: Any) -> bool:
    """Whether a layer is of SDXL's kind, where there are others."""
    if isinstance(layer, ResnetBlock2D):
        usual = layer.time_emb_proj is None or layer.time_embedding_norm == "default"
        other = layer.up or layer.down or layer.skip_time_act or layer.output_scale_factor != 1
        return usual and not other and isinstance(layer.nonlinearity, nn.SiLU)
    if isinstance(layer, Transformer2DModel):
        return bool(layer.is_input_continuous and layer.use_linear_projection)
    if isinstance(layer, BasicTransformerBlock):
        usual = layer.norm_type == "layer_norm" and layer.pos_embed is None and not layer.only_cross_attention
        return bool(usual and layer.attn1.to_q.bias is None)
    if isinstance(layer, Upsample2D):
        convolves = layer.use_conv and not layer.use_conv_transpose and layer.name == "conv"
        usual = convolves and layer.conv.kernel_size == (3, 3) and layer.conv.padding == (1, 1)
        return bool(usual and layer.interpolate and layer.norm is None)
    if isinstance(layer, UNet2DConditionModel):
        return layer.encoder_hid_proj is None and layer.time_embed_act is None
    return True


def _is_wide(layer: Attention) -> bool:
    """Whether an attention is of the kind that `WideAttention` computes."""
    normed = layer.group_norm is not None and layer.spatial_norm is None and layer.norm_cross is None
    added = layer.residual_connection and layer.rescale_output_factor == 1
    return bool(normed and added and layer.heads == 1)


class OfImages(nn.Module):
    """A layer that is given the rows of `images` images, and on a CPU takes those of each by themselves."""

    images = 1


class _Together(OfImages):
    """Linear layers that read the same, as one; `columns` says where in its output those of each are."""

    def __init__(self, layers: Sequence[nn.Linear], more: Sequence[torch.Tensor] = (), first: Any = None) -> None:
        super().__init__()
        self._first = first
        self.weight = nn.Parameter(torch.cat([each.weight for each in layers]), requires_grad=False)
        self.bias = None
        biases: list[torch.Tensor] = [each.bias for each in layers if each.bias is not None]
        if more:
            biases = [bias + added for bias, added in zip(biases, more, strict=True)]
        if biases:
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        ends = torch.tensor([0] + [each.out_features for each in layers]).cumsum(0).tolist()
        self.columns = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self._first is not None:
            values = common.per_image(self.images, self._first, values)
        return linear.linear(values, self.weight, self.bias, self.images)


class _Once(nn.Module):
    """What a layer makes of the tensor that it is given, made anew when that is another: a text is that of all steps.

    Not for a graph of CUDA, which would be recorded with what was made of an earlier text.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            made: torch.Tensor = self.layer(values)
            return made
        last = self._last  # which another thread, that compiles, may replace
        if last is None or last[0] is not values:
            last = self._last = values, self.layer(values)
        return last[1]


class GroupNorm(OfImages):
    """A group norm, with the SiLU behind it if so, of images or of images and a shift of each channel."""

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self._groups, self._eps, self._silu = norm.num_groups, norm.eps, silu

    def forward(
        self,
        images: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        border: bool = False,
        more: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In fp8 where there is a scale for that, and with a border of zeros around each image if so.

        The last channels of the images can come as `more`.
        """
        return norms.group_norm(
            images, shift, self._groups, self.weight, self.bias, self._eps, self._silu, scale, border, self.images, more
        )  # fmt: skip


class Convolution(nn.Module):
    """A convolution. cuDNN's, as PyTorch calls it, has the bias added in a pass that is much slower than its bytes."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.bias = layer, layer.bias
        layer.bias = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return pointwise.add_bias(self.layer(images), self.bias)  # type: ignore[arg-type]  # only what has one is made over


class Quantisable(nn.Module):
    """A layer that multiplies by a weight. Once it is `quantise`d its input is to come in fp8, divided by `scale`."""

    scale: torch.Tensor | None
    observes = False  # all of them, while `observing`

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)
        self.register_buffer("weight_scale", None)
        self._largest: torch.Tensor | None = None

    def _observe(self, values: torch.Tensor) -> None:
        if Quantisable.observes and self.scale is None:
            largest = values.abs().amax().float()
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def observed(self) -> torch.Tensor:
        """The scale, of shape (), with which the largest input that was seen is the largest there can be."""
        if self._largest is None:
            raise RuntimeError("no input was seen")
        return (self._largest / fp8.E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)

    def quantise(self, scale: torch.Tensor) -> None:
        """From now on multiply in fp8: weights are rounded to it, and the input comes in it, divided by `scale`."""
        raise NotImplementedError

    def _quantise(self, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self.weight = nn.Parameter(fp8.quantize(weight, weight_scale), requires_grad=False)
        self.weight_scale = weight_scale.squeeze()
        self.scale = scale.to(weight.device)


class Convolving(Quantisable):
    """A layer that convolves: by PyTorch's `layer`, or by a kernel, which reads images with a border.

    Once it is quantised it is a kernel. A kernel has no `layer` any more.
    """

    layer: nn.Module | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def is_kernel(self) -> bool:
        return self.layer is None

    def become_kernel(self) -> None:
        """From now on convolve by a kernel. The weight stays where it is, in the channels-last order of `fuse`."""
        if self.layer is not None:
            self.weight = self.layer.get_parameter("weight")
            self._dtype = self.weight.dtype
            self.layer = None

    def quantise(self, scale: torch.Tensor) -> None:
        self.become_kernel()
        weight, phases = self.weight.detach(), tiles.phase_count(self.weight.shape[-1])
        largest = weight.abs().amax(dim=(1, 2, 3)).float().view(phases, -1).amax(dim=0)  # by channel of the result
        scales = (largest / fp8.E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        self._quantise(scale, weight, scales.repeat(phases)[:, None, None, None])
        self.weight_scale = scales


class ResnetConvolution(Convolving, OfImages):
    """A 3 x 3 convolution of a residual network, without a bias of its own.

    A kernel computes it where that is faster, for images of some sizes. On a CPU it is a Winograd convolution of
    the C++ kernels while these run.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self._cpu_kernel: WinogradConvolution | None = None

    def reads_border(self, images: torch.Tensor) -> bool:
        """Whether it reads images of this shape, (batch, channels, height, width), with a border of zeros."""
        if self.uses_winograd:
            return False
        return self.is_kernel or self._is_faster_by_kernel(images)

    def _is_faster_by_kernel(self, images: torch.Tensor) -> bool:
        if not isinstance(self.layer, nn.Conv2d) or not convolution.supports(images.device, images.dtype):
            return False
        batch, _, height, width = images.shape
        return tiles.fills_one_wave(batch * height * width, self.layer.in_channels, self.layer.out_channels)

    @property
    def uses_winograd(self) -> bool:
        """Whether this thread runs it as a Winograd convolution."""
        return self._cpu_kernel is not None and cpu.is_active()

    def forward(
        self,
        images: torch.Tensor,
        border: bool,
        bias: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of images with a border where it reads one, plus a bias and what is `kept` where there are any."""
        self._observe(images)
        if self._cpu_kernel is not None and self.uses_winograd:
            return self._cpu_kernel(images, bias, kept)
        if self.layer is None:
            return convolution.convolve(images, self.weight, bias, self._dtype, kept, self.scale, self.weight_scale)
        if border:
            return convolution.convolve(images, self.layer.get_parameter("weight"), bias, images.dtype, kept)
        if images.device.type == "cpu":  # where oneDNN adds a bias for nothing
            changed: torch.Tensor = F.conv2d(images, self.layer.get_parameter("weight"), bias, padding=1)
            return changed if kept is None else changed.add_(kept)
        changed = self.layer(images)
        return changed if bias is None else pointwise.add_bias(changed, bias, kept)

    def become_cpu_kernel(self) -> None:
        """Run as a Winograd convolution from now on, where that is faster and while the C++ kernels run."""
        if isinstance(self.layer, nn.Conv2d) and WinogradConvolution.supports(self.layer):
            self._cpu_kernel = WinogradConvolution(self.layer)


class Upsample(Convolving):
    """A convolution of images that are enlarged to twice their sides, or to `output_size`.

    An enlarged image has four pixels for every one that it was made of, and only 2 x 2 of the 3 x 3 around each of them
    differ. So it is convolved phase by phase: the small image by 2 x 2 weights for each of the four, which are sums of
    the 3 x 3, in 16 of 36 multiplications. Where a size is odd the last pixels have zeros beside them, and not their
    like: for that the 3 x 3 convolution is kept as it is.
    """

    def __init__(self, layer: Upsample2D, device: str) -> None:
        super().__init__(_transposed(layer.conv) if device == "cpu" else _by_phases(layer.conv))
        self.conv, self.bias = layer.conv, layer.conv.bias

    def forward(self, hidden_states: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        self._observe(hidden_states)
        result: torch.Tensor
        if output_size is not None and tuple(output_size) != tuple(2 * side for side in hidden_states.shape[2:]):
            result = self.conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))
        elif self.layer is None:
            images = pointwise.pad(hidden_states, self.scale)
            result = convolution.convolve(
                images, self.weight, self.bias, self._dtype, None, self.scale, self.weight_scale
            )  # fmt: skip
        else:
            result = self.layer(hidden_states)
            if not isinstance(self.layer, nn.ConvTranspose2d):
                result = pointwise.interleave_phases(result, self.bias)
        return result

    def become_kernel(self) -> None:
        if isinstance(self.layer, nn.ConvTranspose2d):
            self.layer = _by_phases(self.conv)
        super().become_kernel()


def _by_phases(layer: nn.Conv2d) -> nn.Conv2d:
    """The 3 x 3 convolution of an enlarged image, as of `pointwise.interleave_phases`. Weights are summed in fp32."""

    def pairs(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, middle, last = weight.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    weight = layer.weight.detach()
    phases = [phase for lines in pairs(weight.float(), 2) for phase in pairs(lines, 3)]
    made = nn.Conv2d(weight.shape[1], 4 * len(weight), 2, padding=1, bias=False, device="meta")
    last = torch.cat(phases).to(weight.dtype, memory_format=torch.channels_last)
    made.weight = nn.Parameter(last, requires_grad=False)
    return made


def _transposed(layer: nn.Conv2d) -> nn.ConvTranspose2d:
    """The same as a transposed convolution with its bias: oneDNN goes phase by phase too, in one pass."""
    outputs, channels, _, _ = layer.weight.shape
    phases = _by_phases(layer).weight.view(2, 2, outputs, channels, 2, 2)
    made = nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1, device="meta")
    weight = phases.permute(3, 2, 4, 0, 5, 1).reshape(channels, outputs, 4, 4).flip(2, 3)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made


class Resnet(nn.Module):
    """A residual network. The biases of its convolutions are added with what is added there anyway.

    One that `joins` reads images whose last channels come as `more`; others have them joined before.
    """

    def __init__(self, layer: ResnetBlock2D, columns: slice | None, joins: bool = False) -> None:
        super().__init__()
        self._columns = columns  # of what the timestep adds, the first convolution's bias included
        self._joins = joins and layer.conv_shortcut is not None
        self.norm1, self.norm2 = GroupNorm(layer.norm1, silu=True), GroupNorm(layer.norm2, silu=True)
        self.conv1, self.conv2 = ResnetConvolution(layer.conv1), ResnetConvolution(layer.conv2)
        self.conv_shortcut: Projection | _Shortcut | None = None
        if layer.conv_shortcut is not None:
            self.conv_shortcut = (_Shortcut if self._joins else Projection)(layer.conv_shortcut)
        self.shift = layer.conv1.bias  # where there is no timestep to add to it
        bias = layer.conv2.bias
        if layer.conv_shortcut is not None:
            bias = nn.Parameter(bias + layer.conv_shortcut.bias, requires_grad=False)
            layer.conv_shortcut.bias = None
        self.bias = bias
        layer.conv1.bias = layer.conv2.bias = None

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        if more is not None and not self._joins:
            input_tensor, more = torch.cat([input_tensor, more], dim=1), None
        shift = self.shift.expand(len(input_tensor), -1) if temb is None else temb[:, self._columns]
        if self.conv1.uses_winograd:  # to which a shift is next to nothing
            changed, shift = _convolved(input_tensor, self.norm1, None, self.conv1, shift, more=more), None
        else:
            changed = _convolved(input_tensor, self.norm1, None, self.conv1, more=more)
        parts = (input_tensor,) if more is None else (input_tensor, more)
        kept = input_tensor if self.conv_shortcut is None else self.conv_shortcut(*parts)
        return _convolved(changed, self.norm2, shift, self.conv2, self.bias, kept)


def _convolved(
    images: torch.Tensor,
    norm: GroupNorm,
    shift: torch.Tensor | None,
    convolution: ResnetConvolution,
    bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a convolution makes of images, or those and `more` channels, normed in the form in which it reads them."""
    border = convolution.reads_border(images)
    convolved: torch.Tensor = convolution(norm(images, shift, convolution.scale, border, more), border, bias, kept)
    return convolved


class _Shortcut(nn.Module):
    """A convolution of 1 x 1, without a bias of its own, of images whose last channels may come as `more`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)

    def forward(self, images: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        batch, channels, height, width = images.shape
        rows = F.linear(images.permute(0, 2, 3, 1).reshape(-1, channels), self.weight[:, :channels])
        if more is not None:
            rows.addmm_(more.permute(0, 2, 3, 1).reshape(len(rows), -1), self.weight[:, channels:].t())
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


class UpBlock(nn.Module):
    """Residual networks on the way up, each of images and of what was kept of them on the way down, and attention."""

    def __init__(self, layer: UpBlock2D | CrossAttnUpBlock2D) -> None:
        super().__init__()
        self.has_cross_attention = isinstance(layer, CrossAttnUpBlock2D)
        self.resnets, self.upsamplers = layer.resnets, layer.upsamplers
        self.attentions = layer.attentions if self.has_cross_attention else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: Sequence[torch.Tensor],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        upsample_size: Sequence[int] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """As diffusers' do, which join images before every residual network."""
        images = hidden_states
        for at, resnet in enumerate(self.resnets):
            images = resnet(images, temb, res_hidden_states_tuple[-1 - at])
            if self.attentions is not None:
                images = self.attentions[at](images, encoder_hidden_states=encoder_hidden_states)[0]
        for upsample in self.upsamplers or ():
            images = upsample(images, upsample_size)
        return images


class WideAttention(nn.Module):
    """The self-attention of a decoder, which has one wide head."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.norm, self.out = GroupNorm(layer.group_norm, silu=False), layer.to_out[0]
        self.projections = _Together([layer.to_q, layer.to_k, layer.to_v])

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        places = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        projected = self.projections(places).chunk(3, dim=-1)
        changed: torch.Tensor = self.out(attention.single_head_attention(*projected))
        return changed.view(batch, height, width, channels).permute(0, 3, 1, 2) + hidden_states


class Transformer(nn.Module):
    """The blocks of attention at one place of a U-Net, and the projections into and out of them."""

    def __init__(self, layer: Transformer2DModel, texts: Sequence[tuple[slice, slice]], device: str) -> None:
        super().__init__()
        self.norm = GroupNorm(layer.norm, silu=False)
        self.proj_in, self.proj_out = Projection(layer.proj_in), Projection(layer.proj_out)
        pairs = zip(layer.transformer_blocks, texts, strict=True)
        blocks = [_Block(block, *columns, device) for block, columns in pairs]
        self.blocks = nn.ModuleList(blocks)
        self.last_bias: nn.Parameter | None = None
        if device != "cpu":
            offset = torch.zeros_like(layer.proj_in.bias, dtype=torch.float32)
            for block in blocks:
                offset = block.add_in_place(offset)
            weight, bias = (each.detach().float() for each in (layer.proj_out.weight, layer.proj_out.bias))
            self.last_bias = nn.Parameter((bias + weight @ offset).to(layer.proj_out.weight.dtype), requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        """Images as of (batch, channels, height, width), and keys and values of the text for the whole network."""
        batch, channels, height, width = hidden_states.shape
        places = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        values, more = self.proj_in(places), None
        for block in self.blocks:
            values, more = block(values, more, encoder_hidden_states)
        if more is None and self.last_bias is not None:
            changed = F.linear(values, self.proj_out.layer.weight, self.last_bias)
        else:
            changed = self.proj_out(values if more is None else values + more)
        return (changed.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + hidden_states,)


class _Block(OfImages):
    """Self-attention, attention to the text, and a gated feed-forward network.

    It takes and gives values in two parts that are still to be added: the next norm does that in its one pass. Or its
    products add to the values in place, all but their biases, which are the same for all rows: `offsets` says what
    each norm has to add for those.
    """

    offsets: torch.Tensor | None

    def __init__(self, block: BasicTransformerBlock, keys: slice, values: slice, device: str) -> None:
        super().__init__()
        own, other = block.attn1, block.attn2
        self._heads = own.heads
        self._keys, self._values = keys, values
        self.norms = nn.ModuleList([block.norm1, block.norm2, block.norm3])
        self.projections = Linear(torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight]), None)
        self.own_out = Linear.of(own.to_out[0])
        self.queries = Linear.of(other.to_q)
        self.other_out = Linear.of(other.to_out[0])
        self.widen, self.narrow = GatedLinear(block.ff.net[0].proj, device), Linear.of(block.ff.net[2])
        self.register_buffer("offsets", None)

    def add_in_place(self, offset: torch.Tensor) -> torch.Tensor:
        """From now on add in place what is not in fp8, to values that lack an offset, (inner,) of fp32.

        Returns what is lacking after that.
        """
        lacking = [offset]
        for each in (self.own_out, self.other_out, self.narrow):
            lacking.append(lacking[-1] if each.bias is None else lacking[-1] + each.bias.detach().float())
        self.offsets = torch.stack(lacking[:-1])
        return lacking[-1]

    def forward(
        self, values: torch.Tensor, more: torch.Tensor | None, texts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        values, normed = self._normed(0, values, more, self.projections)
        attended = attention.self_attention(self.projections(normed), self._heads, self.own_out.scale)
        more = self._added(self.own_out, values, attended)
        values, normed = self._normed(1, values, more, self.queries)
        keys, said = texts[..., self._keys], texts[..., self._values]
        taken = attention.cross_attention(self.queries(normed), keys, said, self._heads, self.other_out.scale)
        values, normed = self._normed(2, values, self._added(self.other_out, values, taken), self.widen)
        return values, self._added(self.narrow, values, self.widen(normed, self.narrow.scale, self.images))

    def _added(self, layer: "Linear", values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """What a layer makes of rows, to be added to the values; or None, if it was, but for the bias."""
        if self.offsets is None or layer.scale is not None:
            made: torch.Tensor = layer(rows)
            return made
        layer.add_to(values, rows)
        return None

    def _normed(
        self, which: int, values: torch.Tensor, more: torch.Tensor | None, reader: "Linear"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm: Any = self.norms[which]
        offset = self.offsets[which] if more is None and self.offsets is not None else None
        return norms.layer_norm(values, more, norm.weight, norm.bias, norm.eps, reader.scale, offset)


class Projection(OfImages):
    """A linear layer, or a convolution of 1 x 1, that is never in fp8. It can be a kernel while the C++ kernels run."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self._cpu_kernel: PackedLinear | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self._cpu_kernel is not None and cpu.is_active():
            if isinstance(self.layer, nn.Linear):
                return self._cpu_kernel(values)
            return self._cpu_kernel(values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if isinstance(self.layer, nn.Linear):
            return linear.linear(values, self.layer.weight, self.layer.bias, self.images)
        result: torch.Tensor = self.layer(values)
        return result

    def become_cpu_kernel(self) -> None:
        """From now on multiply by a kernel where that gains and the C++ kernels run."""
        weight = self.layer.weight.flatten(1)
        if PackedLinear.supports(weight):
            self._cpu_kernel = PackedLinear(weight, self.layer.bias)


class Linear(Quantisable, OfImages):
    """A linear layer. It can be a C++ kernel while these run."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._cpu_kernel: PackedLinear | None = None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> "Linear":
        return cls(layer.weight, layer.bias)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self._cpu_kernel is not None and cpu.is_active():
            return self._cpu_kernel(values)
        self._observe(values)
        if self.scale is None:
            return linear.linear(values, self.weight, self.bias, self.images)
        if self.weight_scale is not None and not values.is_cuda:
            # oneDNN takes seconds for one such product where it finds AMX, and refuses to make it where it finds less.
            weight, bias = self.weight.float() * self.weight_scale, None if self.bias is None else self.bias.float()
            return F.linear(values.float() * self.scale, weight, bias).to(self._dtype)
        rows = torch._scaled_mm(
            values.reshape(-1, values.shape[-1]), self.weight.t(), scale_a=self.scale, scale_b=self.weight_scale,
            bias=self.bias, out_dtype=self._dtype, use_fast_accum=True,
        )  # fmt: skip
        return rows.view(*values.shape[:-1], -1)

    def add_to(self, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Add to values, (..., outputs), what it makes of rows, (..., inputs), but for its bias."""
        self._observe(rows)
        values.view(-1, values.shape[-1]).addmm_(rows.reshape(-1, rows.shape[-1]), self.weight.t())

    def become_cpu_kernel(self) -> None:
        """From now on multiply by a kernel where that gains and the C++ kernels run."""
        if self.scale is None and PackedLinear.supports(self.weight):
            self._cpu_kernel = PackedLinear(self.weight, self.bias)

    def quantise(self, scale: torch.Tensor) -> None:
        weight = self.weight.detach()
        self._quantise(scale, weight, weight.abs().amax().float() / fp8.E4M3_MAX)


class GatedLinear(Linear):
    """A linear layer and its GEGLU: in one on a device that has a kernel for it, from when the layer is made."""

    def __init__(self, layer: nn.Linear, device: str) -> None:
        weight, bias = layer.weight.detach(), layer.bias.detach()
        is_kernel = geglu.supports_fused_linear(torch.device(device), weight.dtype)
        if is_kernel:
            weight, bias = geglu.interleave_gates(weight), geglu.interleave_gates(bias)
        super().__init__(weight, bias)
        self._is_kernel, self._dtype = is_kernel, weight.dtype

    def forward(self, values: torch.Tensor, result_scale: torch.Tensor | None = None, images: int = 1) -> torch.Tensor:
        """(..., width), in fp8 where there is a scale for that; on a CPU GEGLU of so many images one by one."""
        if self._cpu_kernel is not None and cpu.is_active():
            return self._cpu_kernel.geglu(values)
        if not self._is_kernel or self.bias is None:
            return geglu.geglu(super().forward(values), result_scale, images)
        self._observe(values)
        return geglu.linear_geglu(
            values, self.weight, self.bias, self._dtype, self.scale, self.weight_scale, result_scale
        )  # fmt: skip


@contextlib.contextmanager
def observing() -> Iterator[None]:
    """While this lasts, layers that can be quantised remember the largest input that they saw."""
    Quantisable.observes = True
    try:
        yield
    finally:
        Quantisable.observes = False


def quantisable(unet: UNet2DConditionModel, spared: int = 0) -> dict[str, Quantisable]:
    """The layers of a U-Net that can multiply in fp8, by name, without those of so many `spared` blocks at its end."""
    kept = set(unet.up_blocks[max(0, len(unet.up_blocks) - spared) :].modules())
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, Quantisable) and layer not in kept}


def kept_scales(file: Path) -> dict[str, torch.Tensor]:
    """The scales of layers by name that were kept in a file, or none if it cannot be read or holds something else."""
    try:
        scales: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError):
        return {}
    usual = all(each.shape == () and each.dtype == torch.float32 for each in scales.values())
    return scales if usual and all(0 < each < torch.inf for each in scales.values()) else {}


def keep_scales(scales: dict[str, torch.Tensor], file: Path) -> None:
    """Keep scales for a later process, which finds all of them or none. Raises OSError, and then leaves nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
        written = Path(unfinished) / file.name
        written.write_bytes(save(scales))
        written.replace(file)
