"""One server's life: open the port, load, warm up, serve, drain, stop. What it serves is runtime.py's.

Health says NOT_SERVING from the first moment the port is open until the model has made one real image, and again from
the signal that ends the server, while running calls finish.
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

# After the grace period: what calls get to hear their status, connections to close, and the device to end its call.
_CALLS_SECONDS, _CONNECTIONS_SECONDS, _DEVICE_SECONDS = 2.0, 0.5, 10.0


class Lifecycle:
    """A server process from start to stop. `load` brings the model and is called on the device thread.

    Raises CredentialsError, ContentFilterError, or whatever making a content filter raised.
    """

    def __init__(self, settings: Settings, load: Callable[[], AnyServedModel]) -> None:
        self._settings = settings
        self._runtime = Runtime(settings, load)
        self._frontend = self._runtime.frontend
        self._engine = self._runtime.engine
        self._metrics = self._runtime.metrics
        self._certificates = tls.load_certificates(settings)
        self._credentials = tls.server_credentials(self._certificates, settings.tls_client_ca is not None)
        self._has_terminal = _terminal_is_there()
        # Without the first option, two processes on one port would share its connections in silence. The second: a
        # message is as large as its request allows, and the contract sees to that.
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
        self._faces = (SERVICE, *(face for face, is_on in others.items() if is_on))
        self._health = HealthServicer(("", *self._faces))
        self.device_is_busy = False
        """Whether a call of the model, or its compiling, still went on when everything else had stopped."""
        self._lost = False
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()

    async def serve(self) -> None:
        """Serve until SIGTERM, SIGINT or the end of its terminal; a second SIGTERM or SIGINT ends the grace period.

        Raises BindError, ReadyFileError, WarmUpError, DeviceHung, or whatever loading the model raised.
        """
        self._try_ready_file()
        self._remove_ready_file()  # that of a server which was killed tells of a port that is no longer ours
        loop = asyncio.get_running_loop()
        for number, act in (
            (signal.SIGTERM, self._on_signal),
            (signal.SIGINT, self._on_signal),
            (signal.SIGHUP, self._on_hangup),
        ):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup says: never
                # Not the loop's own handlers, which go with it: a signal after its end must not change the exit code.
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
        """Drain when the terminal that the server was started from is gone; else read again what can be."""
        if self._has_terminal and not _terminal_is_there():
            log.info("SIGHUP: the terminal is gone")
            self._stopping.set()  # once more is no hurry: both the kernel and the shell send it
            return
        files = [each for each in (self._runtime.tokens, self._certificates) if each is not None]
        log.info("SIGHUP: %s", "reading again" if files else "there are no tokens or certificates to read again")
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
            standard_services.add_reflection((*self._faces, HEALTH), self._grpc)
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
        self._metrics.set_state("serving")
        self._write_ready_file(address)
        log.info("serving %s on %s", info.name, address)

    async def _watch_device(self) -> None:
        """Raises DeviceHung when a call of the model does not come back; every call has failed with it then."""
        try:
            await self._runtime.watch_device()
        except DeviceHung:
            await self._set_health(HealthCheckResponse.NOT_SERVING)
            self._engine.abandon()
            self._lost = True
            self._metrics.set_state("lost")
            raise

    async def _set_health(self, status: int) -> None:
        for service in ("", *self._faces):
            await self._health.set(service, status)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, but leave it where it is when the server is told to stop."""
        doing, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if doing.done():
            doing.result()
        else:
            doing.cancel()

    async def _drain(self) -> None:
        """Refuse new calls and let the running ones finish, as long as the grace period lasts."""
        self._metrics.set_state("draining")
        log.info("draining for at most %g s", self._settings.grace_seconds)
        await self._health.enter_graceful_shutdown()
        self._engine.drain()
        idle, hurrying = (
            asyncio.create_task(each) for each in (self._frontend.wait_until_idle(), self._hurrying.wait())
        )
        await asyncio.wait((idle, hurrying), timeout=self._settings.grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        for waiting in (idle, hurrying):
            waiting.cancel()

    async def _stop(self) -> None:
        """End what still runs, each call with a status of its own, and let go of the device."""
        await self._health.enter_graceful_shutdown()
        self._remove_ready_file()
        self._engine.stop()
        await asyncio.wait((asyncio.create_task(self._frontend.wait_until_idle()),), timeout=_CALLS_SECONDS)
        await asyncio.gather(*(each.stop(_CONNECTIONS_SECONDS) for each in self._servers))
        await _let_calls_end()
        self.device_is_busy = not await self._runtime.close(0 if self._lost else _DEVICE_SECONDS)

    def _remove_ready_file(self) -> None:
        """Remove it, and what a server that was killed while it wrote left of it."""
        if (path := self._settings.ready_file) is not None:
            for each in (path, _unfinished(path)):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(each.lstat().st_mode):  # never a device or a pipe of that name
                        each.unlink()

    def _try_ready_file(self) -> None:
        """Find out before the model is loaded, which may take minutes, whether the file can be written.

        Raises ReadyFileError.
        """
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
        """Tell whoever waits for the file the bound address: whole or not at all, hence the renaming."""
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
    """Whether this process has a controlling terminal that is not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


async def _let_calls_end() -> None:
    """A call whose peer has just gone ends in a few turns of the loop; cut off in them, gRPC logs it as a fault."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_CONNECTIONS_SECONDS)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """The addresses that the server is then bound to. Raises BindError."""
    secure = credentials and partial(server.add_secure_port, server_credentials=credentials)
    return addresses.bind(listen, secure or server.add_insecure_port)
