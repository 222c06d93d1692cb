"""What a person with grpcurl sees: the real tool, reflection on, no proto file at hand.

What every client sees is in test_compatibility.py.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path

from grpcurl import grpcurl, messages
from serving import PATIENCE, SERVICE


def test_list_and_describe_show_the_contract(server):
    assert set(grpcurl(server, "list").stdout.split()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    }
    described = grpcurl(server, "describe", SERVICE).stdout
    for name in ("Generate", "StreamGenerate", "Attach", "Cancel", "GetModel"):
        assert f"rpc {name} (" in described
    assert 'json_name = "negative-prompt"' in grpcurl(server, "describe", "text_to_image.v1.TaskParameter").stdout


def test_generate_returns_instills_json_with_an_image(server):
    asked = {"data": {"prompt": "cat napping"}, "parameter": {"aspect-ratio": "1:1", "n": 1, "seed": 1}}
    answer = grpcurl(server, f"{SERVICE}/Generate", data=json.dumps(asked))
    assert answer.returncode == 0, answer.stderr
    (choice,) = json.loads(answer.stdout)["data"]["choices"]
    assert choice["finish-reason"] == "success"
    head, image = choice["image"].split(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(image).startswith(b"\xff\xd8\xff\xe0\x00\x10JFIF")


def test_the_request_printed_with_an_image_reproduces_it(server):
    asked = {"data": {"prompt": 'a "red" apple\n🍎'}, "parameter": {"n": 2}, "sampling": {"steps": 2, "width": 67}}
    asked["sampling"]["height"] = 128
    printed = json.loads(grpcurl(server, f"{SERVICE}/Generate", data=json.dumps(asked)).stdout)
    for image, choice in zip(printed["metadata"]["images"], printed["data"]["choices"], strict=True):
        again = json.loads(grpcurl(server, f"{SERVICE}/Generate", data=json.dumps(image["request"])).stdout)
        assert again["data"]["choices"] == [choice]
        assert again["metadata"]["images"] == [image]


def test_t2i_reproduces_an_image_from_a_printed_response(server, tmp_path: Path):
    asked = {"data": {"prompt": "pizza"}, "parameter": {"n": 2}, "sampling": {"steps": 2}}
    printed = grpcurl(server, f"{SERVICE}/Generate", data=json.dumps(asked)).stdout
    (tmp_path / "answer.json").write_text(printed)
    flags = ("--target", server.target, "--like", tmp_path / "answer.json", "-o", tmp_path / "pizza.jpg", "--strict")
    again = subprocess.run(
        [sys.executable, "-m", "text_to_image_client", "generate", *flags],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    for index, choice in enumerate(json.loads(printed)["data"]["choices"]):
        _, image = choice["image"].split(",")
        assert (tmp_path / f"pizza-{index}.jpg").read_bytes() == base64.b64decode(image)


def test_a_detached_job_is_followed_and_cancelled_by_its_name(server):
    asked = {"data": {"prompt": "pizza"}, "sampling": {"steps": 5}, "requestId": "curled"}
    asked["onDisconnect"] = "ON_DISCONNECT_DETACH"
    begun = messages(grpcurl(server, f"{SERVICE}/StreamGenerate", data=json.dumps(asked)).stdout)
    attach = f"{SERVICE}/Attach"
    assert messages(grpcurl(server, attach, data='{"requestId": "curled"}').stdout) == begun
    assert messages(grpcurl(server, attach, data='{"requestId": "curled", "after": 9}').stdout) == begun[9:]
    assert [event["number"] for event in begun] == [str(number + 1) for number in range(len(begun))]
    assert json.loads(grpcurl(server, f"{SERVICE}/Cancel", data='{"requestId": "curled"}').stdout) == {}
    assert "Code: NotFound" in grpcurl(server, attach, data='{"requestId": "curled"}').stderr


def test_a_bad_request_prints_every_violation(server):
    asked = {"data": {"prompt": ""}, "parameter": {"n": 99}}
    answer = grpcurl(server, f"{SERVICE}/Generate", data=json.dumps(asked))
    assert answer.returncode != 0
    assert "Code: InvalidArgument" in answer.stderr
    for field in ("data.prompt", "parameter.n"):
        assert f'"field":"{field}"' in answer.stderr


def test_reflection_can_be_turned_off(start_server):
    server = start_server("--no-reflection")
    answer = grpcurl(server, "list")
    assert answer.returncode != 0
    assert "does not support the reflection API" in answer.stderr
