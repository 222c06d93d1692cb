"""The life of a server process: open the ports, load, warm up, serve, drain, stop. runtime.py has what it serves.

Health is NOT_SERVING from the opening of the port until the model has generated a first image, and again from the
signal that ends the server, while running calls finish.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import stat
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.api import addresses, instill, standard_services, tls
from server.api.connections import connection_options
from server.api.decode_errors import DecodeErrorInterceptor
from server.api.instill import InstillServicer, ModelPublicServicer
from server.api.open_inference import OpenInferenceServicer
from server.api.service_names import INSTILL, INSTILL_PUBLIC, KSERVE, SERVICE
from server.api.standard_services import HEALTH, HealthServicer
from server.engine.interface import AnyServedModel
from server.errors import BindError, DeviceHung, ReadyFileError
from server.runtime import Runtime
from server.servicer import TextToImageServicer
from server.settings import Settings
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from server.stubs.model_model_v1alpha import model_public_pb2_grpc as public_grpc
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

# After the grace period, for calls to receive their status and for connections to close.
_CALLS_SECONDS, _CONNECTIONS_SECONDS = 2.0, 0.5


class Lifecycle:
    """A server process from start to stop. `load` loads the model and runs on the device thread.

    Raises CredentialsError, ContentFilterError, or the error of a custom content filter.
    """

    def __init__(self, settings: Settings, load: Callable[[], AnyServedModel]) -> None:
        self._settings = settings
        self._runtime = Runtime(settings, load)
        self._frontend = self._runtime.frontend
        self._certificates = tls.load_certificates(settings)
        self._credentials = tls.server_credentials(self._certificates, settings.tls_client_ca is not None)
        self._has_terminal = _terminal_is_there()
        # Without the first option, two processes on one port silently share its connections. The second: the contract
        # bounds a message by its request.
        own = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_channelz", int(settings.channelz)),
        ]
        if settings.instill:
            own.append(("grpc.max_receive_message_length", instill.MESSAGE_BYTES))
        self._options = [*own, *connection_options(settings)]
        self._grpc = grpc.aio.server(interceptors=self._runtime.interceptors, options=self._options)
        self._servers = [self._grpc]
        others = {KSERVE: settings.kserve, INSTILL: settings.instill, INSTILL_PUBLIC: settings.instill}
        self._services = (SERVICE, *(name for name, is_on in others.items() if is_on))
        self._health = HealthServicer(("", *self._services))
        self.device_is_busy = False
        """Whether a model call or compiling still ran when everything else had stopped."""
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()

    async def serve(self) -> None:
        """Serve until SIGTERM, SIGINT or a hang-up of the terminal; a second SIGTERM or SIGINT ends the grace period.

        Raises BindError, ReadyFileError, WarmUpError, DeviceHung, or the error of loading.
        """
        self._try_ready_file()
        self._remove_ready_file()  # a killed server's names a port that is no longer its own
        loop = asyncio.get_running_loop()
        for number, act in (
            (signal.SIGTERM, self._on_signal),
            (signal.SIGINT, self._on_signal),
            (signal.SIGHUP, self._on_hangup),
        ):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # set by nohup
                # Not the loop's handlers, which end with it: a later signal must not change the exit code.
                signal.signal(number, partial(_call_from_signal, loop, act))
        self._runtime.serve_metrics()
        address = await self._open_port()
        try:
            await self._unless_stopped(self._get_ready(address))
            await self._unless_stopped(self._watch_device())
            await self._drain()
        finally:
            await self._stop()

    def _on_signal(self) -> None:
        (self._hurrying if self._stopping.is_set() else self._stopping).set()

    def _on_hangup(self) -> None:
        """Drain if the server's terminal has hung up, else reload tokens and certificates."""
        if self._has_terminal and not _terminal_is_there():
            log.info("SIGHUP: the terminal is gone")
            self._stopping.set()  # a second SIGHUP does not hurry: both the kernel and the shell send one
            return
        files = [each for each in (self._runtime.tokens, self._certificates) if each is not None]
        log.info("SIGHUP: %s", "reloading" if files else "no tokens or certificates to reload")
        for each in files:
            each.reload()

    async def _open_port(self) -> str:
        pb_grpc.add_TextToImageServiceServicer_to_server(
            TextToImageServicer(self._frontend, self._settings.slow_reader_seconds), self._grpc
        )
        if self._settings.kserve:
            oip_grpc.add_GRPCInferenceServiceServicer_to_server(OpenInferenceServicer(self._frontend), self._grpc)
        if self._settings.instill:
            user_defined_grpc.add_UserDefinedServiceServicer_to_server(InstillServicer(self._frontend), self._grpc)
            public_grpc.add_ModelPublicServiceServicer_to_server(ModelPublicServicer(self._frontend), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        await self._set_health(HealthCheckResponse.NOT_SERVING)
        if self._settings.reflection:
            standard_services.add_reflection((*self._services, HEALTH), self._grpc)
        if self._settings.channelz:
            channelz.add_channelz_servicer(self._grpc)
        address = _bind(self._grpc, self._settings.listen, self._credentials)
        if self._settings.health_listen is not None:
            probed = grpc.aio.server(interceptors=[DecodeErrorInterceptor()], options=self._options)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, probed)
            try:
                log.info("health checks on %s", _bind(probed, self._settings.health_listen, None))
            except BindError:
                addresses.remove_files(address)
                raise
            self._servers.append(probed)
        for each in self._servers:
            await each.start()
        log.info("listening on %s; loading the model", address)
        return address

    async def _get_ready(self, address: str) -> None:
        info = await self._runtime.open()
        await self._set_health(HealthCheckResponse.SERVING)
        self._write_ready_file(address)
        log.info("serving %s on %s", info.name, address)

    async def _watch_device(self) -> None:
        """Raise DeviceHung if a model call does not return; every call has ended with an error by then."""
        try:
            await self._runtime.watch_device()
        except DeviceHung:
            await self._set_health(HealthCheckResponse.NOT_SERVING)
            raise

    async def _set_health(self, status: int) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, or cancel it when the server is asked to stop."""
        doing, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if doing.done():
            doing.result()
        else:
            doing.cancel()

    async def _drain(self) -> None:
        """Reject new calls and let running ones finish within the grace period."""
        log.info("draining for at most %g s", self._settings.grace_seconds)
        await self._health.enter_graceful_shutdown()
        self._runtime.drain()
        idle, hurrying = (
            asyncio.create_task(each) for each in (self._runtime.wait_until_idle(), self._hurrying.wait())
        )
        await asyncio.wait((idle, hurrying), timeout=self._settings.grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        for waiting in (idle, hurrying):
            waiting.cancel()

    async def _stop(self) -> None:
        """End running calls, each with its status, and release the device."""
        await self._health.enter_graceful_shutdown()
        self._remove_ready_file()
        self._runtime.stop()
        await asyncio.wait((asyncio.create_task(self._runtime.wait_until_idle()),), timeout=_CALLS_SECONDS)
        await asyncio.gather(*(each.stop(_CONNECTIONS_SECONDS) for each in self._servers))
        await _let_calls_end()
        self.device_is_busy = not await self._runtime.close()

    def _remove_ready_file(self) -> None:
        """Remove the ready file, and the unfinished one of a server that was killed while it wrote."""
        if (path := self._settings.ready_file) is not None:
            for each in (path, _unfinished(path)):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(each.lstat().st_mode):  # never a device or a pipe of that name
                        each.unlink()

    def _try_ready_file(self) -> None:
        """Raise ReadyFileError if the file cannot be written, before the model is loaded, which may take minutes."""
        if (path := self._settings.ready_file) is not None:
            try:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if path.is_symlink() or (path.exists() and not path.is_file()):
                    raise FileExistsError(errno.EEXIST, "it is no regular file")
                _unfinished(path).touch()
            except OSError as error:
                raise ReadyFileError(f"cannot write the ready file {path}: {error.strerror}") from error

    def _write_ready_file(self, address: str) -> None:
        """Write the bound addresses; rename, so that a reader never sees a part of the file."""
        if (path := self._settings.ready_file) is None:
            return
        unfinished = _unfinished(path)
        try:
            unfinished.write_text(address.replace(",", "\n") + "\n")
            unfinished.replace(path)
        except OSError as error:
            self._remove_ready_file()
            raise ReadyFileError(f"cannot write the ready file {path}: {error.strerror}") from error


def _unfinished(ready_file: Path) -> Path:
    return ready_file.parent / f"{ready_file.name}.new"


def _call_from_signal(loop: asyncio.AbstractEventLoop, act: Callable[[], None], *_: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
        loop.call_soon_threadsafe(act)


def _terminal_is_there() -> bool:
    """Return whether this process has a controlling terminal that has not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


async def _let_calls_end() -> None:
    """Wait for calls whose peer has just disconnected; if the loop ends before them, gRPC logs an error."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_CONNECTIONS_SECONDS)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """Bind the server and return its addresses. Raises BindError."""
    secure = credentials and partial(server.add_secure_port, server_credentials=credentials)
    return addresses.bind(listen, secure or server.add_insecure_port)
