"""The messages and protocols between the engine and its neighbours: plain data, no torch, no gRPC."""

import math
from dataclasses import dataclass

from server.domain import Caller, ImageRequest

NOBODY = Caller("")
"""The caller of the server's own jobs."""


@dataclass(frozen=True)
class Submission:
    """One request for images and the terms of its job.

    `name` identifies the job in the log. The job must end within `timeout` seconds. The device is shared fairly between
    callers by `Caller.name`; `Caller.jobs`, if given, replaces the engine's limit on the jobs of one caller. A higher
    `priority` runs earlier. A Preview follows every `preview_interval` network calls; 0 means never.
    """

    name: str
    request: ImageRequest
    caller: Caller = NOBODY
    timeout: float = math.inf
    priority: int = 0
    preview_interval: int = 0
