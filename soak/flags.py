"""Try every flag and every T2I_ variable of the server with values of the wrong type, empty, huge and contradictory.

The values are derived from the settings, so new flags are covered. An invalid value must be rejected in one sentence
with the name as it was given, and all of them at once. An accepted value must give a server that serves, or a
documented exit code and one sentence.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import click
from click.testing import CliRunner
from pydantic.fields import FieldInfo
from serving import PATIENCE, ROOT

from server.errors import InvalidSettings, exit_codes
from server.settings import Settings, read
from text_to_image_client import cli

_DIGITS = "9" * 5000
_FORBIDDEN = re.compile(
    rf"Traceback|{re.escape(str(ROOT))}|pydantic|Input should|Value error|NoneType|\bError\(|<class|codec"
)
_LONGEST = 500  # characters of a sentence

# Invalid values by the type of a flag.
_INVALID: dict[Any, list[str]] = {
    int: ["", " ", "x", "1.5", "nan", "inf", "-", "1e3", "0x10", "1,2", "true", "\udcff", "١٢", _DIGITS, f"-{_DIGITS}"],
    float: ["", " ", "x", "nan", "inf", "-inf", "1e999", "-1e999", "1,5", "true", "\udcff", "0x1p3", f"-{_DIGITS}"],
    bool: ["", " ", "maybe", "2", "-1", "nan", "x" * 5000, "\udcff"],
    Path: [""],
    str: ["", "\udcff"],
}
# Values that may be accepted or rejected. The server must start with the accepted ones.
_UNUSUAL: dict[Any, list[str]] = {
    Path: [
        ".",
        "/",
        "/dev/null",
        "/dev/full",
        "/nowhere/at/all",
        "n" * 255,
        "n" * 5000,
        "a\nb",
        "\udcff",
        "~",
        "None",
    ],
    str: [
        " ",
        "a\nb",
        "x" * 5000,
        "None",
        "null",
        "[]",
        "{}",
        ":0",
        "::0",
        "localhost",
        "127.0.0.1:",
        "127.0.0.1:99999",
        "127.0.0.1:-1",
        "127.0.0.1:٣",
        "127.0.0.1:0x1",
        "[::1",
        "[::1]",
        "a b:0",
        "256.1.1.1:0",
        "no-host.invalid:0",
        "x" * 300 + ":0",
        "192.0.2.1:0",
        "[::]:0",
        "0.0.0.0:0",
        "localhost:0",
        "[::1]:0",
        "unix:",
        "unix:/",
        "unix:/nowhere/at/all",
        "unix:/" + "x" * 200,
        "127.0.0.1:0,",
        ",",
        "127.0.0.1:0,127.0.0.1:0",
        "os:getcwd",
        "nowhere:nothing",
        "this.module:is",
        "sys:exit",
        "1x1",
        "0x0",
        "64x64",
        "99999x99999",
        "64x64," * 500 + "64x64",
    ],
}
# Flags of the model need the real one, which start.py starts. These servers have a steady_server.py model.
_MODEL = {
    "base",
    "refiner",
    "preview_decoder",
    "compile_cache",
    "compile_sizes",
    "device",
    "precision",
    "offload",
    "compile",
}


@dataclass
class Report:
    """The results of a campaign."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"flags: {self.counts.total()} cases in {self.seconds:.0f} s, seed {self.seed}; "
                f"{len(self.violations)} violations",
                *(f"  {count} {name}" for name, count in sorted(self.counts.items())),
                *self.violations,
            ]
        )


def campaign(count: int, seed: int, seconds: float, starts: int = 1000, share: float = 1) -> Report:
    """Try a `share` of the values of every flag, `count` combinations, and at most `starts` servers."""
    report = Report(seed)
    choose = random.Random(seed)
    began = time.monotonic()
    accepted = list(_try_each(report, choose, share))
    _try_combinations(report, choose, count)
    choose.shuffle(accepted)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for words in threads.map(_start, accepted[:starts]):
            report.counts["servers started with an unusual value"] += 1
            report.violations += words
            if time.monotonic() - began > seconds:
                threads.shutdown(cancel_futures=True)
                break
    _commands(report)
    report.seconds = time.monotonic() - began
    return report


@dataclass(frozen=True)
class CommandLine:
    """Flags and variables of a server."""

    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def command(self) -> str:
        """Return the command that repeats this case."""
        words = [*(f"--typed={each}" for each in self.flags), *(f"--variable={k}={v}" for k, v in self.variables)]
        return shlex.join(["python", "-m", "soak", "flags", *words])


def _try_each(report: Report, choose: random.Random, share: float) -> Iterator[CommandLine]:
    """Try each flag alone, as flag and as variable. Yields the accepted unusual values."""
    for name, setting in Settings.model_fields.items():
        for value in _sample(invalid_values(setting), choose, share):
            for given in _spellings(name, setting, value):
                report.counts["invalid values"] += 1
                report.violations += _check_rejected(given, [_name(given)])
        for value in _sample(unusual_values(setting), choose, share):
            given = _spellings(name, setting, value)[-1]
            report.counts["unusual values"] += 1
            violations = _check_accepted_or_rejected(given)
            report.violations += violations or []
            # `outcome` reads the log, which needs its default level.
            if violations is None and name not in _MODEL | {"log_level"}:
                yield given


