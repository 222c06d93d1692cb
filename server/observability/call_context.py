"""Identifiers of the call that the running code serves, in context variables. The log and the traces show them."""

import contextvars
from dataclasses import dataclass


@dataclass(frozen=True)
class CallIds:
    """Identifiers of a call. `trace_id` is 32 hex digits, or empty if neither the caller nor the server traces."""

    request_id: str
    trace_id: str


call_ids: contextvars.ContextVar[CallIds | None] = contextvars.ContextVar("call_ids", default=None)
job_of_call: contextvars.ContextVar[str | None] = contextvars.ContextVar("job", default=None)
"""The name of the job that the call submits, attaches to or cancels."""


def log_fields() -> dict[str, str]:
    """Return the identifiers that are set, by their key in a log line: request_id, trace_id, job."""
    ids = call_ids.get()
    fields = {"request_id": ids.request_id, "trace_id": ids.trace_id} if ids else {}
    fields["job"] = job_of_call.get() or ""
    return {key: value for key, value in fields.items() if value}
