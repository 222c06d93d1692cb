"""Real proxies in front of real servers: nginx and HAProxy of Debian, on loopback, without privileges."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from serving import PATIENCE

# What nginx-light and haproxy install; /usr/sbin is not on every PATH.
_PROGRAMS = {name: shutil.which(name) or shutil.which(name, path="/usr/sbin") for name in ("nginx", "haproxy")}

_NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log info;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream service {{ {servers} }}
    server {{
        listen 127.0.0.1:{port} http2;
        {settings}
        location / {{ grpc_pass grpc://service; }}
    }}
}}
"""

_HAPROXY = """
global
    log stderr local0
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    {settings}
frontend gRPC
    bind 127.0.0.1:{port} proto h2
    default_backend service
backend service
    balance roundrobin
    {servers}
"""


class Proxy:
    """A running proxy that listens on `target`. Stop it with `stop`."""

    def __init__(self, name: str, folder: Path, targets: list[str], settings: str = "") -> None:
        program = _PROGRAMS[name]
        if program is None:
            pytest.skip(f"{name} is not installed: apt-get install {'nginx-light' if name == 'nginx' else name}")
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.target = f"127.0.0.1:{port}"
        self._log = folder / f"{name}.log"
        config = folder / f"{name}.conf"
        if name == "nginx":
            servers = " ".join(f"server {target};" for target in targets)
            config.write_text(_NGINX.format(folder=folder, port=port, servers=servers, settings=settings))
            command: list[str | Path] = [program, "-e", self._log, "-p", folder, "-c", config]
        else:
            servers = "\n    ".join(f"server s{place} {target} proto h2" for place, target in enumerate(targets))
            config.write_text(_HAPROXY.format(port=port, servers=servers, settings=settings))
            command = [program, "-db", "-f", config]
        with (folder / f"{name}.out").open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE
        while not _listens(port):
            said = (folder / f"{name}.out").read_text() + (self._log.read_text() if self._log.exists() else "")
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