def _sample(values: list[str], choose: random.Random, share: float) -> list[str]:
    return choose.sample(values, max(1, round(share * len(values)))) if values else []


def _try_combinations(report: Report, choose: random.Random, count: int) -> None:
    """Try several invalid values at once, which must all be named, and several valid ones, which may contradict."""
    settings = Settings.model_fields
    for _ in range(count):
        names = choose.sample(sorted(settings), choose.randint(2, 8))
        parts = [
            choose.choice(_spellings(name, settings[name], choose.choice(invalid_values(settings[name]))))
            for name in names
        ]
        parts = [each for each in parts if not _ends_parsing(each)]
        report.counts["several invalid values at once"] += 1
        report.violations += _check_rejected(_joined(parts), [_name(each) for each in parts]) if parts else []
        pair = choose.sample(sorted(settings), choose.randint(2, 3))
        parts = [
            choose.choice(_spellings(name, settings[name], choose.choice(_valid(settings[name])))) for name in pair
        ]
        report.counts["several valid values at once"] += 1
        report.violations += _check_accepted_or_rejected(_joined(parts)) or []


def invalid_values(setting: FieldInfo) -> list[str]:
    """Return invalid values of this flag: of another type, out of its range, or none of its choices."""
    kind = _kind(setting)
    if isinstance(kind, tuple):
        return ["", " ", "x", kind[0].upper(), f"{kind[0]} ", ",".join(kind), "x" * 5000, "\udcff"]
    bounds = [getattr(each, bound) for each in setting.metadata for bound in ("ge", "gt", "le") if hasattr(each, bound)]
    beyond = [
        str(bound + step)
        for each in setting.metadata
        for bounded, step in (("ge", -1), ("le", 1), ("gt", 0))
        if (bound := getattr(each, bounded, None)) is not None
    ]
    assert bounds or kind not in (int, float), "a number without bounds"
    return [*_INVALID[kind], *beyond]


def unusual_values(setting: FieldInfo) -> list[str]:
    """Return the bounds and the choices of this flag, and unusual texts, which may be valid."""
    kind = _kind(setting)
    if isinstance(kind, tuple):
        return list(kind)
    bounds = [getattr(each, bound) for each in setting.metadata for bound in ("ge", "le") if hasattr(each, bound)]
    return [*map(str, bounds), *_UNUSUAL.get(kind, []), *(["true", "false"] if kind is bool else [])]


def _valid(setting: FieldInfo) -> list[str]:
    kind = _kind(setting)
    if kind is Path:
        return ["nowhere"]
    return ["127.0.0.1:0", "64x64", "os:getcwd"] if kind is str else unusual_values(setting)


def _kind(setting: FieldInfo) -> Any:
    """Return int, float, bool, Path or str, or the tuple of choices."""
    kind = setting.annotation
    while (arguments := typing.get_args(kind)) and typing.get_origin(kind) is not typing.Literal:
        kind = next(each for each in arguments if each is not NoneType)
    return typing.get_args(kind) or kind


def _spellings(name: str, setting: FieldInfo, value: str) -> list[CommandLine]:
    flag = f"--{name.replace('_', '-')}"
    variable = CommandLine(variables=((f"T2I_{name.upper()}", value),))
    if _kind(setting) is bool:
        return [variable]  # the flag takes no value
    return [CommandLine((f"{flag}={value}",)), variable]


def _joined(parts: Sequence[CommandLine]) -> CommandLine:
    return CommandLine(sum((each.flags for each in parts), ()), sum((each.variables for each in parts), ()))


def _name(given: CommandLine) -> str:
    return given.flags[0].partition("=")[0] if given.flags else given.variables[0][0]


def _ends_parsing(given: CommandLine) -> bool:
    """Return whether argparse fails to split the command line, which it reports before any value is checked."""
    try:
        with _environment(given.variables):
            read(given.flags)
    except InvalidSettings as error:
        return not error.problems[0].startswith(_name(given))
    return False


def _check_rejected(given: CommandLine, names: Sequence[str]) -> list[str]:
    """Return the violations of the rejection: one sentence must begin with each name."""
    try:
        with _environment(given.variables):
            read(given.flags)
    except InvalidSettings as error:
        if len(error.problems) == 1 and error.problems[0].startswith(f"argument {names[0]}"):
            return _bad_sentences(given, error.problems)
        unnamed = [name for name in names if sum(each.startswith(f"{name}: ") for each in error.problems) != 1]
        found = [f"no sentence, or several, for {unnamed}: {error.problems}"] if unnamed else []
        return [f"{words}\n  {given.command()}" for words in found] + _bad_sentences(given, error.problems)
    except Exception as error:  # noqa: BLE001  # any other exception is a violation
        return [f"{type(error).__name__}: {error}\n  {given.command()}"]
    return [f"was accepted\n  {given.command()}"]


