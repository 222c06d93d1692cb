"""Errors of calls: each has a status, and details as Google defines them."""

import grpc
import pytest
from google.rpc import error_details_pb2

from server.api import errors, images
from server.engine import events


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest([errors.Violation("data.prompt", "is required")]), grpc.StatusCode.INVALID_ARGUMENT),
        (events.ResourceExhausted("full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Loading("loading"), grpc.StatusCode.UNAVAILABLE),
        (events.Draining("draining"), grpc.StatusCode.UNAVAILABLE),
        (events.DeviceUnavailable("about to end"), grpc.StatusCode.UNAVAILABLE),
        (events.DeviceLost("hangs"), grpc.StatusCode.ABORTED),
        (events.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (events.Cancelled("gone"), grpc.StatusCode.CANCELLED),
        (events.ModelFailed("broken"), grpc.StatusCode.INTERNAL),
        (errors.UnknownJob("who?"), grpc.StatusCode.NOT_FOUND),
        (errors.JobAlreadyExists("taken"), grpc.StatusCode.ALREADY_EXISTS),
        (errors.InternalError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_every_error_has_its_status(error: Exception, code: grpc.StatusCode):
    assert errors.status_of(error).code == code.value[0]


def test_invalid_requests_and_a_full_queue_have_googles_error_details():
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    status = errors.status_of(errors.InvalidRequest([errors.Violation("data.prompt", "is required")]))
    assert status.details[0].Unpack(bad)
    assert bad.field_violations[0].field == "data.prompt"
    assert errors.status_of(events.ResourceExhausted("full", 2.5)).details[0].Unpack(retry)
    assert retry.retry_delay.ToSeconds() == 2


def test_a_lost_device_has_googles_error_info():
    lost = error_details_pb2.ErrorInfo()
    assert errors.status_of(events.DeviceLost("hangs")).details[0].Unpack(lost)
    assert (lost.reason, lost.domain) == ("DEVICE_LOST", "text_to_image.v1")


def test_every_error_that_callers_may_see_has_a_status():
    kinds = {images.ImageTooLarge, *errors.CallError.__subclasses__(), *events.EngineError.__subclasses__()}
    assert kinds == errors.STATUS.keys()
