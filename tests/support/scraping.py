"""Read a server's metrics as Prometheus does."""

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from serving import PATIENCE, ServerProcess


@dataclass(frozen=True)
class Scrape:
    """A server's metrics at one moment: samples by name and labels, and the names of all families."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    families: set[str]

    def __call__(self, name: str, /, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)


def scrape(server: ServerProcess) -> Scrape:
    address = server.wait_for_log(r"metrics on (http://[^\s\"]+)")[1]
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return Scrape(
        {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples},
        {family.name for family in families},
    )
