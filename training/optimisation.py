"""Train a network in bf16 with fp32 master weights, AdamW, averaged weights and CUDA graphs.

A step samples its batch on the device. On CUDA the whole step, from the random numbers to the averaged weights, is one
graph that the host replays, because small networks would otherwise wait for Python. Under torchrun, each process trains
on its own batches, and the gradients are averaged over all processes.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed, nn

log = logging.getLogger(__name__)

_WARM_UP = 3  # updates before the capture of a CUDA graph, as its documentation requires
_N = TypeVar("_N", bound=nn.Module)


def compiled(network: _N) -> _N:
    """Return the network, on a GPU compiled for the shape of its first call."""
    if next(network.parameters()).is_cuda:
        return torch.compile(network, dynamic=False)  # type: ignore[return-value]
    return network


def agreed(seconds: float, device: torch.device) -> float:
    """Return the first process's value in all processes, so that all stop after the same step."""
    if not distributed.is_initialized():
        return seconds
    shared = torch.tensor(seconds, device=device)
    distributed.broadcast(shared, src=0)
    return shared.item()


class Trainer:
    """Train a network on several losses, each of which samples its own batch.

    `losses` maps a kind of batch, for example an image size, to its loss, `shares` to its share of the steps. The
    learning rate rises over the first `rise` steps, stays, and falls to zero over the last third of the time.
    `averaged` writes the mean of the weights over about the last 1 / (1 - decay) steps into the network.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        losses: Mapping[str, Callable[[], torch.Tensor]],
        shares: Mapping[str, float],
        learning_rate: float,
        decay: float = 0.999,
        rise: int = 300,
    ) -> None:
        self._name, self._losses, self._shares = name, losses, shares
        self._learning_rate, self._decay, self._rise = learning_rate, decay, rise
        self._parameters = list(network.parameters())
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        self._average = [torch.zeros_like(master) for master in self._masters]
        self._steps, self._spent = 0, 0.0
        # All gradients are views of one tensor, which a single all-reduce averages.
        self._gradient = torch.zeros(sum(master.numel() for master in self._masters), device=self._masters[0].device)
        sizes = [master.numel() for master in self._masters]
        for parameter, master, part in zip(self._parameters, self._masters, self._gradient.split(sizes), strict=True):
            parameter.grad = torch.zeros_like(parameter)
            master.grad = part.view_as(master)
        self._rate = torch.tensor(learning_rate, device=self._gradient.device)
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=self._rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
            capturable=self._rate.is_cuda,
        )
        self._loss = torch.zeros((), device=self._gradient.device)
        self._skipped = torch.zeros((), device=self._gradient.device)  # steps with a gradient that is not finite
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._pool = (
            torch.cuda.graph_pool_handle() if self._loss.is_cuda else None
        )  # graphs run one at a time, so they share memory

    def run(self, seconds: float, session: float = math.inf) -> bool:
        """Train until `seconds` are spent in all sessions, or until this one ends. Returns whether it is finished."""
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.manual_seed(self._steps * 1009 + rank)
        choose = random.Random(self._steps)
        session = agreed(session, self._loss.device)
        kinds, weights = list(self._shares), list(self._shares.values())
        before, began, logged = self._spent, time.monotonic(), self._spent / seconds
        while (passed := agreed(time.monotonic() - began, self._loss.device)) < min(seconds - before, session):
            self._spent = before + passed
            rise, fall = min(1.0, (self._steps + 1) / self._rise), min(1.0, (1 - self._spent / seconds) / 0.35)
            self._rate.fill_(self._learning_rate * rise * fall)
            for kind in choose.choices(kinds, weights, k=10):
                self._step(kind)
                self._steps += 1
            if self._spent / seconds >= logged:
                share, loss = 100 * self._spent / seconds, self._loss.item()
                log.info("%s: %3.0f %%, step %d, loss %.5f", self._name, share, self._steps, loss)
                if (skipped := self._skipped.item()) > 0.01 * self._steps:
                    raise FloatingPointError(f"{self._name}: {skipped:.0f} steps had a gradient that is not finite")
                logged += 0.04
            elif self._loss.is_cuda:
                torch.cuda.synchronize()
        self._spent = before + passed
        self._graphs.clear()  # they must be freed before the process group
        log.info("%s: %d steps, %d of them without a finite gradient", self._name, self._steps, self._skipped.item())
        return self._spent >= seconds

    def averaged(self) -> None:
        """Write the averaged weights into the network, with Adam's correction of the bias towards zero."""
        averages = torch._foreach_div(self._average, 1 - self._decay**self._steps)
        torch._foreach_copy_([parameter.data for parameter in self._parameters], averages)

    def save(self, file: Path) -> None:
        """Write a checkpoint for the next session."""
        state = {"masters": self._masters, "average": self._average, "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "steps": self._steps, "spent": self._spent, "loss": self._loss}, file)

    def load(self, file: Path) -> None:
        """Load a checkpoint of `save`, before the first step."""
        state = torch.load(file, map_location=self._loss.device, weights_only=True)
        torch._foreach_copy_(self._masters, state["masters"])
        torch._foreach_copy_(self._average, state["average"])
        torch._foreach_copy_([parameter.data for parameter in self._parameters], self._masters)
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self._loss.copy_(state["loss"])
        self._steps, self._spent = state["steps"], state["spent"]

    def _step(self, kind: str) -> None:
        if not self._loss.is_cuda:
            self._update(kind)
        elif kind in self._graphs:
            self._graphs[kind].replay()
        else:
            self._graphs[kind] = self._captured(kind)

    def _captured(self, kind: str) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update(kind)
        self._steps += _WARM_UP - 1
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._update(kind)
        return graph

    def _update(self, kind: str) -> None:
        loss = self._losses[kind]()
        loss.backward()
        with torch.no_grad():
            gradients = [master.grad for master in self._masters]
            torch._foreach_copy_(gradients, [parameter.grad for parameter in self._parameters])  # type: ignore[arg-type, misc]
            if distributed.is_initialized():
                distributed.all_reduce(self._gradient, distributed.ReduceOp.AVG)
            norm = torch.linalg.vector_norm(self._gradient)
            finite = torch.isfinite(norm)
            clipped = self._gradient * (1.0 / (norm + 1e-6)).clamp(max=1.0)
            # A batch that overflows must not end the training.
            self._gradient.copy_(torch.where(finite, clipped, 0.0))
            self._skipped.add_(~finite)
            self._optimizer.step()
            torch._foreach_copy_([parameter.data for parameter in self._parameters], self._masters)
            torch._foreach_lerp_(self._average, self._masters, 1 - self._decay)
            torch._foreach_zero_([parameter.grad for parameter in self._parameters])  # type: ignore[misc]
            self._loss.copy_(torch.where(finite, self._loss.lerp(loss.detach().float(), 0.02), self._loss))
