"""Build the container image with docker, podman or buildah, whichever works on this machine.

    python scripts/build_image.py --variant cuda --tag text-to-image-service:v1 --build-arg BASE=...

Other flags are passed to the tool unchanged. In the build, pip uses the indexes of this machine: its configuration and
its certificates are mounted as secrets, which no layer keeps.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# docker's own format, because OCI's has no HEALTHCHECK.
TOOLS = {
    "docker": ("docker", "build"),
    "podman": ("podman", "build", "--format", "docker"),
    "buildah": ("buildah", "build", "--format", "docker"),
}
PIP_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "find-links", "cert", "proxy", "timeout", "retries")


def main() -> int:
    """Build the image and return the tool's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tag", default="text-to-image-service:latest", help="NAME:TAG of the image")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu", help="the build of torch")
    parser.add_argument("--tool", choices=TOOLS, help="default: the first that works")
    given, arguments = parser.parse_known_args()

    tool = given.tool or working_tool()
    if tool is None:
        print(f"none of {', '.join(TOOLS)} is installed and works here; run `TOOL info` to see why", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as secrets:
        command = [
            *TOOLS[tool],
            *("--build-arg", f"VARIANT={given.variant}"),
            *("--build-arg", f"VERSION={version()}", "--build-arg", f"REVISION={revision()}"),
            *pip_arguments(tool, configured(), Path(secrets)),
            *("--tag", given.tag, *arguments, str(ROOT)),
        ]
        print(shlex.join(command), file=sys.stderr)
        status = subprocess.run(command, env={"DOCKER_BUILDKIT": "1", **os.environ}, check=False).returncode
    if status == 0:
        print(f"{tool} has built {given.tag}")
    return status


def working_tool() -> str | None:
    """Return the first tool that answers: a docker client is often installed without an engine."""
    for tool in TOOLS:
        if shutil.which(tool) and subprocess.run([tool, "info"], capture_output=True, check=False).returncode == 0:
            return tool
    return None


def version() -> str:
    """Return the version of the service."""
    source = (ROOT / "server" / "__init__.py").read_text("utf-8")
    return str(re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0])


def revision() -> str:
    """Return the commit, marked if files differ from it; empty outside of a clone."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def configured() -> dict[str, str]:
    """Return pip's options on this machine by name; environment variables override configuration files."""
    listed = subprocess.run(
        (sys.executable, "-m", "pip", "config", "list"), capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^(:env:|global|install)\.(\S+)='(.*)'$", listed, re.MULTILINE)
    return {name: value for _, name, value in sorted(found, key=lambda each: each[0] == ":env:")}


def pip_arguments(tool: str, options: Mapping[str, str], secrets: Path) -> list[str]:
    """Return the tool's arguments that give pip in the build these options, as far as they apply there."""
    settings = {name: options[name] for name in PIP_OPTIONS if name in options}
    arguments = []
    if certificates := settings.pop("cert", None):
        arguments += ["--secret", f"id=pip.crt,src={certificates}"]
        settings["cert"] = "/etc/pip.crt"
    for name in ("index-url", "extra-index-url", "find-links"):
        places = [place for place in settings.pop(name, "").split() if not place.startswith("file:")]
        folders = [place for place in places if place.startswith("/")]
        if tool == "docker":  # docker's builds have no access to this machine's disk except the context
            places = [place for place in places if place not in folders]
        else:
            arguments += [f"--volume={folder}:{folder}:ro" for folder in folders if Path(folder).is_dir()]
        if places:
            settings[name] = " ".join(places)
    if settings:
        file = secrets / "pip.conf"
        file.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""]))
        arguments += ["--secret", f"id=pip.conf,src={file}"]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
