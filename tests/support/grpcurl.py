"""Call a server with grpcurl."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from serving import PATIENCE, ServerProcess

GRPCURL = Path(sys.executable).parent / "grpcurl"


def grpcurl(server: ServerProcess, *arguments: str, data: str | None = None) -> subprocess.CompletedProcess[str]:
    given = ["-d", data] if data is not None else []
    return subprocess.run(
        [GRPCURL, "-plaintext", *given, server.target, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def messages(output: str) -> list[dict[str, Any]]:
    """Parse the JSON messages that grpcurl prints one after the other."""
    decoder, found = json.JSONDecoder(), []
    while output := output.lstrip():
        message, end = decoder.raw_decode(output)
        found.append(message)
        output = output[end:]
    return found
