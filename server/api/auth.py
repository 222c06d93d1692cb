"""Tokens: they admit calls and name their callers."""

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from server.api.errors import Unauthenticated, abort
from server.api.standard_services import OPEN_METHODS
from server.api.watched_files import WatchedFiles
from server.domain import Caller
from server.errors import CredentialsError

log = logging.getLogger(__name__)

_OPEN_METHODS = {
    *OPEN_METHODS,
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/model.model.v1alpha.ModelPublicService/Liveness",
    "/model.model.v1alpha.ModelPublicService/Readiness",
}

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


class TokenAuthInterceptor(grpc.aio.ServerInterceptor):
    """Rejects calls without a known token before their message is read, and notes the caller of the others.

    The constructor raises CredentialsError.
    """

    def __init__(self, path: Path) -> None:
        self.files = WatchedFiles("tokens", partial(_parse, path), path)

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if handler_call_details.method not in _OPEN_METHODS:
            try:
                _caller.set(self._authenticate(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return grpc.stream_stream_rpc_method_handler(partial(_reject, error))
        return await continuation(handler_call_details)

    def _authenticate(self, metadata: Any) -> Caller:
        given = [value for key, value in metadata or () if key == "authorization"]
        if not given:
            raise Unauthenticated('a token is needed here: send it as metadata, "authorization: Bearer TOKEN"')
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token:
            raise Unauthenticated('the metadata must have one "authorization: Bearer TOKEN"')
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, caller in self.files.content():  # all of them, so that the time reveals nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("this token is not known here")
        return found


async def _reject(error: Unauthenticated, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    log.info("rejected a call from %s without a known token", context.peer())
    await abort(context, error)


def _parse(path: Path, content: bytes) -> list[tuple[bytes, Caller]]:
    """Return the digests of tokens and their callers, from lines of NAME SHA256 [jobs=N] [priority=N]."""
    tokens: list[tuple[bytes, Caller]] = []
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if not (words := line.partition("#")[0].strip()):
            continue
        match = re.fullmatch(
            r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9A-Fa-f]{64})"
            r"(\s+jobs=(?P<jobs>[1-9]\d{0,3}))?(\s+priority=(?P<priority>-?[0-2]))?",
            words,
        )
        if match is None:
            raise CredentialsError(
                f"line {number} of {path} must be NAME SHA256, then jobs=1 to 9999 and priority=-2 to 2 if at all"
            )
        digest = bytes.fromhex(match["digest"])
        if any(digest == other for other, _ in tokens):
            raise CredentialsError(f"line {number} of {path} has the token of an earlier line")
        limits = (int(match[limit]) if match[limit] else None for limit in ("jobs", "priority"))
        tokens.append((digest, Caller(match["name"], match["name"], *limits)))
    if not tokens:
        raise CredentialsError(f"{path} has no tokens")
    return tokens


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Return the caller: the name of its token or, where calls need none, its host."""
    return _caller.get() or Caller(host_of(context.peer()))


def host_of(peer: str) -> str:
    """Return the host in gRPC's "ipv4:HOST:PORT". All calls over Unix sockets have one caller."""
    return peer.partition(":")[0] if peer.startswith("unix") else peer.rpartition(":")[0]
