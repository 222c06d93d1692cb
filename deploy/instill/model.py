"""The text-to-image service as a model of Instill Core: `instill build` puts it into an image, Ray Serve runs it there.

Instill's SDK pins protobuf 4 and numpy 1, and the service needs later ones. So each replica runs the service as it is,
`python -m server --instill`, in a process of its own with the packages in packages/ alone, and hands calls on to it,
message for message; what a call ends with comes back the same way.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from instill.helpers.ray_config import InstillDeployable, instill_deployment
from instill.protogen.model.ray.v1alpha import user_defined_pb2 as user_defined  # its classes cannot be pickled
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

HERE = Path(__file__).resolve().parent
# As `git clone` leaves them next to this file; without the first, the embedded ensemble is served.
BASE, REFINER = HERE / "stable-diffusion-xl-base-1.0", HERE / "stable-diffusion-xl-refiner-1.0"

METHOD = "/model.ray.v1alpha.UserDefinedService/__call__"
HANDED_ON = ("authorization", "traceparent", "x-request-id")
# Without the last, gRPC asks the proxy that http_proxy names for the service in this very container.
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def start(ready_file: Path) -> "subprocess.Popen[bytes]":
    """Start the service on a free port of this machine, written to the file. It ends with this process."""
    experts = [f"--base={BASE}"] * BASE.exists() + [f"--refiner={REFINER}"] * (BASE.exists() and REFINER.exists())
    python = (sys.executable, "-S", "-P", "-m", "server")  # -S: what the SDK has installed is not for it
    flags = ("--instill", "--listen=127.0.0.1:0", f"--ready-file={ready_file}", *experts)
    return subprocess.Popen(
        ["setpriv", "--pdeathsig=TERM", *python, *flags], env=os.environ | {"PYTHONPATH": str(HERE / "packages")}
    )


@instill_deployment
class TextToImage:
    """One replica, with a device and a service of its own. It is made when its service is ready to serve."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t2i-")
        ready_file = Path(self._folder.name, "ready")
        self._service = start(ready_file)
        while not ready_file.exists():
            self._check_service()
            time.sleep(0.1)
        channel = grpc.aio.insecure_channel(ready_file.read_text().strip(), options=OPTIONS)
        self._call = channel.unary_unary(
            METHOD, user_defined.CallRequest.SerializeToString, user_defined.CallResponse.FromString
        )

    def __del__(self) -> None:
        self._service.terminate()  # it lets running calls end
        self._service.wait()
        self._folder.cleanup()

    async def check_health(self) -> None:
        """Asked by Ray time and again: a replica that fails is replaced."""
        self._check_service()

    def _check_service(self) -> None:
        if (code := self._service.poll()) is not None:
            raise RuntimeError(f"the service has ended with exit code {code}; its last words are in this replica's log")

    async def __call__(self, request: Any, grpc_context: Any = None) -> Any:
        """Answer a CallRequest of Core over gRPC, or a request of `instill run` over HTTP, as Starlette's Request."""
        if isinstance(request, Request):
            return await self._answer_http(await request.json())
        metadata = [(key, value) for key, value in grpc_context.invocation_metadata() if key in HANDED_ON]
        try:
            return await self._call(request, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            # An exception would be INTERNAL to Ray, with a traceback for the caller.
            grpc_context.set_code(error.code())
            grpc_context.set_details(error.details())
            grpc_context.set_trailing_metadata(list(error.trailing_metadata()))
            return user_defined.CallResponse()

    async def _answer_http(self, given: dict[str, Any]) -> Response:
        """Return the list of outputs for one input, {"prompt"} or in full."""
        task_input = given if "data" in given else {"data": given}
        request = json_format.ParseDict({"task_inputs": [task_input]}, user_defined.CallRequest())
        try:
            response = await self._call(request)
        except grpc.aio.AioRpcError as error:
            return JSONResponse({"message": error.details()}, HTTP_STATUS.get(error.code(), 500))
        return JSONResponse([json_format.MessageToDict(each) for each in response.task_outputs])


entrypoint = InstillDeployable(TextToImage).get_deployment_handle()
