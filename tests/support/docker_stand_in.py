"""The part of `docker` that Instill's SDK uses, where there is no engine: it runs the commands without an image.

An image is the folder $STAND_IN/image with the environment in $STAND_IN/environment.json. A container is a network and
a process namespace of its own, so that all that is in it has its usual ports and ends with it. As root, on Linux.

    docker_stand_in.py buildx build ... CONTEXT --load     keeps the names of the context's files, and the arguments
    docker_stand_in.py run -d [OPTION...] --name NAME [OPTION...] IMAGE COMMAND...
    docker_stand_in.py exec NAME COMMAND...
    docker_stand_in.py stop NAME
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
WITH_VALUE = {"-e", "--name", "--device"}

# The wheel of the SDK's 0.18.0 is without instill.helpers.test, which its `instill run` calls in the container. In the
# SDK's repository it sends the input to Ray's HTTP port and prints what comes back; so does this.
MISSING = """
import json, pprint, sys, requests
pprint.pprint(requests.post("http://127.0.0.1:8000/", json=json.loads(sys.argv[2]), timeout=600).text)
"""


def build(arguments: list[str]) -> None:
    context = Path(arguments[arguments.index("--load") - 1])
    files = sorted(path.name for path in context.iterdir())
    HERE.joinpath("build.json").write_text(json.dumps({"files": files, "arguments": arguments}))


def run(arguments: list[str]) -> None:
    options: dict[str, str] = {}
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        options[option] = arguments.pop(0) if option in WITH_VALUE else ""
    _image, *command = arguments
    environment = os.environ | json.loads(HERE.joinpath("environment.json").read_text())
    if "--device" in options:  # Ray believes in it, and torch takes the processor
        environment["RAY_OVERRIDE_RESOURCES"] = json.dumps({"GPU": 1})
    with HERE.joinpath(f"{options['--name']}.log").open("wb") as log:
        container = subprocess.Popen(
            [*NAMESPACES, "sh", "-c", 'ip link set lo up && "$@"', "sh", *command],
            cwd=HERE / "image",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    HERE.joinpath(options["--name"]).write_text(str(container.pid))


def execute(name: str, command: list[str]) -> int:
    container = int(HERE.joinpath(name).read_text())
    inside = Path(f"/proc/{container}/task/{container}/children").read_text().split()[0]
    if command[:3] == ["python", "-m", "instill.helpers.test"]:
        command[1:3] = ["-c", MISSING]
    return subprocess.run(
        ["nsenter", "--target", inside, "--net", "--pid", "--mount", f"--wd={HERE / 'image'}", *command],
        env=os.environ | json.loads(HERE.joinpath("environment.json").read_text()),
        check=False,
    ).returncode


def stop(name: str) -> None:
    os.kill(int(HERE.joinpath(name).read_text()), signal.SIGKILL)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["buildx", *arguments]:
            build(arguments)
        case ["run", *arguments]:
            run(arguments)
        case ["exec", name, *command]:
            sys.exit(execute(name, command))
        case ["stop", name]:
            stop(name)
        case _:
            sys.exit(f"not known here: {sys.argv[1:]}")
