"""Fused kernels for the operations around and between the matrix products of SDXL's networks.

One module holds one family: each operation with its plain PyTorch reference, its Triton kernel for CUDA and, where
there is one, the call of its C++ kernel for x86-64, whose source has the same name. The public function of an operation
picks among them: the C++ kernel in fp32 within `cpu.active()`, the Triton kernel on CUDA, else the reference.

    norms        layer norm and group norm
    geglu        GEGLU, alone or fused with the linear layer before it
    attention    self-attention, cross-attention with a text, single-head attention of the decoder
    linear       linear layers
    convolution  3 x 3 convolutions by Triton, with the choice of their tiles in `tiles`
    winograd     3 x 3 convolutions by C++
    pointwise    padding, bias and phase interleaving around a convolution
    fp8          rounding to e4m3

Triton kernels compute in fp32 and round once. A function that takes `scale` returns values for a product in fp8:
divided by `scale`, clamped to the range of e4m3 and rounded to it. One program reduces a row, an image or a group in a
fixed order, so a result depends neither on its neighbours in the batch nor on the run.
"""
