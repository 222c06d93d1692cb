"""Networks on a device that has room for all of them, or for those that work at the moment."""

from collections.abc import Iterable

import torch
from torch import nn


class Residency:
    """Where networks are: on the device all of them, or, where they take `turns`, those that were asked for last.

    The others wait in the host's memory. For one thread at a time.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device, turns: bool) -> None:
        self._networks = list(networks)
        self._device = device
        self._there: set[nn.Module] = set()
        self._turns = turns
        if not turns:
            self.bring(*self._networks)

    def end_turns(self) -> None:
        """From now on there is room for all."""
        self._turns = False
        self.bring(*self._networks)

    # Weights that move within inference mode would be tensors of it ever after.
    @torch.inference_mode(mode=False)
    def bring(self, *wanted: nn.Module) -> None:
        """Put these on the device, and away what else is there if that takes turns."""
        if self._there.issuperset(wanted):
            return
        if self._turns:
            for network in self._there.difference(wanted):
                network.to("cpu")
            self._there.intersection_update(wanted)
        for network in wanted:
            network.to(self._device)
        self._there.update(wanted)
