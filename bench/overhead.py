"""What the service costs beyond the model: one image through gRPC against the bare loop over the same model calls.

Both run in this process on the same loaded ensemble, in turn, A B B A ..., so that a machine whose speed drifts does
not decide the ratio; decoding and coding the image is part of both. Run: python -m bench.overhead
"""

import argparse
import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from server import images, model
from server.domain import ImageRequest
from server.engine import Engine
from server.servicer import TextToImageServicer
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="pairs that count, after two that do not (default: 20)")
    runs = parser.parse_args().runs

    settings = Settings()
    ensemble = model.load(*settings.experts, settings.device, settings.precision)
    engine = Engine(settings.max_queue)
    card = await asyncio.wrap_future(engine.start(lambda: ensemble))
    servicer = TextToImageServicer(engine, settings)
    servicer.open(card)
    server = grpc.aio.server()
    pb_grpc.add_TextToImageServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    bare: list[float] = []
    served: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        request = pb.GenerateRequest(
            data=pb.TaskData(prompt="cat napping"), parameter=pb.TaskParameter(seed=1), output=pb.Output(raw=True)
        )
        device = ThreadPoolExecutor(1)  # a thread of its own for the bare loop, as the engine has one
        loop = asyncio.get_running_loop()
        for run in range(-2, runs):
            took = {}
            for way in ("bare", "served") if run % 2 else ("served", "bare"):
                began = time.perf_counter()
                if way == "bare":
                    alone = await loop.run_in_executor(device, bare_loop, ensemble)
                else:
                    async for event in stub.StreamGenerate(request):
                        if event.HasField("choice"):
                            through_grpc = event.choice.choice.raw
                took[way] = time.perf_counter() - began
            assert alone == through_grpc, "the service must give the bytes that the bare loop gives"
            if run >= 0:
                bare.append(took["bare"])
                served.append(took["served"])
    await server.stop(None)
    engine.stop()
    engine.join(10)

    ratios = [b / a for a, b in zip(bare, served, strict=True)]
    print(f"{card.name} on {card.device} in {card.precision}, {card.default_steps} steps, {runs} pairs")
    for name, seconds in (("bare loop", bare), ("through gRPC", served)):
        print(f"{name:14} median {statistics.median(seconds):.3f} s   min {min(seconds):.3f}   max {max(seconds):.3f}")
    print(
        f"overhead       median {100 * (statistics.median(ratios) - 1):+.2f} %, of medians "
        f"{100 * (statistics.median(served) / statistics.median(bare) - 1):+.2f} %"
    )


def bare_loop(ensemble: model.Ensemble) -> bytes:
    card = ensemble.card
    request = ImageRequest(
        "cat napping", "", (1,), card.default_steps, card.default_guidance_scale, card.default_high_noise_frac,
        card.default_scheduler, card.native_side, card.native_side,
    )  # fmt: skip
    trajectory = ensemble.plan(request, ensemble.encode(request), 1)
    for _ in trajectory.stages:
        ensemble.step(trajectory)
    return images.code(ensemble.decode(trajectory), images.JPEG, 95).data


if __name__ == "__main__":
    asyncio.run(main())
