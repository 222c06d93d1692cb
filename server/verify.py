"""Check that the weights are whole, and the expected ones, without loading them.

`python -m server.verify` is for a step before the server starts, for example an init container. It takes the server's
own --base and --refiner, or T2I_BASE and T2I_REFINER, and ends with the server's exit codes for checkpoints
(server/errors.py).
"""

import argparse
import sys

from server.ensemble import checkpoint
from server.errors import FingerprintMismatch, InvalidSettings, StartupError
from server.settings import Settings, read


def main() -> int:
    """Print the fingerprint of the weights, or the problem in one sentence, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--fingerprint", metavar="SHA256", help="expected fingerprint, as this command or GetModel shows it"
    )
    for flag in ("base", "refiner"):
        parser.add_argument(f"--{flag}", metavar="DIR", help=Settings.model_fields[flag].description)
    given = vars(parser.parse_args())
    wanted = given.pop("fingerprint")
    try:
        folders = read([f"--{flag}={folder}" for flag, folder in given.items() if folder is not None]).experts
    except InvalidSettings as error:
        parser.error(str(error))
    try:
        found = checkpoint.inspect(*folders).fingerprint()
        if wanted is not None and found != wanted:
            raise FingerprintMismatch(f"these weights have the fingerprint {found}, not {wanted}")
    except StartupError as error:
        print(f"python -m server.verify: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    print(found)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
