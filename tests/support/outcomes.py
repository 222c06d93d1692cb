"""How calls end, and that their errors reveal nothing internal."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import PATIENCE, ROOT

from server.api.standard_services import OPEN_METHODS
from text_to_image_client.v1 import text_to_image_pb2 as pb

METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["TextToImageService"].methods]
OPEN = [each for each in OPEN_METHODS if not each.endswith("/List")]  # whose empty message means the same as Check's
ONE_STEP = {"sampling": {"steps": 1}}
PROMPT = "a heron that nobody may read of"


def outcome(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Read all messages of a call and return its status and details."""
    try:
        answer = call()
        if isinstance(answer, Iterator):
            list(answer)
    except grpc.RpcError as error:
        details = error.details() or ""
        assert_reveals_nothing_internal(details)
        return error.code(), details
    return grpc.StatusCode.OK, ""


def code(call: Callable[[], object]) -> grpc.StatusCode:
    """Return the status of a call."""
    return outcome(call)[0]


def assert_reveals_nothing_internal(text: str) -> None:
    """Assert that a text for callers has no path, class, prompt or traceback."""
    for leak in (str(ROOT), sys.prefix, "Traceback", ".py", "Error(", "object at 0x", PROMPT):
        assert leak not in text


def check(open_channel: grpc.Channel, service: str = "") -> int:
    """Return the health of a service."""
    stub: Any = health_pb2_grpc.HealthStub(open_channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE).status
    return status
