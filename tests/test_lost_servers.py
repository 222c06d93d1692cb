"""A lost server costs the Python client's callers nothing, and a request that ends its servers ends two at most.

The servers and proxies are real, around a model of fixed times whose images say by their colour which seed they are of.
What the client decides, case by case, is in clients/python/tests/test_recovery.py.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from proxies import Proxy
from replicas import Replicas
from serving import PATIENCE, ServerProcess

from text_to_image_client import (
    AsyncTextToImage,
    Done,
    ImageReady,
    InvalidRequest,
    Result,
    ServerError,
    TextToImage,
    Unavailable,
)

PNG = {"format": "png", "width": 64, "height": 64}


def generate(target: str, prompt: str, **options: Any) -> Result:
    with TextToImage(target, round_robin=True, timeout=PATIENCE) as client:
        return client.generate(prompt, **PNG, **options)


def stream(target: str, prompt: str, **options: Any) -> Result:
    with TextToImage(target, round_robin=True, timeout=PATIENCE) as client:
        return _whole(list(client.stream(prompt, **PNG, **options)))


def generate_async(target: str, prompt: str, **options: Any) -> Result:
    async def call() -> Result:
        async with AsyncTextToImage(target, round_robin=True, timeout=PATIENCE) as client:
            return await client.generate(prompt, **PNG, **options)

    return asyncio.run(call())


def stream_async(target: str, prompt: str, **options: Any) -> Result:
    async def call() -> Result:
        async with AsyncTextToImage(target, round_robin=True, timeout=PATIENCE) as client:
            return _whole([event async for event in client.stream(prompt, **PNG, **options)])

    return asyncio.run(call())


def _whole(events: list[Any]) -> Result:
    """The result of a stream, each of whose images came once."""
    assert isinstance(events[-1], Done)
    ready = [event.choice_index for event in events if isinstance(event, ImageReady)]
    assert ready == list(range(len(events[-1].result.images)))
    return events[-1].result


CALLS = (generate, stream, generate_async, stream_async)


def _killed(began: ServerProcess) -> None:
    began.process.send_signal(signal.SIGKILL)


def _hanging(began: ServerProcess) -> None:
    """The model does not come back, until the server gives its device up and ends."""
    assert began.wait() == 6


@pytest.mark.parametrize(
    ("lose", "call"), [*((_killed, call) for call in CALLS), (_hanging, generate), (_hanging, stream_async)]
)
def test_a_lost_server_costs_its_caller_nothing(
    replicas: Replicas, tmp_path: Path, lose: Callable[[ServerProcess], None], call: Callable[..., Result]
):
    prompt, seed = f"until {tmp_path / 'release'}", replicas.fresh_seed()
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call, replicas.target, prompt, seed=seed, n=2)
        (first,) = replicas.wait_until_begun(seed)
        lose(first)
        replicas.wait_until_begun(seed, servers=2)
        (tmp_path / "release").touch()
        lost = calling.result(PATIENCE)
    assert first.wait() != 0
    assert len(replicas.alive()) == 2
    assert [image.seed for image in lost.images] == [seed, seed + 1]
    untroubled = generate(f"ipv4:{replicas.alive()[0].target}", prompt, seed=seed, n=2)
    assert [image.data for image in lost.images] == [image.data for image in untroubled.images]


def test_a_request_that_hangs_every_device_ends_two_servers_of_three(replicas: Replicas):
    seed = replicas.fresh_seed()
    with pytest.raises(ServerError) as caught:
        generate(replicas.target, "hang", seed=seed)
    assert caught.value.code is grpc.StatusCode.ABORTED
    gone = replicas.that_began(seed)
    assert [each.wait() for each in gone] == [6, 6]
    assert len(replicas.alive()) == 1


def test_a_request_that_kills_every_server_ends_two_servers_of_three(replicas: Replicas):
    seed = replicas.fresh_seed()
    with (
        TextToImage(replicas.target, round_robin=True, timeout=PATIENCE) as client,
        client.stream("hang", seed=seed, **PNG) as events,
    ):
        for servers in (1, 2):
            # An event from each: a server that is killed before the client hears of it is retried by gRPC.
            while events.resubmitted < servers - 1 or events.number == 0:
                next(events)
            for each in replicas.wait_until_begun(seed, servers):
                each.process.send_signal(signal.SIGKILL)
        with pytest.raises(Unavailable):
            list(events)
    gone = replicas.that_began(seed)
    assert [each.wait() for each in gone] == [-signal.SIGKILL] * 2
    assert len(replicas.alive()) == 1


def test_a_request_queued_behind_one_that_hangs_succeeds_elsewhere(replicas: Replicas):
    hanging, other, seed = replicas.servers[0], replicas.servers[1], replicas.fresh_seed()
    in_order = f"ipv4:{hanging.target},{other.target}"  # without round_robin the second is for when the first is gone
    with (
        TextToImage(hanging.target, resubmit=0) as poisonous,
        TextToImage(in_order) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        poison = pool.submit(poisonous.generate, "hang", seed=seed)
        hanging.wait_for_log(f"begins: {seed}")
        waiting = pool.submit(client.generate, "cat", seed=seed + 1, timeout=PATIENCE)
        assert waiting.result(PATIENCE).images[0].seed == seed + 1
        assert isinstance(poison.exception(PATIENCE), ServerError)
    hanging.wait_for_log(r"Generate \S+ UNAVAILABLE")  # it had waited there
    assert replicas.that_began(seed + 1) == [other]
    assert hanging.wait() == 6
    assert len(replicas.alive()) == 2


def test_a_detached_job_lost_with_its_server_is_submitted_again(replicas: Replicas, tmp_path: Path):
    prompt, seed = f"until {tmp_path / 'release'}", replicas.fresh_seed()
    options = {"request_id": "lost", "on_disconnect": "detach", "seed": seed}
    with TextToImage(replicas.target, timeout=PATIENCE) as client, client.stream(prompt, **options) as events:
        next(events)
        (first,) = replicas.wait_until_begun(seed)
        first.process.send_signal(signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(list, events)
            replicas.wait_until_begun(seed, servers=2)
            (tmp_path / "release").touch()
            assert _whole(rest.result(PATIENCE)).request_id == "lost"
        assert events.resubmitted == 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [("nginx", "grpc_read_timeout 1s;"), ("haproxy", "timeout server 1s")],
)
def test_a_detached_stream_survives_repeated_cuts_by_a_proxy(
    replicas: Replicas, tmp_path: Path, name: str, settings: str
):
    server = replicas.servers[0]
    proxy = Proxy(name, tmp_path / name, [server.target], settings)
    release, job = tmp_path / "release", f"behind-{name}"
    try:
        with TextToImage(proxy.target, timeout=PATIENCE) as client, ThreadPoolExecutor(1) as pool:
            events = client.stream(f"until {release}", request_id=job, on_disconnect="detach", n=2, **PNG)
            following = pool.submit(list, events)
            for number in range(2):  # each attempt to attach is cut, too
                server.wait_for_log(rf"(?s)(Attach {job} CANCELLED.*){{{number + 1}}}")
            release.touch()
            seen = following.result(PATIENCE)
    finally:
        proxy.stop()
    assert len(_whole(seen).images) == 2
    numbers = [event.number for event in seen]
    assert numbers == sorted(set(numbers)), "no event comes twice"
    assert events.resubmitted == 0
    assert server in replicas.alive()


def test_violations_of_client_and_server_are_reported_together(replicas: Replicas):
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(TextToImage(replicas.servers[0].target, timeout=PATIENCE))
        with pytest.raises(InvalidRequest) as caught:
            client.generate("cat", seed=-1, steps=9999, width=64, high_noise_frac=1.5)
        log = replicas.servers[0].log
    assert [each.field for each in caught.value.violations] == [
        *("parameter.seed", "sampling.steps", "sampling.highNoiseFrac", "sampling.height"),
    ]
    assert "sampling.steps: must be 1 to 150, is 9999" in str(caught.value)
    assert "maxMessageBytes" not in str(caught.value)
    assert not log.splitlines()[-1].endswith("OK")
