"""Compute the rows of each image in a call apart, where their bytes would depend on the other images otherwise."""

from torch import nn


class PerImageLayer(nn.Module):
    """A layer for the rows of `images` images, which computes those of each image apart on a CPU."""

    images: int = 1
