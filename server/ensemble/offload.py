"""Move networks between the host's memory and the device."""

from collections.abc import Iterable

import torch
from torch import nn


class ModelOffloader:
    """Keep all networks on the device or, with `offload`, only those that were requested last.

    The others wait in the host's memory. For one thread at a time.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device, offload: bool) -> None:
        self._networks = list(networks)
        self._device = device
        self._on_device: set[nn.Module] = set()
        self._offloads = offload
        if not offload:
            self.ensure_on_device(*self._networks)

    def disable_offload(self) -> None:
        """Move all networks to the device and keep them there."""
        self._offloads = False
        self.ensure_on_device(*self._networks)

    # Weights that move in inference mode become inference tensors for good.
    @torch.inference_mode(mode=False)
    def ensure_on_device(self, *networks: nn.Module) -> None:
        """Move these networks to the device, and with offload all others away from it."""
        if self._on_device.issuperset(networks):
            return
        if self._offloads:
            for network in self._on_device.difference(networks):
                network.to("cpu")
            self._on_device.intersection_update(networks)
        for network in networks:
            network.to(self._device)
        self._on_device.update(networks)
