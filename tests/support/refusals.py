"""Read the status and the field violations of a call that is refused."""

from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, dict[str, str]]:
    """The status, and what is said of each field."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    bad = error_details_pb2.BadRequest()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # a call, too
    if status is not None and status.details:
        status.details[0].Unpack(bad)
    return caught.value.code(), {each.field: each.description for each in bad.field_violations}
