"""The client, once for threads and once for asyncio: twins over the request building and message reading of _messages.

Retries, deadlines and cancellation are gRPC's own; this file only sets them.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from ._exceptions import NotFound, ServerError, translated
from ._messages import MAX_MESSAGE_BYTES, build_request, read_event, read_model, read_result
from ._types import Done, Event, GenerateOptions, Image, ModelInfo, Result, ServingStatus
from .v1 import text_to_image_pb2 as pb
from .v1.text_to_image_pb2_grpc import TextToImageServiceStub

if TYPE_CHECKING:
    from .v1.text_to_image_pb2_grpc import TextToImageServiceAsyncStub

__all__ = ["TLS", "AsyncEventStream", "AsyncTextToImage", "EventStream", "TextToImage"]

MAX_RETRIES = 4  # gRPC makes at most five attempts, whatever it is told
_MAX_RECONNECT_MS = 5000  # a server that comes back at its address has its share of calls soon, not in two minutes


@dataclass(frozen=True)
class TLS:
    """How to make sure of the service, and it of this client. All are PEM files, read when the client is made.

    `authority` has the certificates to trust, by default those that gRPC comes with; `certificate` and `key` are this
    client's own, for a service that asks for them.
    """

    authority: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for a certificate without its key."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        authority, key, certificate = (
            Path(file).read_bytes() if file is not None else None
            for file in (self.authority, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(authority, key, certificate)


class TextToImage:
    """A text-to-image service at `target`, "host:port", for threads. Many threads may share one.

    with TextToImage("127.0.0.1:50051") as client:
        client.generate("cat napping", seed=1).images[0].save("cat.jpg")

    `timeout` in seconds holds for every call that does not set its own; None waits as long as it takes. `retries`, 0
    to 4, are made when the service is unavailable, with exponential backoff, about 3 seconds in all, and never once an
    answer has begun; with 0 no call is ever sent twice. `tls` is for a service with TLS, `token` for one that asks who
    calls; over a network, a token needs TLS, or whoever listens has it. Every call raises the errors of
    `TextToImageError`; nobody listening at `target` is `Unavailable`.

    `round_robin` is for a target of several addresses, such as "dns:///NAME:PORT" with a headless Service's name or
    "ipv4:HOST:PORT,HOST:PORT": calls go in turn to those whose health is SERVING, so that none meets a server that
    loads or drains. Detached jobs are to be had from their own server alone, so follow them without it.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        retries: int = MAX_RETRIES,
        tls: TLS | None = None,
        token: str | None = None,
        round_robin: bool = False,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._metadata = _metadata(token)
        options = _channel_options(retries, round_robin)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options)
        self._service = TextToImageServiceStub(self._channel)
        self._health: Any = HealthStub(self._channel)  # the stubs of types-grpcio-health-checking know no methods

    def generate(self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Result:
        """Draw `prompt` and wait for all its images. `GenerateOptions` has the options, all optional."""
        request = build_request(prompt, options)
        with translated(self.target):
            return read_result(self._service.Generate(request, **self._call_options(timeout)))

    def stream(self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> "EventStream":
        """Draw `prompt` and follow it: an iterator over events, the last of which is `Done`.

        The call begins at once. Closing the iterator, leaving its `with` block or dropping it cancels the call, and
        the device is free within one step, unless the request is to be detached.
        """
        request = build_request(prompt, options)
        with translated(self.target):
            return EventStream(self._service.StreamGenerate(request, **self._call_options(timeout)), self.target)

    def attach(self, request_id: str, after: int = 0, *, timeout: float | None = None) -> "EventStream":
        """Follow a detached job: its events after number `after`, those that have happened and those that will.

        `timeout` is the stream's alone. `Done.result` has those images whose events came after `after`. A job that
        failed raises its error again; `NotFound` is one that is not known here, or no longer kept.
        """
        request = pb.AttachRequest(request_id=request_id, after=after)
        with translated(self.target):
            call = self._service.Attach(request, **self._call_options(timeout))
            return EventStream(call, self.target, after)

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a detached job, if it still runs, and have it forgotten in either case. Raises `NotFound`."""
        request = pb.CancelRequest(request_id=request_id)
        with translated(self.target):
            self._service.Cancel(request, **self._call_options(timeout))

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served, with its defaults and limits. `Unavailable` until the model is loaded."""
        with translated(self.target):
            return read_model(self._service.GetModel(pb.GetModelRequest(), **self._call_options(timeout)))

    def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """The state of `service`, "" for the whole server, by grpc.health.v1. Never retried."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            with translated(self.target):
                return _serving_status(self._health.Check(request, **self._call_options(timeout)))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN  # which is how grpc.health.v1 answers Check

    def close(self) -> None:
        """Close the connection; calls still under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call_options(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}


class AsyncTextToImage:
    """The twin of `TextToImage` for asyncio: the same calls, awaited, and `async for` over a stream.

    async with AsyncTextToImage("127.0.0.1:50051") as client:
        result = await client.generate("cat napping", seed=1)

    It belongs to the event loop that makes its first call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        retries: int = MAX_RETRIES,
        tls: TLS | None = None,
        token: str | None = None,
        round_robin: bool = False,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._metadata = _metadata(token)
        self._options = _channel_options(retries, round_robin)
        self._credentials = None if tls is None else tls.credentials()
        self._channel: grpc.aio.Channel | None = None

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """As `TextToImage.generate`. Cancelling the task cancels the call."""
        request = build_request(prompt, options)
        with translated(self.target):
            return read_result(await self._service().Generate(request, **self._call_options(timeout)))

    def stream(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> "AsyncEventStream":
        """As `TextToImage.stream`. Cancelling the task that reads the stream cancels the call, too."""
        request = build_request(prompt, options)
        return AsyncEventStream(self._service().StreamGenerate(request, **self._call_options(timeout)), self.target)

    def attach(self, request_id: str, after: int = 0, *, timeout: float | None = None) -> "AsyncEventStream":
        """As `TextToImage.attach`."""
        request = pb.AttachRequest(request_id=request_id, after=after)
        call = self._service().Attach(request, **self._call_options(timeout))
        return AsyncEventStream(call, self.target, after)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """As `TextToImage.cancel`."""
        request = pb.CancelRequest(request_id=request_id)
        with translated(self.target):
            await self._service().Cancel(request, **self._call_options(timeout))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """As `TextToImage.model`."""
        with translated(self.target):
            return read_model(await self._service().GetModel(pb.GetModelRequest(), **self._call_options(timeout)))

    async def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """As `TextToImage.health`."""
        health: Any = HealthStub(self._open())
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            with translated(self.target):
                return _serving_status(await health.Check(request, **self._call_options(timeout)))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN

    async def aclose(self) -> None:
        """Close the connection; calls still under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:  # a channel of grpc.aio is tied to the loop running when it is made
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        return self._channel

    def _service(self) -> "TextToImageServiceAsyncStub":
        return cast("TextToImageServiceAsyncStub", TextToImageServiceStub(self._open()))

    def _call_options(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": self._metadata}


class EventStream(Iterator[Event]):
    """The events of one request as they happen. A context manager; leaving it early cancels the call.

    `number` is that of the newest event so far: where `attach` goes on, should the connection break.
    """

    def __init__(self, call: Any, target: str, after: int = 0) -> None:
        self.number = after
        self._call = call
        self._target = target
        self._images: dict[int, Image] = {}
        self._complete = after > 0  # there may be nothing after the event that was last heard

    def __next__(self) -> Event:
        with translated(self._target):
            for message in self._call:
                self.number = message.number
                event = read_event(message, self._images)
                if event is not None:
                    self._complete = isinstance(event, Done)
                    return event
        _check_complete(self._complete)
        raise StopIteration

    def close(self) -> None:
        """Cancel the call if it is still under way."""
        self._call.cancel()

    def __del__(self) -> None:
        self.close()  # a loop that is broken out of drops its iterator without a word

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncEventStream(AsyncIterator[Event]):
    """The twin of `EventStream` for asyncio."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[Any, Any]", target: str, after: int = 0) -> None:
        self.number = after
        self._call = call
        self._target = target
        self._images: dict[int, Image] = {}
        self._complete = after > 0  # there may be nothing after the event that was last heard

    async def __anext__(self) -> Event:
        with translated(self._target):
            while (read := await self._call.read()) is not grpc.aio.EOF:
                message = cast("pb.StreamGenerateResponse", read)
                self.number = message.number
                event = read_event(message, self._images)
                if event is not None:
                    self._complete = isinstance(event, Done)
                    return event
        _check_complete(self._complete)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the call if it is still under way."""
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()  # a loop that is broken out of drops its iterator without a word

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    if token is None:
        return ()
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("a token has visible ASCII characters only")  # gRPC would say so with the token in its words
    return (("authorization", f"Bearer {token}"),)


def _channel_options(retries: int, round_robin: bool) -> list[tuple[str, Any]]:
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(f"retries must be 0 to {MAX_RETRIES}, not {retries}")
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    service = pb.DESCRIPTOR.services_by_name["TextToImageService"].full_name
    config: dict[str, Any] = {}
    if retries:
        # Health checks are left out: a probe wants to know what is, not what may be in three seconds.
        policy = {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config["methodConfig"] = [{"name": [{"service": service}], "retryPolicy": policy}]
    else:
        # Nor those that gRPC makes of its own where a call did not get out: of calls that began as a server ended, one
        # in some hundred never came back from them, whatever its deadline (grpcio 1.85.1).
        options.append(("grpc.enable_retries", 0))
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": service}
        options.append(("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS))
    if config:
        options.append(("grpc.service_config", json.dumps(config)))
    return options


def _serving_status(response: health_pb2.HealthCheckResponse) -> ServingStatus:
    return ServingStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _check_complete(complete: bool) -> None:
    if not complete:
        raise ServerError("the stream ended before its `done` event", grpc.StatusCode.INTERNAL)
