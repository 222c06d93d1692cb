"""Three interchangeable servers with a model of fixed call times, for tests in which some of them are lost."""

import itertools
import json
import time

import grpc
from serving import PATIENCE, RETRIES, ServerProcess


class Replicas:
    """Start three servers that give up a device after four seconds, and replace those that a test ended."""

    def __init__(self) -> None:
        self.servers: list[ServerProcess] = []
        self._seeds = itertools.count(100, 100)

    def fresh_seed(self) -> int:
        """Return a seed that no test has used: the servers' logs identify requests by their seeds."""
        return next(self._seeds)

    def replace(self) -> None:
        self.servers = self.alive()
        while len(self.servers) < 3:
            flags = ("--device-timeout-seconds", "4", "--heartbeat-seconds", "0")
            self.servers.append(ServerProcess(*flags, program=("tests/support/steady_server.py",)))
        for each in self.servers:
            each.wait_until_ready()

    @property
    def target(self) -> str:
        return "ipv4:" + ",".join(each.target for each in self.servers)

    def channel(self) -> grpc.Channel:
        """Return a channel that takes the servers in turn, with the Python client's retries."""
        config = json.loads(RETRIES[0][1]) | {"loadBalancingConfig": [{"round_robin": {}}]}
        return grpc.insecure_channel(self.target, [("grpc.service_config", json.dumps(config))])

    def alive(self) -> list[ServerProcess]:
        return [each for each in self.servers if each.process.poll() is None]

    def that_began(self, seed: int) -> list[ServerProcess]:
        """Return the servers whose model has begun the request of this seed."""
        return [each for each in self.servers if f"begins: {seed}\n" in f"{each.log}\n"]

    def wait_until_begun(self, seed: int, servers: int = 1) -> list[ServerProcess]:
        """Wait until that many servers have begun the request; return them."""
        deadline = time.monotonic() + PATIENCE
        while len(began := self.that_began(seed)) < servers:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return began
