"""One way to train every network: bf16 beside fp32 master weights, AdamW, an average of the weights, CUDA graphs.

A step draws its own batch on the device, so that on CUDA the whole of it, from the random numbers to the averaged
weights, is one graph that the host only replays: small networks would otherwise wait for Python.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

log = logging.getLogger(__name__)

_WARM_UP = 3  # updates made before one is captured, as CUDA graphs ask for


class Trainer:
    """Trains a network on losses, each of which draws a batch of its own kind.

    `losses` maps a kind (a size of image, say) to how it is drawn, `shares` to how often. The learning rate rises over
    the first steps, stays, and falls to nothing over the last third of the time. `averaged` writes the mean of the
    weights over about the last 1 / (1 - decay) steps into the network.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        losses: Mapping[str, Callable[[], torch.Tensor]],
        shares: Mapping[str, float],
        learning_rate: float,
        decay: float = 0.999,
    ) -> None:
        self._name, self._losses, self._shares = name, losses, shares
        self._learning_rate, self._decay = learning_rate, decay
        self._parameters = list(network.parameters())
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        self._average = [torch.zeros_like(master) for master in self._masters]
        self._updates = 0
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            master.grad = torch.zeros_like(master)
        self._rate = torch.tensor(learning_rate, device=self._masters[0].device)
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=self._rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
            capturable=self._rate.is_cuda,
        )
        self._loss = torch.zeros((), device=self._masters[0].device)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._loss.is_cuda else None  # graphs run one after another

    def run(self, seconds: float, seed: int = 0) -> int:
        """Train for so long; the number of steps made."""
        choose = random.Random(seed)
        kinds, weights = list(self._shares), list(self._shares.values())
        began, told, steps = time.monotonic(), 0.0, 0
        while (passed := (time.monotonic() - began) / seconds) < 1:
            rise, fall = min(1.0, (steps + 1) / 300), min(1.0, (1 - passed) / 0.35)
            self._rate.fill_(self._learning_rate * rise * fall)
            for kind in choose.choices(kinds, weights, k=10):
                self._step(kind)
                steps += 1
            if passed >= told:
                log.info("%s: %3.0f %%, step %d, loss %.5f", self._name, 100 * passed, steps, self._loss.item())
                told += 0.04
            elif self._loss.is_cuda:
                torch.cuda.synchronize()
        if not torch.isfinite(self._loss):
            raise FloatingPointError(f"{self._name}: the loss is no longer finite")
        return steps

    def averaged(self) -> None:
        """Put the averaged weights into the network. The average began at zero, which is divided out, as in Adam."""
        seen = 1 - self._decay**self._updates
        averages = torch._foreach_div(self._average, seen)
        torch._foreach_copy_([parameter.data for parameter in self._parameters], averages)

    def _step(self, kind: str) -> None:
        if not self._loss.is_cuda:
            self._update(kind)
            self._updates += 1
        elif kind in self._graphs:
            self._graphs[kind].replay()
            self._updates += 1
        else:
            # The search for the fastest convolutions takes seconds, which a rare kind does not repay.
            with torch.backends.cudnn.flags(enabled=True, benchmark=self._shares[kind] >= 0.2):
                self._graphs[kind] = self._captured(kind)

    def _captured(self, kind: str) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update(kind)
        self._updates += _WARM_UP
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._update(kind)
        return graph

    def _update(self, kind: str) -> None:
        loss = self._losses[kind]()
        loss.backward()
        with torch.no_grad():
            gradients = [master.grad for master in self._masters]
            torch._foreach_copy_(gradients, [parameter.grad for parameter in self._parameters])
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
            self._optimizer.step()
            torch._foreach_copy_([parameter.data for parameter in self._parameters], self._masters)
            torch._foreach_lerp_(self._average, self._masters, 1 - self._decay)
            torch._foreach_zero_([parameter.grad for parameter in self._parameters])
            self._loss.lerp_(loss.detach().float(), 0.02)
