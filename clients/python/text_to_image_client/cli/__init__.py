"""The command `t2i`: draw images, follow and cancel jobs, show the model, probe, and run a server for one request.

Results go to stdout, messages for people to stderr. The exit code is the kind of failure.
"""

from . import _generate, _model, _run
from ._group import EXIT_CODES, main

__all__ = ["EXIT_CODES", "main"]

for _command in (_generate.generate, _generate.attach, _generate.cancel, _model.model, _model.health, _run.run):
    main.add_command(_command)
