"""Replace the layers of U-Nets and decoders by fused ones, which compute the same in fewer passes over fewer bytes.

Residual blocks, transformers and norms call kernels/. On Hopper a GEGLU is part of its matrix product. On a GPU skip
connections are not concatenated, and the transformer's output projections accumulate in place. On a CPU convolutions
and linear layers call the C++ kernels while these run. Projections of the same input are one product: queries, keys and
values of a self-attention; the keys and values of all cross-attentions, which depend on the text alone; and the
timestep's shifts of all residual blocks. The networks' own forward is diffusers', over images in channels-last order.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
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
from torch import nn

from server.acceleration.convolutions import Convolution, QuantizableConvolution, ResnetConvolution, Upsample
from server.acceleration.kernels import attention, common, convolution, cpu, fp8, geglu, linear, norms
from server.acceleration.kernels.linear import PackedLinear
from server.acceleration.per_image import PerImageLayer
from server.acceleration.quantization import Quantizable


class UnsupportedLayer(Exception):
    """A network has layers of a kind that cannot be fused."""


def fuse_layers(network: UNet2DConditionModel | Decoder, device: str = "cuda") -> None:
    """Replace the layers of a U-Net or a decoder in place, for a kind of device: cuda or cpu.

    Raises UnsupportedLayer before it changes the network.
    """
    check_supported(network)
    layers = list(network.modules())
    resnets = [layer for layer in layers if isinstance(layer, ResnetBlock2D)]
    fused: dict[Any, nn.Module] = {}
    if isinstance(network, UNet2DConditionModel):
        fused |= _fuse_unet_blocks(network, resnets, device)
    else:
        fused |= {each: Resnet(each, None) for each in resnets}
        if device != "cpu":
            fused |= {each: WideAttention(each) for each in layers if isinstance(each, Attention) and _is_wide(each)}
    fused |= {each: Upsample(each, device) for each in layers if isinstance(each, Upsample2D)}
    if isinstance(network, UNet2DConditionModel) and convolution.supports(torch.device(device), network.dtype):
        for each in fused.values():
            if isinstance(each, Upsample):  # cuDNN is up to four times slower
                each.use_kernel()
    fused |= {network.conv_norm_out: GroupNorm(network.conv_norm_out, silu=True), network.conv_act: nn.Identity()}
    _replace(network, fused)
    if device != "cpu":  # oneDNN adds a bias at no cost
        convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.bias is not None]
        _replace(network, {each: Convolution(each) for each in convolutions})
    network.to(memory_format=torch.channels_last)


def _fuse_unet_blocks(
    network: UNet2DConditionModel, resnets: Sequence[ResnetBlock2D], device: str
) -> dict[Any, nn.Module]:
    """Fuse the blocks of a U-Net, and the projections of the timestep and of the text that they share."""
    layers = list(network.modules())
    transformers = [layer for layer in layers if isinstance(layer, Transformer2DModel)]
    up_blocks = [layer for layer in layers if isinstance(layer, UpBlock2D | CrossAttnUpBlock2D)]
    joining = {resnet for block in up_blocks for resnet in block.resnets} if device != "cpu" else set()
    shifts = FusedLinear([each.time_emb_proj for each in resnets], [each.conv1.bias for each in resnets], F.silu)
    pairs = zip(resnets, shifts.columns, strict=True)
    fused: dict[Any, nn.Module] = {each: Resnet(each, columns, each in joining) for each, columns in pairs}
    fused |= {each: UpBlock(each) for each in up_blocks}
    crossings = [block.attn2 for each in transformers for block in each.transformer_blocks]
    texts = FusedLinear([projection for attention in crossings for projection in (attention.to_k, attention.to_v)])
    columns_of_texts = iter(texts.columns)
    for each in transformers:
        columns = [(next(columns_of_texts), next(columns_of_texts)) for _ in each.transformer_blocks]
        fused[each] = Transformer(each, columns, device)
    # diffusers' forward calls these two once per call, and passes their outputs to the blocks.
    network.time_embed_act = shifts
    network.encoder_hid_proj = MemoizeLast(texts) if device == "cpu" else texts
    network.register_to_config(encoder_hid_dim_type="text_proj")
    return fused


def check_supported(network: nn.Module) -> None:
    """Raise UnsupportedLayer unless `fuse_layers` can replace the layers of a U-Net or a decoder."""
    if odd := sorted({type(layer).__name__ for layer in network.modules() if not _is_usual(layer)}):
        raise UnsupportedLayer(f"{type(network).__name__} has an unusual {' and '.join(odd)}")


# Weights that are copied in inference mode would be inference tensors for good.
@torch.inference_mode(mode=False)
def share_weights(network: nn.Module) -> nn.Module:
    """Copy a network without its weights: both share the memory of these until the layers of one are fused."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    shared = {
        id(each): nn.Parameter(each.detach(), requires_grad=False) if isinstance(each, nn.Parameter) else each.detach()
        for each in tensors
    }
    return copy.deepcopy(network, shared)


