"""Print pip constraints for the lowest versions that pyproject.toml allows.

    python scripts/lowest_versions.py > constraints.txt

`make test-lowest` tests them. The client's own dependencies are left to pip: packages of the server need later releases
of them.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("telemetry", "filter")
LOWER_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)")


def lowest_versions(pyproject: Path) -> list[str]:
    """Return one "name==version" for each dependency. Raises ValueError for one without a lower bound."""
    project = tomllib.loads(pyproject.read_text())["project"]
    constraints = []
    for dependency in [*project["dependencies"], *(each for extra in EXTRAS for each in _extra(project, extra))]:
        bound = LOWER_BOUND.match(dependency)
        if bound is None:
            raise ValueError(f"{pyproject}: {dependency} has no lower bound")
        constraints.append(f"{bound[1]}=={bound[2]}")
    return constraints


def _extra(project: dict[str, dict[str, list[str]]], name: str) -> list[str]:
    return project["optional-dependencies"][name]


if __name__ == "__main__":
    sys.stdout.write("".join(f"{each}\n" for each in lowest_versions(Path(__file__).parents[1] / "pyproject.toml")))