def _check_accepted_or_rejected(given: CommandLine) -> list[str] | None:
    """Return None if it was accepted, otherwise the violations of the rejection."""
    try:
        with _environment(given.variables):
            read(given.flags)
    except InvalidSettings as error:
        return _bad_sentences(given, error.problems)
    except Exception as error:  # noqa: BLE001  # any other exception is a violation
        return [f"{type(error).__name__}: {error}\n  {given.command()}"]
    return None


def _bad_sentences(given: CommandLine, problems: Sequence[str]) -> list[str]:
    """Return the violations of sentences: not one line of readable text, or a flag's name for a variable."""
    flags = {each.partition("=")[0] for each in given.flags}
    found = []
    for each in problems:
        if "\n" in each or not each.isprintable() or len(each) > _LONGEST or _FORBIDDEN.search(each):
            found.append(f"is not a readable sentence: {each!r}\n  {given.command()}")
        for variable, _ in given.variables:
            flag = f"--{variable.removeprefix('T2I_').lower().replace('_', '-')}"
            if flag not in flags and re.search(rf"{flag}(?![a-z-])", each):
                found.append(f"names {flag} instead of {variable}: {each!r}\n  {given.command()}")
    return found


@contextmanager
def _environment(variables: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Set these T2I_ variables and no others."""
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith("T2I_"):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


CODES = frozenset(exit_codes().keys() - {0, 1})
"""The documented exit codes of a server that cannot serve."""


def _start(given: CommandLine) -> list[str]:
    """Start the real server with the steady model and return the violations."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("T2I_")}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/clients/python"} | dict(given.variables)
        listen = () if any(name[4:] == "LISTEN" for name, _ in given.variables) else ("--listen", "127.0.0.1:0")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "steady_server.py"), *listen, *given.flags],
            env=environment,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        found, code = outcome(process)
        if code == 0 and (left := os.listdir(folder)):
            found.append(f"left {left}")
    return [f"{words}\n  {given.command()}" for words in found]


def outcome(process: "subprocess.Popen[str]") -> tuple[list[str], int]:
    """Wait until the server serves or ends, and stop it. Returns the violations and the exit code."""
    lines: list[str] = []
    serves = False
    assert process.stderr is not None
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if re.search(r"lifecycle(: |\", \"message\": \")serving ", line):
            serves = True
            process.send_signal(signal.SIGTERM)
    code = process.wait(PATIENCE)
    watchdog.cancel()
    log = "\n".join(lines[-30:])
    found = []
    if "Traceback" in log or "Fatal Python error" in log:
        found.append(f"a traceback:\n{log}")
    if serves and code != 0:
        found.append(f"exit code {code} after SIGTERM:\n{log}")
    if not serves and code not in CODES:
        found.append(f"exit code {code}, which is not documented:\n{log}")
    sentences = [line for line in lines if " ERROR " in line or line.startswith("python -m server: ")]
    if not serves and len(sentences) != 1 and code != 2:
        found.append(f"{len(sentences)} sentences instead of one:\n{log}")
    return found, code


# Other commands.


def _commands(report: Report) -> None:
    """Try invalid values of `t2i`'s options, and wrong command lines of server.verify."""
    runner = CliRunner()
    for words in _t2i():
        report.counts["t2i with an invalid value"] += 1
        found = runner.invoke(cli.main, words, env={"T2I_TARGET": "127.0.0.1:9"})
        if found.exit_code not in (2, 3) or not found.output.strip() or _FORBIDDEN.search(found.output):
            report.violations.append(f"t2i {words}: exit code {found.exit_code}, {found.output[-500:]}")
    for words, variables in (
        (["--no-such-flag"], {}),
        (["--fingerprint"], {}),
        (["x" * 5000], {}),
        ([], {"T2I_MAX_QUEUE": "x"}),
        ([], {"T2I_BASE": ""}),
        ([], {"T2I_REFINER": "nowhere"}),
    ):
        report.counts["server.verify with an invalid value"] += 1
        ended = subprocess.run(
            [sys.executable, "-m", "server.verify", *words],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        unnamed = [name for name in variables if name not in ended.stderr]
        if ended.returncode != 2 or _FORBIDDEN.search(ended.stderr) or unnamed:
            report.violations.append(f"server.verify {words}: exit code {ended.returncode}, {ended.stderr[-500:]}")


def _t2i() -> Iterator[list[str]]:
    """Yield each command with invalid values of each option that is a number or a choice."""
    for name, command in cli.main.commands.items():
        given = ["x" for each in command.params if isinstance(each, click.Argument) and each.required]
        for option in command.params:
            kind = option.type
            numeric = isinstance(kind, click.types.IntParamType | click.types.FloatParamType)
            if option.opts[0].startswith("--") and (numeric or isinstance(kind, click.Choice)):
                for value in ("", "x", "nan", "1e", "\0", "-"):
                    yield [name, *given, f"{option.opts[0]}={value}"]


def repeat(flags: Sequence[str], variables: dict[str, str]) -> list[str]:
    """Try one case alone and return the violations of its rejection, or of a server that starts with it."""
    given = CommandLine(tuple(flags), tuple(variables.items()))
    violations = _check_accepted_or_rejected(given)
    return _start(given) if violations is None else violations