def use_cpu_kernels(network: nn.Module) -> None:
    """Make a network that was fused for a CPU multiply by the C++ kernels while these run, where that is faster.

    From then on it must not change its device or precision.
    """
    for each in network.modules():
        if isinstance(each, ResnetConvolution | QuantizableLinear | Projection):
            each.use_cpu_kernel()


def use_convolution_kernels(unet: nn.Module) -> None:
    """Make all residual blocks and upsampling layers of a fused U-Net use the batch-invariant convolution kernel."""
    for each in unet.modules():
        if isinstance(each, QuantizableConvolution):
            each.use_kernel()


def _replace(network: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if layer in replacements:
                setattr(module, name, replacements[layer])


def _is_usual(layer: Any) -> bool:
    """Whether a layer is of the variant that SDXL has, if its class has several."""
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
    """Whether `WideAttention` computes an attention of this variant."""
    normed = layer.group_norm is not None and layer.spatial_norm is None and layer.norm_cross is None
    added = layer.residual_connection and layer.rescale_output_factor == 1
    return bool(normed and added and layer.heads == 1)


class FusedLinear(PerImageLayer):
    """Several linear layers of one input as one product; `columns` has the slice of each in its output."""

    def __init__(
        self, layers: Sequence[nn.Linear], more_biases: Sequence[torch.Tensor] = (), first: Any = None
    ) -> None:
        super().__init__()
        self._first = first
        self.weight = nn.Parameter(torch.cat([each.weight for each in layers]), requires_grad=False)
        self.bias = None
        biases: list[torch.Tensor] = [each.bias for each in layers if each.bias is not None]
        if more_biases:
            biases = [bias + more for bias, more in zip(biases, more_biases, strict=True)]
        if biases:
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        ends = torch.tensor([0] + [each.out_features for each in layers]).cumsum(0).tolist()
        self.columns = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Project values (rows, ..., inputs) to the outputs of all layers."""
        if self._first is not None:
            values = common.per_image(self.images, self._first, values)
        return linear.linear(values, self.weight, self.bias, self.images)


class MemoizeLast(nn.Module):
    """Memoize a layer's output for the last input tensor: the text embedding is the same for all steps.

    Not for CUDA graphs, which would replay the output for the text that they were captured with.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for `values`."""
        last = self._last  # another thread may replace it
        if last is None or last[0] is not values:
            last = self._last = values, self.layer(values)
        return last[1]


class GroupNorm(PerImageLayer):
    """A group norm of images, plus a shift of each channel if given, followed by SiLU if `silu`."""

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self._groups, self._eps, self._silu = norm.num_groups, norm.eps, silu

    def forward(
        self,
        images: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        padding: bool = False,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalize images (batch, channels, height, width), whose last channels may be given as `skip`.

        The result is in fp8 if there is a `scale`, and has a padding of zeros around each image if `padding`.
        """
        options = self._groups, self.weight, self.bias, self._eps, self._silu
        return norms.group_norm(images, shift, *options, scale, padding, self.images, skip)


class Resnet(nn.Module):
    """A residual block. The biases of its convolutions are added together with the shift and the residual.

    With `joins` it reads the skip connection in place; otherwise it concatenates it to the images first.
    """

    def __init__(self, layer: ResnetBlock2D, columns: slice | None, joins: bool = False) -> None:
        super().__init__()
        self._columns = columns  # of the shift, which includes the first convolution's bias
        self._joins = joins and layer.conv_shortcut is not None
        self.norm1, self.norm2 = GroupNorm(layer.norm1, silu=True), GroupNorm(layer.norm2, silu=True)
        self.conv1, self.conv2 = ResnetConvolution(layer.conv1), ResnetConvolution(layer.conv2)
        self.conv_shortcut: Projection | SkipShortcut | None = None
        if layer.conv_shortcut is not None:
            self.conv_shortcut = (SkipShortcut if self._joins else Projection)(layer.conv_shortcut)
        self.shift = layer.conv1.bias  # without a timestep
        bias = layer.conv2.bias
        if layer.conv_shortcut is not None:
            bias = nn.Parameter(bias + layer.conv_shortcut.bias, requires_grad=False)
            layer.conv_shortcut.bias = None
        self.bias = bias
        layer.conv1.bias = layer.conv2.bias = None

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take images (batch, channels, height, width) and all blocks' shifts, (batch, columns)."""
        if skip is not None and not self._joins:
            input_tensor, skip = torch.cat([input_tensor, skip], dim=1), None
        shift = self.shift.expand(len(input_tensor), -1) if temb is None else temb[:, self._columns]
        if self.conv1.uses_winograd:  # it adds a shift at next to no cost
            changed, shift = _convolve_normed(input_tensor, self.norm1, None, self.conv1, shift, skip=skip), None
        else:
            changed = _convolve_normed(input_tensor, self.norm1, None, self.conv1, skip=skip)
        parts = (input_tensor,) if skip is None else (input_tensor, skip)
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(*parts)
        return _convolve_normed(changed, self.norm2, shift, self.conv2, self.bias, residual)


def _convolve_normed(
    images: torch.Tensor,
    norm: GroupNorm,
    shift: torch.Tensor | None,
    convolution: ResnetConvolution,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalize images, and `skip` as more channels, in the form that the convolution reads, and convolve them."""
    padding = convolution.reads_padding(images)
    normed = norm(images, shift, convolution.scale, padding, skip)
    convolved: torch.Tensor = convolution(normed, padding, bias, residual)
    return convolved


class SkipShortcut(nn.Module):
    """A 1 x 1 convolution without a bias, whose last input channels are the skip connection's."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)

    def forward(self, images: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve images and `skip`, (batch, channels, height, width) each."""
        batch, channels, height, width = images.shape
        rows = F.linear(images.permute(0, 2, 3, 1).reshape(-1, channels), self.weight[:, :channels])
        if skip is not None:
            rows.addmm_(skip.permute(0, 2, 3, 1).reshape(len(rows), -1), self.weight[:, channels:].t())
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


class UpBlock(nn.Module):
    """An up block of a U-Net: residual blocks, each with a skip connection, and transformers."""

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
        """Compute the same as diffusers' block, which concatenates every skip connection."""
        images = hidden_states
        for at, resnet in enumerate(self.resnets):
            images = resnet(images, temb, res_hidden_states_tuple[-1 - at])
            if self.attentions is not None:
                images = self.attentions[at](images, encoder_hidden_states=encoder_hidden_states)[0]
        for upsample in self.upsamplers or ():
            images = upsample(images, upsample_size)
        return images


class WideAttention(nn.Module):
    """The self-attention of a decoder, with one wide head."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.norm, self.out = GroupNorm(layer.group_norm, silu=False), layer.to_out[0]
        self.projections = FusedLinear([layer.to_q, layer.to_k, layer.to_v])

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Take images (batch, channels, height, width)."""
        batch, channels, height, width = hidden_states.shape
        positions = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        projected = self.projections(positions).chunk(3, dim=-1)
        changed: torch.Tensor = self.out(attention.single_head_attention(*projected))
        return changed.view(batch, height, width, channels).permute(0, 3, 1, 2) + hidden_states


class Transformer(nn.Module):
    """The transformer blocks at one resolution of a U-Net, and the projections into and out of them."""

    def __init__(self, layer: Transformer2DModel, texts: Sequence[tuple[slice, slice]], device: str) -> None:
        super().__init__()
        self.norm = GroupNorm(layer.norm, silu=False)
        self.proj_in, self.proj_out = Projection(layer.proj_in), Projection(layer.proj_out)
        pairs = zip(layer.transformer_blocks, texts, strict=True)
        blocks = [TransformerBlock(block, *columns, device) for block, columns in pairs]
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
        """Take images (batch, channels, height, width), and the text's keys and values for the whole network."""
        batch, channels, height, width = hidden_states.shape
        positions = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        values, residual = self.proj_in(positions), None
        for block in self.blocks:
            values, residual = block(values, residual, encoder_hidden_states)
        if residual is None and self.last_bias is not None:
            changed = F.linear(values, self.proj_out.layer.weight, self.last_bias)
        else:
            changed = self.proj_out(values if residual is None else values + residual)
        return (changed.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + hidden_states,)


class TransformerBlock(PerImageLayer):
    """Self-attention, cross-attention to the text, and a gated feed-forward network.

    Its values have two summands, `values` and `residual`, which the next norm adds in its one pass. Or its output
    projections accumulate in place without their biases, which are the same for all rows: each norm then adds its row
    of `offsets`.
    """

    offsets: torch.Tensor | None

    def __init__(self, block: BasicTransformerBlock, keys: slice, values: slice, device: str) -> None:
        super().__init__()
        own, other = block.attn1, block.attn2
        self._heads = own.heads
        self._keys, self._values = keys, values
        self.norms = nn.ModuleList([block.norm1, block.norm2, block.norm3])
        self.projections = QuantizableLinear(torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight]), None)
        self.own_out = QuantizableLinear.of(own.to_out[0])
        self.queries = QuantizableLinear.of(other.to_q)
        self.other_out = QuantizableLinear.of(other.to_out[0])
        self.widen, self.narrow = GegluLinear(block.ff.net[0].proj, device), QuantizableLinear.of(block.ff.net[2])
        self.register_buffer("offsets", None)

    def add_in_place(self, offset: torch.Tensor) -> torch.Tensor:
        """Accumulate in place, except in fp8, into values that lack an offset, (inner,) in fp32.

        Returns the offset that the results lack.
        """
        lacking = [offset]
        for each in (self.own_out, self.other_out, self.narrow):
            lacking.append(lacking[-1] if each.bias is None else lacking[-1] + each.bias.detach().float())
        self.offsets = torch.stack(lacking[:-1])
        return lacking[-1]

    def forward(
        self, values: torch.Tensor, residual: torch.Tensor | None, texts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take and return values and residual, (batch, positions, inner); `texts` has keys and values of all blocks."""
        values, normed = self._normed(0, values, residual, self.projections)
        attended = attention.self_attention(self.projections(normed), self._heads, self.own_out.scale)
        residual = self._project(self.own_out, values, attended)
        values, normed = self._normed(1, values, residual, self.queries)
        keys, text_values = texts[..., self._keys], texts[..., self._values]
        attended = attention.cross_attention(self.queries(normed), keys, text_values, self._heads, self.other_out.scale)
        values, normed = self._normed(2, values, self._project(self.other_out, values, attended), self.widen)
        return values, self._project(self.narrow, values, self.widen(normed, self.narrow.scale, self.images))

    def _project(self, layer: "QuantizableLinear", values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """Return the layer's output as a residual, or add it to the values without its bias and return None."""
        if self.offsets is None or layer.scale is not None:
            made: torch.Tensor = layer(rows)
            return made
        layer.add_to(values, rows)
        return None

    def _normed(
        self, which: int, values: torch.Tensor, residual: torch.Tensor | None, reader: "QuantizableLinear"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm: Any = self.norms[which]
        offset = self.offsets[which] if residual is None and self.offsets is not None else None
        return norms.layer_norm(values, residual, norm.weight, norm.bias, norm.eps, reader.scale, offset)


class Projection(PerImageLayer):
    """A linear layer or a 1 x 1 convolution that is never in fp8. It uses a C++ kernel while these run."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self._cpu_kernel: PackedLinear | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Project values (rows, ..., inputs), or images (batch, channels, height, width)."""
        if self._cpu_kernel is not None and cpu.is_active():
            if isinstance(self.layer, nn.Linear):
                return self._cpu_kernel(values)
            return self._cpu_kernel(values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if isinstance(self.layer, nn.Linear):
            return linear.linear(values, self.layer.weight, self.layer.bias, self.images)
        result: torch.Tensor = self.layer(values)
        return result

    def use_cpu_kernel(self) -> None:
        """Use the C++ kernel from now on, where it is faster and while these run."""
        weight = self.layer.weight.flatten(1)
        if PackedLinear.supports(weight):
            self._cpu_kernel = PackedLinear(weight, self.layer.bias)


class QuantizableLinear(Quantizable, PerImageLayer):
    """A linear layer that can multiply in fp8. It uses a C++ kernel while these run."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._cpu_kernel: PackedLinear | None = None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> "QuantizableLinear":
        """Take the weight and the bias of a layer."""
        return cls(layer.weight, layer.bias)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Project values (rows, ..., inputs)."""
        if self._cpu_kernel is not None and cpu.is_active():
            return self._cpu_kernel(values)
        self._record(values)
        if self.scale is None:
            return linear.linear(values, self.weight, self.bias, self.images)
        if self.weight_scale is not None and not values.is_cuda:
            # oneDNN takes seconds for one fp8 product on a CPU with AMX, and refuses it on others.
            weight, bias = self.weight.float() * self.weight_scale, None if self.bias is None else self.bias.float()
            return F.linear(values.float() * self.scale, weight, bias).to(self._dtype)
        rows = torch._scaled_mm(
            values.reshape(-1, values.shape[-1]),
            self.weight.t(),
            scale_a=self.scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )
        return rows.view(*values.shape[:-1], -1)

    def add_to(self, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product of rows, (..., inputs), to values, (..., outputs), in place and without the bias."""
        self._record(rows)
        values.view(-1, values.shape[-1]).addmm_(rows.reshape(-1, rows.shape[-1]), self.weight.t())

    def use_cpu_kernel(self) -> None:
        """Use the C++ kernel from now on, where it is faster and while these run."""
        if self.scale is None and PackedLinear.supports(self.weight):
            self._cpu_kernel = PackedLinear(self.weight, self.bias)

    def quantize(self, scale: torch.Tensor) -> None:
        """Multiply in fp8 from now on, with one weight scale."""
        weight = self.weight.detach()
        self._quantize(scale, weight, weight.abs().amax().float() / fp8.E4M3_MAX)


class GegluLinear(QuantizableLinear):
    """A linear layer and its GEGLU, in one kernel if the device has one for it when the layer is made."""

    def __init__(self, layer: nn.Linear, device: str) -> None:
        weight, bias = layer.weight.detach(), layer.bias.detach()
        uses_kernel = geglu.supports_fused_linear(torch.device(device), weight.dtype)
        if uses_kernel:
            weight, bias = geglu.interleave_gates(weight), geglu.interleave_gates(bias)
        super().__init__(weight, bias)
        self._uses_kernel, self._dtype = uses_kernel, weight.dtype

    def forward(self, values: torch.Tensor, result_scale: torch.Tensor | None = None, images: int = 1) -> torch.Tensor:
        """Return (..., width), in fp8 if there is a `result_scale`. On a CPU GEGLU computes each of `images` apart."""
        if self._cpu_kernel is not None and cpu.is_active():
            return self._cpu_kernel.geglu(values)
        if not self._uses_kernel or self.bias is None:
            return geglu.geglu(super().forward(values), result_scale, images)
        self._record(values)
        return geglu.linear_geglu(
            values, self.weight, self.bias, self._dtype, self.scale, self.weight_scale, result_scale
        )
