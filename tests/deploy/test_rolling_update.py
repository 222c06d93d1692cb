"""Replicas are exchanged one after the other under load, and no caller notices."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import PATIENCE, ROOT, ServerProcess

pytestmark = pytest.mark.slow

WORKERS = 6
CALL_ENDED = r"(Generate|StreamGenerate) \S+ OK"


@contextmanager
def under_load(targets: list[str]) -> Iterator[Callable[[], dict[str, int]]]:
    """A client that calls all targets in turn; what is yielded ends it and tells how its calls went."""
    command = [sys.executable, "tests/support/calling.py", f"ipv4:{','.join(targets)}", str(WORKERS)]
    client = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield lambda: json.loads(client.communicate(timeout=PATIENCE)[0])
    finally:
        client.kill()
        client.wait()


def test_no_call_fails_while_two_servers_restart_in_turn(
    start_server, folders: tuple[Path, Path], record_property: Callable[[str, int], None]
):
    experts = ("--base", str(folders[0]), "--refiner", str(folders[1]))
    servers: list[ServerProcess] = [start_server(*experts) for _ in range(2)]
    targets = [server.target for server in servers]
    for server in servers:
        server.wait_until_ready()
    with under_load(targets) as outcomes:
        for server in servers:
            server.wait_for_log(CALL_ENDED)
        for server in servers:
            assert server.stop() == 0
            assert "Traceback" not in server.log
            # Both have their share of the calls before the next one goes, as minReadySeconds sees to in a cluster.
            start_server(*experts, "--listen", server.target).wait_for_log(CALL_ENDED)
        told = outcomes()
    assert set(told) == {"ok"}, told
    record_property("calls", told["ok"])  # for --junitxml
