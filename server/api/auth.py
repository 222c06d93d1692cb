"""Who may come in, and what a connection may do: TLS, tokens that name their callers, and limits on connections.

Certificates and tokens are read anew when their files change, without a restart. A change that cannot be used is told
in the log, and what was there before stays: a slip while files are exchanged must not shut everybody out.
"""

import hashlib
import hmac
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from server.api.errors import Unauthenticated, abort
from server.api.standard_services import OPEN_METHODS
from server.domain import Caller
from server.errors import CredentialsError
from server.settings import Settings

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_OPEN = {
    *OPEN_METHODS,
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/model.model.v1alpha.ModelPublicService/Liveness",
    "/model.model.v1alpha.ModelPublicService/Readiness",
}

_MOST_BYTES = 16 * 2**20  # of a file of certificates or tokens
_STREAM_SECONDS = 86_400  # what a call may last beyond its connection's age: no job should need as long
_ANSWER_SECONDS = 20.0  # at most, for a peer's answer to a ping, and for its first bytes
_PING_SECONDS = 10  # between pings of a client: gRPC's own default would cut off those that look after a long call
_PINGS = 2  # too early ones, after which the connection is closed
METADATA_BYTES = 16 * 1024
"""How much metadata a call may have, by HPACK's count: names, values, and 32 bytes for each."""

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


class Files(Generic[_T]):
    """What some files hold, read anew when they have changed. The first reading raises CredentialsError."""

    def __init__(self, what: str, read: Callable[..., _T], *paths: Path) -> None:
        self._what = what
        self._read = read
        self._paths = paths
        self._seen = self._stamps()
        self._held = self._read_all()

    def held(self) -> _T:
        """What the files hold by now. Costs a `stat` of each while they are unchanged."""
        if self._stamps() != self._seen:
            self.reload()
        return self._held

    def reload(self) -> None:
        """Read the files again, changed or not, and say in the log what came of it."""
        self._seen = self._stamps()
        try:
            self._held = self._read_all()
        except CredentialsError as error:
            log.warning("the changed %s cannot be used, those before stay: %s", self._what, error)
        else:
            log.info("the %s were read anew", self._what)

    def _read_all(self) -> _T:
        try:
            held = self._read(*(_content(path) for path in self._paths))
        except OSError as error:
            raise CredentialsError(f"cannot read {error.filename}: {error.strerror}") from error
        if self._stamps() != self._seen:  # the next call reads what it was changed to
            raise CredentialsError("they change while they are being read")
        return held

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _content(path: Path) -> bytes:
    """Return the file, of which a device such as /dev/zero has too much. Raises OSError and CredentialsError."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise CredentialsError(
            f"{path} has more than {_MOST_BYTES} bytes, which no file of certificates or tokens needs"
        )
    return content


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What differs when a file was written or exchanged, by renaming or, as Kubernetes does, behind a link."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# TLS.


def certificates_of(settings: Settings) -> "Files[grpc.ServerCertificateConfiguration] | None":
    """The files of TLS that the settings name, None for none. Raises CredentialsError."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    paths = [settings.tls_certificate, settings.tls_key]
    if settings.tls_client_ca is not None:
        paths.append(settings.tls_client_ca)
    return Files("certificates", partial(_certificates, paths), *paths)


def server_credentials(
    files: "Files[grpc.ServerCertificateConfiguration] | None", with_clients: bool
) -> grpc.ServerCredentials | None:
    """TLS with these files, None for none. Each new connection gets the certificate that is there by then.

    `with_clients`: whether clients must have a certificate of the authority in the files.
    """
    if files is None:
        return None
    latest = first = files.held()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal latest
        before, latest = latest, files.held()
        return None if latest is before else latest  # a new one costs gRPC the parsing

    return grpc.dynamic_ssl_server_credentials(
        first,
        changed,  # type: ignore[arg-type]  # the stubs know nothing of None, for no change
        require_client_authentication=with_clients,
    )


def _certificates(
    paths: Sequence[Path], certificate: bytes, key: bytes, authority: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """What gRPC needs of these. It would only notice in a handshake that they cannot be used, hence the trial."""
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        trial.load_cert_chain(paths[0], paths[1], password="")  # without one, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CredentialsError(f"{paths[1]} is not the key of {paths[0]}") from error
        raise CredentialsError(
            f"{paths[0]} and {paths[1]} must be a certificate and its unencrypted key, in PEM"
        ) from error
    if authority is not None:
        try:
            trial.load_verify_locations(paths[2])
        except ssl.SSLError as error:
            raise CredentialsError(f"{paths[2]} must be certificates of authorities, in PEM") from error
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


# Tokens.


class TokenAuthInterceptor(grpc.aio.ServerInterceptor):
    """Turns calls without a known token away before their message is read, and says who makes the others.

    Raises CredentialsError.
    """

    def __init__(self, path: Path) -> None:
        self.files = Files("tokens", partial(_tokens, path), path)

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if handler_call_details.method not in _OPEN:
            try:
                _caller.set(self._find(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return grpc.stream_stream_rpc_method_handler(partial(_refuse, error))
        return await continuation(handler_call_details)

    def _find(self, metadata: Any) -> Caller:
        given = [value for key, value in metadata or () if key == "authorization"]
        if not given:
            raise Unauthenticated('a token is needed here: send it as metadata, "authorization: Bearer TOKEN"')
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token:
            raise Unauthenticated('the metadata must have one "authorization: Bearer TOKEN"')
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, caller in self.files.held():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated("this token is not known here")
        return found


async def _refuse(error: Unauthenticated, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    log.info("a call from %s without a known token was turned away", context.peer())
    await abort(context, error)


def _tokens(path: Path, content: bytes) -> list[tuple[bytes, Caller]]:
    """The digests of tokens and whose they are, from lines of NAME SHA256 [jobs=N] [priority=N]."""
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
    """Who calls: the name of the token or, where none are needed, the host."""
    return _caller.get() or Caller(host_of(context.peer()))


def host_of(peer: str) -> str:
    """The host in gRPC's "ipv4:HOST:PORT". Unix sockets are one caller."""
    return peer.partition(":")[0] if peer.startswith("unix") else peer.rpartition(":")[0]


# Connections.


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """What gRPC lets a connection do: enough for every client that means well, and no more."""
    answer = min(_ANSWER_SECONDS, settings.keepalive_seconds)
    return [
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # Between a soft and a hard limit gRPC refuses calls at random, so they are one.
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_connection_age_ms", _ms(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _ms(_STREAM_SECONDS)),
        # A peer that is gone without a word is noticed by its silence, whether calls are under way or not.
        ("grpc.keepalive_time_ms", _ms(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(answer)),
        ("grpc.http2.ping_timeout_ms", _ms(answer)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.settings_timeout", _ms(answer)),
        ("grpc.server_handshake_timeout_ms", _ms(answer)),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(_PING_SECONDS)),
        ("grpc.http2.max_ping_strikes", _PINGS),
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
