"""Keep a thousand streams open for five minutes and check that every call ends as it should and memory stays flat.

The server runs the embedded ensemble. Each caller keeps one stream open all the time: when a stream ends, the caller
opens another, for one small image. One stream in twenty is cancelled at its first `queued` event. A call is lost if it
ends neither with its image nor by its own cancellation, and hung if it has not ended after fifteen minutes.
Run: python -m bench.endurance --plot docs/endurance.png
"""

import argparse
import asyncio
import collections
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil

from bench import serving
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

_STREAMS_PER_CONNECTION = 100
_CANCELLED_SHARE = 1 / 20
_HUNG_SECONDS = 900.0
_SETTLED_SHARE = 0.2  # of the time, after which memory should no longer grow
_MIB = 2**20


@dataclass
class Record:
    """The outcomes and measurements so far."""

    began: float = field(default_factory=time.monotonic)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    took: list[float] = field(default_factory=list)  # seconds of each call that got its image
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, resident MiB
    open: int = 0
    most_open: int = 0


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--plot", type=Path, help="draw the server's memory into this file")
    options = parser.parse_args()

    # With room for cancelled calls until the server notices.
    with serving.served("--max-queue", str(2 * options.streams)) as (target, service):
        record = await endure(target, psutil.Process(service.process.pid), options.streams, options.seconds)
        print(service.log(), end="")
    print(report(record, options.seconds))
    if options.plot is not None:
        plot(record, options.plot)


async def endure(target: str, server: psutil.Process, streams: int, seconds: float) -> Record:
    """Keep a number of streams open for a number of seconds, then let them end."""
    record = Record()
    watching = asyncio.create_task(_watch(server, record))
    channels = [
        grpc.aio.insecure_channel(target, options=[*serving.LOCAL, ("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-streams // _STREAMS_PER_CONNECTION))
    ]
    await asyncio.gather(
        *(_caller(channels[number % len(channels)], number, record, seconds) for number in range(streams))
    )
    watching.cancel()
    for channel in channels:
        await channel.close()
    return record


async def _watch(server: psutil.Process, record: Record) -> None:
    while True:
        record.memory.append((time.monotonic() - record.began, server.memory_info().rss / _MIB))
        await asyncio.sleep(1)


async def _caller(channel: grpc.aio.Channel, number: int, record: Record, seconds: float) -> None:
    choose = random.Random(number)
    while time.monotonic() - record.began < seconds:
        record.open += 1
        record.most_open = max(record.most_open, record.open)
        record.ends[await _call(channel, choose, record)] += 1
        record.open -= 1


async def _call(channel: grpc.aio.Channel, choose: random.Random, record: Record) -> str:
    """Make one call and return how it ended."""
    request = pb.GenerateRequest(
        data=pb.TaskData(prompt="cat napping"),
        parameter=pb.TaskParameter(seed=choose.getrandbits(31)),
        sampling=pb.Sampling(steps=2, guidance_scale=1, width=64, height=64),
        output=pb.Output(raw=True),
    )
    cancels = choose.random() < _CANCELLED_SHARE
    began = time.monotonic()
    stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request)
    images, done = 0, False
    try:
        async with asyncio.timeout(_HUNG_SECONDS):  # not a deadline: the server would reject one that it cannot meet
            async for event in stream:  # type: ignore[attr-defined]
                if cancels and event.HasField("queued"):
                    stream.cancel()
                    return "cancelled"
                images += event.HasField("choice")
                done = event.HasField("done")
    except TimeoutError:
        return "hung"
    except grpc.aio.AioRpcError as error:
        return f"lost: {error.code().name}, {error.details()}"
    if not (done and images == 1):
        return "lost: ended without its image"
    record.took.append(time.monotonic() - began)
    return "image"


def report(record: Record, seconds: float) -> str:
    times, memory = np.array(record.memory).T
    settled = (times >= _SETTLED_SHARE * seconds) & (times <= seconds)
    slope = np.polyfit(times[settled] / 60, memory[settled], 1)[0]
    took = ", ".join(f"p{share} {np.percentile(record.took, share):.1f} s" for share in (50, 95, 99))
    return "\n".join(
        (
            f"{record.most_open} streams open at once, {sum(record.ends.values())} calls in {times[-1]:.0f} s: "
            + ", ".join(f"{count} {end}" for end, count in record.ends.most_common()),
            f"calls with an image took {took}, at most {max(record.took):.1f} s",
            f"memory of the server: {memory[0]:.0f} MiB at the start, {memory[settled][0]:.0f} after "
            f"{_SETTLED_SHARE * seconds:.0f} s, {memory[settled][-1]:.0f} at the end, at most {memory.max():.0f}; "
            f"{slope:+.2f} MiB a minute in between",
        )
    )


def plot(record: Record, path: Path) -> None:
    """Draw the server's memory over time."""
    from bench import plotting  # which needs matplotlib, an extra of development

    times, memory = np.array(record.memory).T
    figure, (axes,) = plotting.panels(1, width=7, height=2.8)
    axes.plot(times, memory, color=plotting.BLUE)
    axes.set_ylim(0, 1.15 * memory.max())
    plotting.style(axes, f"The server with {record.most_open} open streams", "seconds", "resident memory, MiB")
    plotting.save(figure, path)


if __name__ == "__main__":
    asyncio.run(main())
