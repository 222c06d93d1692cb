"""The gRPC side of a call, for every service that holds a Frontend: its deadline, its status, its first headers."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from server.api.errors import STATUS, InternalError, abort
from server.api.frontend import Frontend
from server.observability.call_context import job_of_call

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ADMITTED = (("t2i-admitted", "1"),)
"""The headers of a unary answer. They show clients that the server has begun the request."""


def timeout_of(context: Context, own: float = math.inf) -> float:
    """Return the seconds that a call's jobs may take: `own` or until the call's deadline, whichever is less."""
    remaining = context.time_remaining()
    return own if remaining is None else min(own, remaining)


async def send_admitted(context: Context) -> None:
    """Send the headers of a unary answer once its jobs are admitted.

    gRPC's libraries and proxies retry only calls without headers. If they retried an admitted request, one that costs a
    server its device, or that a proxy gives up on, would begin again on the next server. A stream needs no extra step:
    its first event comes at once and brings its headers.
    """
    await context.send_initial_metadata(ADMITTED)


@contextlib.asynccontextmanager
async def answering(frontend: Frontend, method: str, job: str | None, context: Context) -> AsyncIterator[None]:
    """Answer one call: track it, turn its errors into statuses by errors.STATUS, and log how it ended.

    Prompts are not logged.
    """
    began = time.monotonic()
    call = f"{method} {job}" if job else method
    job_of_call.set(job)
    code = grpc.StatusCode.OK
    frontend.call_began(context)
    context.add_done_callback(frontend.call_ended)  # type: ignore[arg-type]  # the stubs hide what a function is
    try:
        yield
    except tuple(STATUS) as error:
        code = STATUS[type(error)]
        await abort(context, error)
    except asyncio.CancelledError:
        code = grpc.StatusCode.CANCELLED
        raise
    except grpc.aio.InternalError:  # gRPC raises it if the caller has just left
        code = grpc.StatusCode.CANCELLED
        raise asyncio.CancelledError from None
    except Exception:
        code = grpc.StatusCode.INTERNAL
        log.exception("%s failed", call)
        await abort(context, InternalError())
    finally:
        log.info("%s %s %.3f s", call, code.name, time.monotonic() - began)
