"""A Ray of the tests' own, with the shipped configuration on free ports of this machine."""

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from serving import ROOT, Logged

CONFIG = ROOT / "deploy" / "ray" / "cpu.yaml"
SERVE = Path(sys.executable).parent / "serve"
# What a shell runs in the background begins with SIGINT ignored and hands that on, and `serve run` ends by it alone.
signal.signal(signal.SIGINT, signal.default_int_handler)
PATIENCE = 400  # seconds: Ray has a dozen processes to start, and each replica imports torch


def configuration(ports: tuple[int, int], variables: dict[str, str], **deployment: Any) -> dict[str, Any]:
    """What is shipped, on these ports for HTTP and gRPC, with what a test wants of the deployment and of its variables.

    A value of None takes a field out.
    """
    shipped: dict[str, Any] = copy.deepcopy(yaml.safe_load(CONFIG.read_text("utf-8")))
    shipped["http_options"]["port"], shipped["grpc_options"]["port"] = ports
    (application,) = shipped["applications"]
    (options,) = application["deployments"]
    actor = options["ray_actor_options"]
    actor["num_cpus"] = 0.5
    actor["runtime_env"]["env_vars"] |= {"OMP_NUM_THREADS": "1", **variables}
    options.update(deployment)
    application["deployments"] = [{key: value for key, value in options.items() if value is not None}]
    return shipped


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


class RayServe(Logged):
    """`serve run` with a configuration, in a Ray that it starts and ends; `deploy` changes it while it runs."""

    patience = PATIENCE

    def __init__(self, folder: Path, configure: Callable[[tuple[int, int]], dict[str, Any]]) -> None:
        self._folder = folder
        self.ports = free_ports()
        self.target = f"127.0.0.1:{self.ports[1]}"
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "clients" / "python"), str(ROOT / "tests" / "support")]
            ),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # on a busy machine its 5 seconds never suffice
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
            "RAY_TMPDIR": str(folder),
            "NO_COLOR": "1",
        }
        process = subprocess.Popen(
            [SERVE, "run", self._write(configure(self.ports))],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        super().__init__(process, process.stdout)

    def _write(self, configuration: dict[str, Any]) -> str:
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(configuration), "utf-8")
        return str(path)

    def deploy(self, configuration: dict[str, Any]) -> None:
        """What `serve deploy` does: ask the Ray that runs to become so."""
        dashboard = self.wait_for_log(r"dashboard at \S*?(http://[0-9.:]+)")[1]
        command = [SERVE, "deploy", "--address", dashboard, self._write(configuration)]
        subprocess.run(command, cwd=ROOT, env=self._environment, check=True, timeout=PATIENCE, capture_output=True)

    def processes(self, title: str) -> list[psutil.Process]:
        """This Ray's processes of that title, ReplicaActor or ProxyActor."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: it has just ended
                if title in " ".join(each.cmdline()):
                    found.append(each)
        return found

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        started = self.processes("")
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
            self._reader.join(PATIENCE)
        finally:
            for each in started:
                if each.is_running():
                    each.kill()
