"""The exit codes of the server: one tree of errors, which the help text repeats."""

import re

from server import errors
from server.errors import StartupError, exit_codes
from server.settings import Settings


def test_every_startup_error_is_in_one_file_and_has_its_own_exit_code():
    kinds = [*errors._tree(StartupError)]
    assert {kind.__module__ for kind in kinds} == {"server.errors"}
    own = [kind for kind in kinds if "exit_code" in vars(kind)]
    assert len({kind.exit_code for kind in own}) == len({kind.reason for kind in own}) == len(own)


def test_the_drawing_of_the_tree_has_every_error_with_its_exit_code():
    drawn = dict(re.findall(r"(?m)^[│├└─ ]*(\w+) +(\d+): ", errors.__doc__ or ""))
    kinds = [kind for kind in errors._tree(StartupError) if not (kind.__subclasses__() and kind is not StartupError)]
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in kinds}


def test_the_help_text_has_every_exit_code():
    help_text = " ".join((Settings.__doc__ or "").split())
    assert f"Exit codes: {', '.join(f'{code} {reason}' for code, reason in exit_codes().items())}." in help_text
