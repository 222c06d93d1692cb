"""The client and `t2i` against the real service on the embedded ensemble."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from text_to_image_client import (
    AsyncTextToImage,
    Done,
    ImageReady,
    InvalidRequest,
    Progress,
    Provenance,
    Queued,
    ServingStatus,
    Stage,
    TextToImage,
    WarningCode,
)

PATIENCE = 300  # seconds; reached only when something is broken


def t2i(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "text_to_image_client", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | environment,
    )


@pytest.fixture
def client(server_target: str):
    with TextToImage(server_target, timeout=PATIENCE) as client:
        yield client


def test_each_image_of_several_is_reproduced_by_its_seed(client: TextToImage):
    result = client.generate("cat napping", seed=1, n=2, steps=4)
    assert [image.seed for image in result.images] == [1, 2]
    for image in result.images:
        assert image.data.startswith(b"\xff\xd8\xff\xe0\x00\x10JFIF")
        assert (image.finish_reason, image.media_type, image.steps) == ("success", "image/jpeg", 4)
        assert image.base_calls + image.refiner_calls == 4
    again = client.generate("cat napping", seed=2, steps=4)
    assert again.images[0].data == result.images[1].data


async def test_both_clients_return_the_same_bytes(client: TextToImage, server_target: str):
    async with AsyncTextToImage(server_target, timeout=PATIENCE) as async_client:
        result = await async_client.generate("red apple", seed=3, steps=4, format="png")
        streamed = [event async for event in async_client.stream("red apple", seed=3, steps=4, format="png")]
    assert result.images[0].data == client.generate("red apple", seed=3, steps=4, format="png").images[0].data
    assert isinstance(streamed[-1], Done)
    assert streamed[-1].result.images == result.images


def test_a_stream_has_progress_of_every_stage_the_image_and_done(client: TextToImage):
    with client.stream("rocket", seed=1, steps=10) as stream:
        queued, *events, ready, done = stream
    assert isinstance(queued, Queued)
    assert isinstance(ready, ImageReady)
    assert isinstance(done, Done)
    assert done.result.images == (ready.image,)
    assert _stages(events) == [
        *("encode", "base", "refiner", "decode"),
    ]


def _stages(events: Sequence[object]) -> list[Stage]:
    """The stages in the order of their last steps."""
    assert all(isinstance(event, Progress) for event in events)
    return [event.stage for event in events if isinstance(event, Progress) and event.step == event.steps]


def test_the_model_has_schedulers_sizes_and_fingerprint(client: TextToImage):
    model = client.model()
    assert "euler" in model.schedulers
    assert model.sizes["1:1"][0] == model.sizes["1:1"][1]
    assert re.fullmatch("[0-9a-f]{64}", model.fingerprint)


def test_the_service_is_healthy(client: TextToImage):
    assert client.health() is ServingStatus.SERVING
    assert client.health("text_to_image.v1.TextToImageService") is ServingStatus.SERVING


def test_every_bad_field_is_named_at_once(client: TextToImage):
    with pytest.raises(InvalidRequest) as caught:
        client.generate(" ", n=1000, aspect_ratio="7:3", steps=0)
    assert {violation.field for violation in caught.value.violations} == {
        *("data.prompt", "parameter.n", "parameter.aspect-ratio", "sampling.steps"),
    }


def test_a_snapped_size_is_a_warning(client: TextToImage):
    model = client.model()
    width = model.sizes["1:1"][0]
    result = client.generate("cat", steps=2, width=width + 1, height=width)
    assert WarningCode.SIZE_SNAPPED in {warning.code for warning in result.warnings}
    assert result.images[0].width == width


def test_t2i_saves_the_bytes_of_the_client(client: TextToImage, server_target: str, tmp_path: Path):
    path = tmp_path / "cat.jpg"
    flags = ("--seed", "1", "--steps", "4", "--json", "--target", server_target)
    ended = t2i("generate", "cat napping", "-o", str(path), *flags)
    assert ended.returncode == 0, ended.stderr
    assert path.read_bytes() == client.generate("cat napping", seed=1, steps=4).images[0].data
    assert json.loads(ended.stdout)["images"][0]["seed"] == 1


EVERY_OPTION = (
    *("--negative-prompt", 'blurry "green" 🍐', "--guidance-scale", "3.3", "--high-noise-frac", "0.7", "--steps", "7"),
    *("--scheduler", "euler_ancestral", "--width", "161", "--height", "96", "--quality", "61", "-n", "2"),
)


def test_t2i_reproduces_the_bytes_from_the_metadata_alone(server_target: str, tmp_path: Path):
    saved, to = str(tmp_path / "apple.json"), ("--target", server_target)
    files = ("-o", str(tmp_path / "apple.webp"), "--metadata", saved)
    first = t2i("generate", "red apple", *EVERY_OPTION, *files, *to)
    assert first.returncode == 0, first.stderr
    apples = [(tmp_path / f"apple-{index}.webp").read_bytes() for index in range(2)]
    assert len(set(apples)) == 2

    like = ("generate", "--like", saved, "--strict", *to)
    both = t2i(*like, "-o", str(tmp_path / "both.webp"))
    one = t2i(*like, "-o", str(tmp_path / "one.webp"), "--image", "1")
    other = t2i(*like, "-o", str(tmp_path / "other.webp"), "--image", "1", "--seed", "8")
    for ended in (both, one, other):
        assert ended.returncode == 0, ended.stderr
        assert "Warning" not in ended.stderr
    assert [(tmp_path / f"both-{index}.webp").read_bytes() for index in range(2)] == apples
    assert (tmp_path / "one.webp").read_bytes() == apples[1]
    assert (tmp_path / "other.webp").read_bytes() not in apples


@pytest.mark.slow
def test_like_names_the_differences_of_another_environment(
    client: TextToImage, server_target: str, start_server, tmp_path: Path
):
    threads = client.model().environment.threads
    if threads == 1:
        pytest.skip("the server has one thread")
    saved, image = tmp_path / "cat.json", ("-o", str(tmp_path / "cat.jpg"))
    t2i("generate", "cat", "--steps", "5", *image, "--metadata", str(saved), "--target", server_target)
    other = start_server(OMP_NUM_THREADS="1").wait_until_ready()
    like = ("generate", "--like", str(saved), *image, "--target", other.target)
    again = t2i(*like)
    assert again.returncode == 0, again.stderr
    assert f"Warning: this differs from {saved}\n  threads: {threads} then, 1 now\n  reference image: " in again.stderr
    assert again.stderr.endswith("  image 0: other bytes\n")
    strictly = t2i(*like, "--strict")
    assert strictly.returncode == 8
    assert f"Error: this differs from {saved}\n" in strictly.stderr


async def test_the_request_of_an_image_reproduces_it_with_both_clients(client: TextToImage, server_target: str):
    result = client.generate("red apple", n=2, steps=5, scheduler="heun", aspect_ratio="3:2", format="webp", quality=50)
    image = result.images[1]
    assert client.generate(**image.request).images == (image,)
    assert hashlib.sha256(image.data).hexdigest() == image.sha256
    async with AsyncTextToImage(server_target, timeout=PATIENCE) as async_client:
        assert (await async_client.generate(**image.request)).images == (image,)
        *_, done = [event async for event in async_client.stream(**Provenance(result.metadata).request())]
    assert isinstance(done, Done)
    assert done.result.images == result.images
    assert done.result.environment == result.environment == client.model().environment


def test_t2i_shows_model_and_health(server_target: str):
    assert t2i("health", "--target", server_target).stdout == "SERVING\n"
    assert "euler" in t2i("model", "--target", server_target).stdout


def test_run_starts_a_server_and_prints_as_instill_does():
    ended = t2i("run", "-i", '{"data": {"prompt": "cat napping"}, "parameter": {"seed": 7, "n": 2}}')
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    log = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\.\d{3} INFO     \[Instill\] (.*)$", ended.stdout, re.M)
    assert log == ["Starting model image...", "Deploying model...", "Running inference...", "Outputs:", "Done"]
    outputs = json.loads("".join(re.findall(r"^(?!\d{4}-).*\n", ended.stdout, re.M)))
    assert [choice["finish-reason"] for choice in outputs[0]["data"]["choices"]] == ["success", "success"]
    assert outputs[0]["data"]["choices"][0]["image"].startswith("data:image/jpeg;base64,/9j/7gAOQWRvY")


DOCKER = f"""#!/bin/sh
# The part of docker that `t2i run -t` uses: a running engine, an existing image, `run` in the foreground, and `port`
# when the container has published one.
ready="$(dirname "$0")/ready"
case "$1" in
    run) echo "$@" > "$ready.arguments"; exec {sys.executable} -m server --listen 127.0.0.1:0 --ready-file "$ready" ;;
    port) cat "$ready" ;;
esac
"""


def test_run_with_a_tag_draws_in_its_container(tmp_path: Path):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    ended = t2i("run", "-t", "v1", "-i", '{"prompt": "cat napping"}', PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ended.returncode == 0, ended.stderr
    assert '"image": "data:image/jpeg;base64,' in ended.stdout
    assert ended.stderr == "text-to-image-service:v1 under docker\n"
    assert (tmp_path / "ready.arguments").read_text().endswith(" text-to-image-service:v1\n")
    assert not (tmp_path / "ready").exists(), "the service was stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_run_stops_its_server_when_it_is_ended(number: signal.Signals):
    command = (sys.executable, "-m", "text_to_image_client", "run", "-i", '{"prompt": "cat napping"}')
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("Deploying model..." in line for line in process.stdout)
        (service,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(PATIENCE) == 130
        assert not service.is_running()
