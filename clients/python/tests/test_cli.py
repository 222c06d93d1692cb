"""The output, the files and the exit codes of `t2i`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckResponse

from text_to_image_client._messages import build_request
from text_to_image_client.cli import EXIT_CODES, main
from text_to_image_client.v1 import text_to_image_pb2 as pb

README = Path(__file__).parent.parent / "README.md"


def t2i(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, arguments, env=environment)


@pytest.fixture
def answer(service, image_metadata):
    """Returns a function that scripts the complete answer of n images."""

    def script(n: int = 1, media_type: str = "image/jpeg", **fields: Any) -> None:
        image_metadata.media_type = media_type
        done = pb.Done(metadata=pb.Metadata(request_id="mine", images=[image_metadata] * n, **fields))
        done.metadata.warnings.add(field="sampling.width", message="100 pixels became 96")
        service.answer(
            [
                pb.StreamGenerateResponse(queued=pb.Queued(position=1)),
                pb.StreamGenerateResponse(progress=pb.Progress(stage=pb.STAGE_BASE, step=1, steps=2)),
                pb.StreamGenerateResponse(progress=pb.Progress(stage=pb.STAGE_BASE, step=2, steps=2)),
                *(
                    pb.StreamGenerateResponse(preview=pb.Preview(choice_index=index, raw=b"preview %d" % step))
                    for step in range(2)
                    for index in range(n)
                ),
                *(
                    pb.StreamGenerateResponse(
                        choice=pb.ChoiceReady(
                            choice_index=index,
                            choice=pb.Choice(finish_reason="success", raw=b"image %d" % index),
                            metadata=image_metadata,
                        )
                    )
                    for index in range(n)
                ),
                pb.StreamGenerateResponse(done=done),
            ]
        )

    return script


def test_generate_saves_the_image_and_reports_to_stderr(service, answer, tmp_path):
    answer()
    path = tmp_path / "cat.jpg"
    result = t2i("generate", "cat napping", "-o", str(path), "--target", service.target)
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == b"image 0"
    assert result.stdout == ""
    assert result.stderr.splitlines()[:2] == ["queued, 1 ahead", "base 2/2"]
    assert f"{path}  128x96  seed 7  base 16 + refiner 4 calls" in result.stderr
    assert "Warning: sampling.width: 100 pixels became 96" in result.stderr


def test_json_is_the_only_output_on_stdout(service, answer, tmp_path):
    answer()
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--json", "--target", service.target)
    metadata = json.loads(result.stdout)
    assert metadata["requestId"] == "mine"
    assert metadata["images"][0]["seed"] == 7


def test_several_images_are_numbered(service, answer, tmp_path):
    answer(n=2)
    assert t2i("generate", "cat", "-n", "2", "-o", str(tmp_path / "cat.jpg"), "--target", service.target).exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "cat-0.jpg": b"image 0",
        "cat-1.jpg": b"image 1",
    }


def test_a_recoded_image_gets_the_ending_of_its_format(service, answer, tmp_path):
    answer(media_type="image/jpeg")
    assert t2i("generate", "cat", "-o", str(tmp_path / "cat.png"), "--target", service.target).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


def test_an_image_of_a_newer_media_type_gets_its_own_ending(service, answer, tmp_path):
    answer(media_type="image/avif")
    assert t2i("generate", "cat", "-o", str(tmp_path / "cat.png"), "--target", service.target).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cat.avif"]


@pytest.mark.parametrize("command", [("generate", "cat"), ("attach", "mine")])
def test_a_recoded_image_overwrites_no_existing_file(service, answer, tmp_path, command):
    answer(media_type="image/jpeg")
    (tmp_path / "cat.jpg").write_bytes(b"another image")
    result = t2i(*command, "-o", str(tmp_path / "cat.png"), "--target", service.target)
    assert result.exit_code == 0
    assert f"{tmp_path / 'cat.1.jpg'}  128x96" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "cat.jpg": b"another image",
        "cat.1.jpg": b"image 0",
    }


@pytest.mark.parametrize("command", [("generate", "cat"), ("attach", "mine")])
def test_metadata_never_overwrite_an_image(service, tmp_path, command):
    for output, metadata, several in (("cat.jpg", "cat.jpg", ()), ("cat.jpg", "cat-1.jpg", ("-n", "2"))):
        flags = () if command[0] == "attach" else several
        named = ("-o", str(tmp_path / output), "--metadata", str(tmp_path / metadata))
        result = t2i(*command, *flags, *named, "--target", service.target)
        assert result.exit_code == 2
        assert f"{tmp_path / metadata} is also the name of an image of -o; give another name" in result.stderr
    assert service.requests == []


@pytest.mark.parametrize("command", [("generate", "cat", "-o", "cat.jpg"), ("model",), ("cancel", "mine")])
def test_a_nan_timeout_is_a_usage_error(service, command):
    result = t2i(*command, "--timeout", "nan", "--target", service.target)
    assert result.exit_code == 2
    assert "'nan' is not a valid number of seconds" in result.stderr


def test_a_broken_connection_of_a_detached_job_is_reported_once(service, answer, tmp_path):
    service.answer(
        [pb.StreamGenerateResponse(number=1, queued=pb.Queued()), (grpc.StatusCode.UNAVAILABLE, "Socket closed")]
    )
    answer()
    result = t2i("attach", "mine", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 0
    line = f"{service.target}: the connection broke; attaching to mine again until it is back"
    assert result.stderr.splitlines().count(line) == 1


def test_a_call_cut_by_a_proxy_has_a_readable_error(service, tmp_path):
    cut = (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
    service.answer(
        [pb.StreamGenerateResponse(queued=pb.Queued()), cut], [pb.StreamGenerateResponse(queued=pb.Queued()), cut]
    )
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 1
    assert f"Error: {service.target}: the connection broke, or a proxy cut it (Received RST_STREAM" in result.stderr


def test_a_ca_file_without_pem_is_a_usage_error(service, tmp_path):
    (tmp_path / "ca.crt").write_text("garbage")
    result = t2i("--tls-ca", str(tmp_path / "ca.crt"), "health", "--target", service.target)
    assert result.exit_code == 2
    assert "ca.crt is not PEM: it has no line that begins with -----BEGIN" in result.stderr


def test_the_retry_time_is_printed_once(service, status, tmp_path):
    details = RetryInfo(retry_delay=Duration(seconds=3, nanos=984_250_000))
    service.answer(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "9 requests are waiting; try again in 4.0 s", details))
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.stderr == "Error: 9 requests are waiting; try again in 4.0 s\n"


def test_a_resubmitted_request_is_reported(service, status, answer, tmp_path):
    service.answer([pb.StreamGenerateResponse(queued=pb.Queued()), status(grpc.StatusCode.UNAVAILABLE, "gone")])
    answer()
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[:3] == ["queued", "the server was lost; another one draws the request", "queued, 1 ahead"]


def test_a_timeout_exits_with_6(service, tmp_path):
    service.answer([pb.StreamGenerateResponse(queued=pb.Queued()), service.hold])
    arguments = ("-o", str(tmp_path / "cat.jpg"), "--timeout", "0.5", "--target", service.target)
    result = t2i("generate", "cat", *arguments)
    assert result.exit_code == 6
    hint = "give --timeout more seconds, or fewer --steps"
    assert f"Error: the timeout passed before the answer was complete; {hint}\n" in result.stderr


def test_a_message_too_large_for_grpc_exits_with_12(service, tmp_path):
    service.answer((grpc.StatusCode.RESOURCE_EXHAUSTED, "received metadata size exceeds soft limit (9000 vs. 8192)"))
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 12
    assert "Error: received metadata size exceeds" in result.stderr


def test_every_option_reaches_the_request(service, answer, tmp_path):
    answer()
    options = {
        "negative-prompt": "dogs",
        "aspect-ratio": "16:9",
        "n": "1",
        "seed": "0",
        "steps": "30",
        "guidance-scale": "4.5",
        "high-noise-frac": "0.9",
        "scheduler": "heun",
        "width": "64",
        "height": "96",
        "quality": "80",
        "priority": "-1",
        "request-id": "mine",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    t2i("generate", "cat", *flags, "-o", str(tmp_path / "cat.webp"), "--target", service.target)
    request = service.requests[0]
    assert request.data.prompt == "cat"
    assert request.parameter == pb.TaskParameter(aspect_ratio="16:9", negative_prompt="dogs", n=1, seed=0)
    assert request.sampling == pb.Sampling(
        steps=30, guidance_scale=4.5, high_noise_frac=0.9, scheduler="heun", width=64, height=96
    )
    assert (request.output.format, request.output.quality) == (pb.FORMAT_WEBP, 80)
    assert (request.priority, request.request_id) == (-1, "mine")
    assert request.on_disconnect == pb.ON_DISCONNECT_UNSPECIFIED
    assert not request.output.HasField("preview_interval")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-o", "cat.gif"), "cat.gif must end in one of .jpg, .jpeg, .png, .webp\n"),
        (("-o", "cat.jpg", "--format", "png"), "end it in .png, or leave out --format"),
        (("-o", "nowhere/cat.jpg"), "there is no folder nowhere"),
        (("-o", "cat.jpg", "--timeout", "0"), "--timeout"),
        (("-o", "cat.jpg", "--metadata", "nowhere/cat.json"), "there is no folder nowhere"),
        (("-o", "cat.jpg", "--strict"), "--image and --strict go with --like"),
        (("-o", "cat.jpg", "--image", "0"), "--image and --strict go with --like"),
        (("-o", "cat.jpg", "--like", "nowhere.json"), "nowhere.json"),
        (("-o", "cat.jpg", "--preview-interval", "3"), "--preview-interval goes with --preview"),
        (("-o", "cat.jpg", "--preview", "cat.png"), "cat.png must end in .jpg"),
        (("-o", "cat.jpg", "--preview", "nowhere/cat.jpg"), "there is no folder nowhere"),
        (("--detach", "--json"), "--detach only starts the job"),
        (("--detach", "--preview", "cat.jpg"), "--detach only starts the job"),
        ((), "Missing option"),
    ],
)
def test_a_usage_error_exits_with_2_without_a_call(service, arguments, complaint):
    result = t2i("generate", "cat", *arguments, "--target", service.target)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert service.requests == []


def test_a_missing_prompt_is_a_usage_error(service):
    result = t2i("generate", "-o", "cat.jpg", "--target", service.target)
    assert result.exit_code == 2
    assert "give a PROMPT, or --like with a metadata file" in result.stderr


def test_a_file_without_metadata_is_an_invalid_request_without_a_call(service):
    result = t2i("generate", "--like", str(README), "-o", "cat.jpg", "--target", service.target)
    assert result.exit_code == 3
    assert f"Error: {README} is not JSON" in result.stderr
    assert service.requests == []


@pytest.fixture
def metadata(image_metadata, tmp_path) -> Path:
    """A metadata file of the two images of the scripted answers."""
    image_metadata.request.CopyFrom(build_request("cat", {"seed": 7, "n": 1, "format": "webp_lossless"}))
    images = [pb.ImageMetadata(), pb.ImageMetadata()]
    for image, seed in zip(images, (7, 8), strict=True):
        image.CopyFrom(image_metadata)
        image.request.parameter.seed = seed
    file = tmp_path / "cat.json"
    file.write_text(MessageToJson(pb.Metadata(images=images)))
    return file


@pytest.mark.parametrize(
    ("arguments", "requested"),
    [
        (("-o", "cat.webp"), {"n": 2, "format": "webp_lossless"}),
        (("-o", "cat.png"), {"n": 2, "format": "png"}),
        (("-o", "cat.webp", "--format", "webp"), {"n": 2, "format": "webp"}),
        (("-o", "cat.webp", "--image", "1"), {"n": 1, "seed": 8, "format": "webp_lossless"}),
        (("-o", "cat.webp", "--seed", "9", "-n", "3"), {"n": 3, "seed": 9, "format": "webp_lossless"}),
        (("dog", "-o", "cat.webp"), {"prompt": "dog", "n": 2, "format": "webp_lossless"}),
    ],
)
def test_like_sends_the_saved_request_changed_by_other_options(
    service, status, metadata, tmp_path, monkeypatch, arguments, requested
):
    monkeypatch.chdir(tmp_path)
    service.answer(status(grpc.StatusCode.INTERNAL))
    t2i("generate", "--like", str(metadata), *arguments, "--target", service.target)
    prompt, options = requested.pop("prompt", "cat"), {"seed": 7} | requested
    assert service.requests == [build_request(prompt, options)]


@pytest.mark.parametrize(("flags", "exit_code", "kind"), [((), 0, "Warning"), (("--strict",), 8, "Error")])
def test_differences_are_a_warning_and_with_strict_an_error(
    service, answer, metadata, tmp_path, flags, exit_code, kind
):
    answer(n=2, media_type="image/webp", environment=pb.Environment(threads=2))
    arguments = ("--like", str(metadata), "-o", str(tmp_path / "cat.webp"), *flags, "--target", service.target)
    result = t2i("generate", *arguments)
    assert result.exit_code == exit_code
    assert f"{kind}: this differs from {metadata}\n  threads: 0 then, 2 now\n" in result.stderr
    assert (tmp_path / "cat-1.webp").exists(), "the images are saved"


def test_metadata_is_written_to_the_named_file(service, answer, tmp_path):
    answer()
    file = tmp_path / "saved.json"
    arguments = ("-o", str(tmp_path / "cat.jpg"), "--metadata", str(file), "--json", "--target", service.target)
    result = t2i("generate", "cat", *arguments)
    assert json.loads(file.read_text()) == json.loads(result.stdout)


@pytest.mark.parametrize(("flags", "interval"), [((), 5), (("--preview-interval", "3"), 3)])
def test_the_preview_file_has_the_newest_preview(service, answer, tmp_path, flags, interval):
    answer()
    file = tmp_path / "preview.jpg"
    arguments = ("-o", str(tmp_path / "cat.png"), "--preview", str(file), *flags, "--target", service.target)
    assert t2i("generate", "cat", *arguments).exit_code == 0
    assert file.read_bytes() == b"preview 1"
    assert service.requests[0].output.preview_interval == interval


def test_previews_of_several_images_are_numbered(service, answer, tmp_path):
    answer(n=2)
    arguments = ("-n", "2", "-o", str(tmp_path / "cat.jpg"), "--preview", str(tmp_path / "p.jpg"))
    assert t2i("generate", "cat", *arguments, "--target", service.target).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cat-0.jpg", "cat-1.jpg", "p-0.jpg", "p-1.jpg"}


@pytest.mark.parametrize("given", [("--request-id", "mine"), ()])
def test_detach_starts_the_job_and_prints_how_to_follow_it(service, given):
    service.answer([pb.StreamGenerateResponse(queued=pb.Queued(), number=1), service.hold])
    result = t2i("generate", "cat", "--detach", "-o", "cat.png", *given, "--target", service.target)
    assert result.exit_code == 0, result.output
    (request,) = service.requests
    assert (request.on_disconnect, request.output.format) == (pb.ON_DISCONNECT_DETACH, pb.FORMAT_PNG)
    assert result.stdout == f"{request.request_id}\n"
    assert request.request_id == "mine" if given else len(request.request_id) == 36
    for command in ("attach", "cancel"):
        assert f"t2i --target {service.target} {command} {request.request_id}" in result.stderr
    assert service.gone.wait(10)


@pytest.mark.parametrize(("n", "names"), [(1, ["cat.jpg"]), (2, ["cat-0.jpg", "cat-1.jpg"])])
def test_attach_saves_images_and_reports_as_generate_does(service, answer, tmp_path, n, names):
    answer(n=n)
    result = t2i("attach", "mine", "-o", str(tmp_path / "cat.jpg"), "--json", "--target", service.target)
    assert result.exit_code == 0, result.output
    assert service.requests == [pb.AttachRequest(request_id="mine")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads(result.stdout)["requestId"] == "mine"
    assert "Warning: sampling.width: 100 pixels became 96" in result.stderr


def test_cancel_sends_the_name_and_prints_nothing(service):
    service.answer(pb.CancelResponse())
    result = t2i("cancel", "mine", "--target", service.target)
    assert (result.exit_code, result.output) == (0, "")
    assert service.requests == [pb.CancelRequest(request_id="mine")]


@pytest.mark.parametrize("command", [("attach", "mine", "-o", "cat.jpg"), ("cancel", "mine")])
def test_an_unknown_job_exits_with_9(service, status, command):
    service.answer(status(grpc.StatusCode.NOT_FOUND, "no detached job is named mine here"))
    result = t2i(*command, "--target", service.target)
    assert result.exit_code == 9
    assert "Error: no detached job is named mine here" in result.stderr


@pytest.mark.parametrize(
    ("code", "detail", "exit_code", "words"),
    [
        ("INTERNAL", None, 1, "Error: words"),
        ("INVALID_ARGUMENT", None, 3, "Error: words"),
        (
            "INVALID_ARGUMENT",
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field="data.prompt", description="is blank"),
                    BadRequest.FieldViolation(field="parameter.n", description="is 9"),
                ]
            ),
            3,
            "\n  PROMPT (data.prompt): is blank\n  -n (parameter.n): is 9",
        ),
        ("RESOURCE_EXHAUSTED", RetryInfo(retry_delay=Duration(seconds=3)), 5, "words (try again in 3 s)"),
        ("RESOURCE_EXHAUSTED", None, 5, "Error: words"),
        ("DEADLINE_EXCEEDED", None, 6, "Error: words"),
        ("ALREADY_EXISTS", None, 10, "Error: words"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(service, status, tmp_path, code, detail, exit_code, words):
    service.answer(status(grpc.StatusCode[code], "words", *([detail] if detail else [])))
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_job_that_another_caller_cancels_has_the_exit_code_of_an_interrupt(service, status, tmp_path):
    queued = pb.StreamGenerateResponse(number=1, queued=pb.Queued())
    service.answer([queued, status(grpc.StatusCode.CANCELLED, "the job mine was cancelled by another call")])
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 130
    assert "Error: the job mine was cancelled by another call" in result.stderr


def test_a_negative_seed_is_an_invalid_request(service, status, tmp_path):
    service.answer(status(grpc.StatusCode.INVALID_ARGUMENT))
    result = t2i("generate", "cat", "--seed=-1", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 3
    assert "Error: --seed (parameter.seed): seed must be a whole number" in result.stderr


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("sampling.steps", "--steps (sampling.steps)"),
        ("sampling.guidanceScale", "--guidance-scale (sampling.guidanceScale)"),
        ("parameter.aspect-ratio", "--aspect-ratio (parameter.aspect-ratio)"),
        ("output.format", "--format (output.format)"),
        ("output.previewInterval", "--preview-interval (output.previewInterval)"),
        ("requestId", "--request-id (requestId)"),
        ("data.model", "data.model"),
        ("of.a.newer.server", "of.a.newer.server"),
    ],
)
def test_a_bad_field_is_shown_with_its_flag_if_it_has_one(service, status, tmp_path, field, shown):
    details = BadRequest(field_violations=[BadRequest.FieldViolation(field=field, description="is bad")])
    service.answer(status(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: is bad", details))
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.stderr == f"Error: {shown}: is bad\n"


def test_a_rejected_deadline_has_a_hint(service, status, tmp_path):
    message = "the deadline cannot be met: the last image would be ready in 3.0 s, even on an idle server"
    service.answer(status(grpc.StatusCode.DEADLINE_EXCEEDED, message))
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--timeout", "9", "--target", service.target)
    assert result.stderr == f"Error: {message}; give --timeout more seconds, or fewer --steps\n"


def test_a_taken_job_name_has_the_commands_that_help(service, status):
    service.answer(status(grpc.StatusCode.ALREADY_EXISTS, "another job has the name mine; use another requestId"))
    result = t2i("generate", "cat", "--detach", "--request-id", "mine", "--target", service.target)
    assert result.exit_code == 10
    end = f"end it with `t2i --target {service.target} cancel mine`"
    assert result.stderr == f"Error: another job has the name mine; {end}, or use another --request-id\n"


def test_model_sorts_sizes_from_tall_to_wide(service):
    sizes = {"16:9": (64, 36), "1:1": (64, 64), "3:4": (48, 64), "9:16": (36, 64)}
    service.answer(
        pb.GetModelResponse(
            sizes=[
                pb.GetModelResponse.Size(aspect_ratio=ratio, width=width, height=height)
                for ratio, (width, height) in sizes.items()
            ],
            environment=pb.Environment(hardware="a CPU", threads=1),
        )
    )
    result = t2i("model", "--target", service.target)
    assert result.exit_code == 0, result.output
    assert "9:16 36x64, 3:4 48x64, 1:1 64x64, 16:9 64x36" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.rstrip().endswith("a CPU, 1 thread")]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this machine has no /dev/full")
def test_a_full_disk_is_reported(service, answer, tmp_path):
    answer()
    (tmp_path / "cat.jpg").symlink_to("/dev/full")
    result = t2i("generate", "cat", "-o", str(tmp_path / "cat.jpg"), "--target", service.target)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr


def test_target_is_a_variable_or_an_option_before_or_after_the_command(service):
    service.health.set("", HealthCheckResponse.SERVING)
    assert t2i("health", "--target", service.target).exit_code == 0
    assert t2i("--target", service.target, "health").exit_code == 0
    assert t2i("health", T2I_TARGET=service.target).exit_code == 0
    assert t2i("health", "--target", service.target, T2I_TARGET="127.0.0.1:1").exit_code == 0


@pytest.mark.parametrize(("state", "exit_code"), [("SERVING", 0), ("NOT_SERVING", 4)])
def test_health_is_a_probe(service, state, exit_code):
    service.health.set("", HealthCheckResponse.ServingStatus.Value(state))
    result = t2i("health", "--target", service.target)
    assert (result.exit_code, result.stdout) == (exit_code, f"{state}\n")


def test_health_of_an_unknown_service_exits_with_4(service):
    result = t2i("health", "--service", "nobody", "--target", service.target)
    assert (result.exit_code, result.stdout) == (4, "SERVICE_UNKNOWN\n")


@pytest.mark.parametrize("command", [("health",), ("model",), ("generate", "cat", "-o", "cat.jpg")])
def test_an_unreachable_server_exits_with_4_and_is_named(command):
    result = t2i(*command, "--target", "127.0.0.1:1")
    assert result.exit_code == 4
    assert "Error: 127.0.0.1:1: " in result.stderr
    assert "Traceback" not in result.output


def test_ctrl_c_cancels_the_call_and_exits_with_130(service, tmp_path):
    service.answer([pb.StreamGenerateResponse(queued=pb.Queued()), service.hold])
    command = (sys.executable, "-m", "text_to_image_client", "--target", service.target, "generate", "cat")
    with subprocess.Popen([*command, "-o", str(tmp_path / "cat.jpg")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "queued\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "Cancelled.\n"
        assert process.wait(30) == 130
    assert service.gone.wait(10)


def test_run_rejects_invalid_input_before_it_starts_a_server():
    result = t2i("run", "-i", '{"prompt": "cat", "steps": 3}')
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "steps: is unknown" in result.stderr


def test_run_without_the_server_package_exits_with_7(monkeypatch):
    monkeypatch.setitem(sys.modules, "server", None)
    result = t2i("run", "-i", '{"prompt": "cat"}')
    assert result.exit_code == 7
    assert "not installed in this environment" in result.stderr


def test_run_prints_the_log_of_a_server_that_does_not_start():
    result = t2i("run", "-i", '{"prompt": "cat"}', T2I_BASE=os.devnull)
    assert result.exit_code == 7
    assert "Error: the service ended with status" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("text", [t2i("--help").stdout, README.read_text()], ids=["help", "README"])
def test_every_exit_code_is_documented(text):
    documented = {int(word) for line in text.splitlines() if (word := line.strip("| ").split(" ")[0]).isdigit()}
    assert documented == {0, 1, 2, *EXIT_CODES.values()}
