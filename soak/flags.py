"""Every flag and every T2I_ variable of the server, of the wrong kind, empty, huge, and against one another.

What is tried comes from the settings themselves, so that a new flag is covered. A value that no flag of its kind can
have must be refused in one sentence with the name that was typed, all of them at once; whatever else is taken must lead
to a server that serves, or to a documented exit code and one sentence.
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

# By the kind of a flag, what it can never have.
_NEVER: dict[Any, list[str]] = {
    int: ["", " ", "x", "1.5", "nan", "inf", "-", "1e3", "0x10", "1,2", "true", "\udcff", "١٢", _DIGITS, f"-{_DIGITS}"],
    float: ["", " ", "x", "nan", "inf", "-inf", "1e999", "-1e999", "1,5", "true", "\udcff", "0x1p3", f"-{_DIGITS}"],
    bool: ["", " ", "maybe", "2", "-1", "nan", "x" * 5000, "\udcff"],
    Path: [""],
    str: ["", "\udcff"],
}
# What it may have or not; what it is taken for must then work.
_MAYBE: dict[Any, list[str]] = {
    Path: [
        ".", "/", "/dev/null", "/dev/full", "/nowhere/at/all", "n" * 255, "n" * 5000, "a\nb", "\udcff", "~", "None",
    ],
    str: [
        " ", "a\nb", "x" * 5000, "None", "null", "[]", "{}", ":0", "::0", "localhost", "127.0.0.1:", "127.0.0.1:99999",
        "127.0.0.1:-1", "127.0.0.1:٣", "127.0.0.1:0x1", "[::1", "[::1]", "a b:0", "256.1.1.1:0", "no-host.invalid:0",
        "x" * 300 + ":0", "192.0.2.1:0", "[::]:0", "0.0.0.0:0", "localhost:0", "[::1]:0", "unix:", "unix:/",
        "unix:/nowhere/at/all", "unix:/" + "x" * 200, "127.0.0.1:0,", ",", "127.0.0.1:0,127.0.0.1:0", "os:getcwd",
        "nowhere:nothing", "this.module:is", "sys:exit", "1x1", "0x0", "64x64", "99999x99999", "64x64," * 500 + "64x64",
    ],
}  # fmt: skip
# Those of the model need the real one, which start.py starts; here the model is that of tests/support/steady_server.py.
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
    """What a campaign has found."""

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
    """Try a `share` of the values of every flag, `count` combinations, and `starts` servers of odd values at most."""
    report = Report(seed)
    choose = random.Random(seed)
    began = time.monotonic()
    odd = list(_alone(report, choose, share))
    _together(report, choose, count)
    choose.shuffle(odd)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for words in threads.map(_started, odd[:starts]):
            report.counts["servers started with an odd value"] += 1
            report.violations += words
            if time.monotonic() - began > seconds:
                threads.shutdown(cancel_futures=True)
                break
    _commands(report)
    report.seconds = time.monotonic() - began
    return report


@dataclass(frozen=True)
class Typed:
    """Flags and variables as somebody typed them."""

    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def command(self) -> str:
        words = [*(f"--typed={each}" for each in self.flags), *(f"--variable={k}={v}" for k, v in self.variables)]
        return shlex.join(["python", "-m", "soak", "flags", *words])


def _alone(report: Report, choose: random.Random, share: float) -> Iterator[Typed]:
    """Every flag by itself with wrong values, as flag and as variable; those with odd values that are taken."""
    for name, setting in Settings.model_fields.items():
        for value in _some(wrong(setting), choose, share):
            for typed in _ways(name, setting, value):
                report.counts["values that must be refused"] += 1
                report.violations += _refused(typed, [_name(typed)])
        for value in _some(odd(setting), choose, share):
            typed = _ways(name, setting, value)[-1]
            report.counts["values that may be refused"] += 1
            words = _taken_or_refused(typed)
            report.violations += words or []
            if words is None and name not in _MODEL | {"log_level"}:  # whose log says when it serves
                yield typed


def _some(values: list[str], choose: random.Random, share: float) -> list[str]:
    return choose.sample(values, max(1, round(share * len(values)))) if values else []


def _together(report: Report, choose: random.Random, count: int) -> None:
    """Several wrong values at once, each of which must be named; and pairs of good ones, which may contradict."""
    settings = Settings.model_fields
    for _ in range(count):
        names = choose.sample(sorted(settings), choose.randint(2, 8))
        ways = [choose.choice(_ways(name, settings[name], choose.choice(wrong(settings[name])))) for name in names]
        ways = [each for each in ways if not _ends_parsing(each)]
        report.counts["several wrong values at once"] += 1
        report.violations += _refused(_both(ways), [_name(each) for each in ways]) if ways else []
        pair = choose.sample(sorted(settings), choose.randint(2, 3))
        ways = [choose.choice(_ways(name, settings[name], choose.choice(_good(settings[name])))) for name in pair]
        report.counts["several values against one another"] += 1
        report.violations += _taken_or_refused(_both(ways)) or []


def wrong(setting: FieldInfo) -> list[str]:
    """What this flag can never have: by its kind, beyond its bounds, and none of its choices."""
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
    return [*_NEVER[kind], *beyond]


def odd(setting: FieldInfo) -> list[str]:
    """What this flag may have or not: its bounds, its choices, and strange texts."""
    kind = _kind(setting)
    if isinstance(kind, tuple):
        return list(kind)
    bounds = [getattr(each, bound) for each in setting.metadata for bound in ("ge", "le") if hasattr(each, bound)]
    return [*map(str, bounds), *_MAYBE.get(kind, []), *(["true", "false"] if kind is bool else [])]


def _good(setting: FieldInfo) -> list[str]:
    kind = _kind(setting)
    return ["nowhere"] if kind is Path else ["127.0.0.1:0", "64x64", "os:getcwd"] if kind is str else odd(setting)


def _kind(setting: FieldInfo) -> Any:
    """int, float, bool, Path or str; or the choices."""
    kind = setting.annotation
    while (arguments := typing.get_args(kind)) and typing.get_origin(kind) is not typing.Literal:
        kind = next(each for each in arguments if each is not NoneType)
    return typing.get_args(kind) or kind


def _ways(name: str, setting: FieldInfo, value: str) -> list[Typed]:
    flag = f"--{name.replace('_', '-')}"
    variable = Typed(variables=((f"T2I_{name.upper()}", value),))
    if _kind(setting) is bool:
        return [variable]  # the flag takes no value
    return [Typed((f"{flag}={value}",)), variable]


def _both(ways: Sequence[Typed]) -> Typed:
    return Typed(sum((each.flags for each in ways), ()), sum((each.variables for each in ways), ()))


def _name(typed: Typed) -> str:
    return typed.flags[0].partition("=")[0] if typed.flags else typed.variables[0][0]


def _ends_parsing(typed: Typed) -> bool:
    """Whether the command line cannot even be split into flags, which is said before any value is looked at."""
    try:
        with _environment(typed.variables):
            read(typed.flags)
    except InvalidSettings as error:
        return not error.problems[0].startswith(_name(typed))
    return False


def _refused(typed: Typed, names: Sequence[str]) -> list[str]:
    """What is wrong with how it was refused: a sentence must begin with each name."""
    try:
        with _environment(typed.variables):
            read(typed.flags)
    except InvalidSettings as error:
        if len(error.problems) == 1 and error.problems[0].startswith(f"argument {names[0]}"):
            return _unfit(typed, error.problems)
        unnamed = [name for name in names if sum(each.startswith(f"{name}: ") for each in error.problems) != 1]
        found = [f"no sentence, or several, for {unnamed}: {error.problems}"] if unnamed else []
        return [f"{words}\n  {typed.command()}" for words in found] + _unfit(typed, error.problems)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is none of ours
        return [f"{type(error).__name__}: {error}\n  {typed.command()}"]
    return [f"was taken\n  {typed.command()}"]


def _taken_or_refused(typed: Typed) -> list[str] | None:
    """None where it was taken, else what is wrong with how it was refused."""
    try:
        with _environment(typed.variables):
            read(typed.flags)
    except InvalidSettings as error:
        return _unfit(typed, error.problems)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is none of ours
        return [f"{type(error).__name__}: {error}\n  {typed.command()}"]
    return None


def _unfit(typed: Typed, problems: Sequence[str]) -> list[str]:
    """Sentences that are none, or not for people; or that name a flag where a variable was typed."""
    flags = {each.partition("=")[0] for each in typed.flags}
    found = []
    for each in problems:
        if "\n" in each or not each.isprintable() or len(each) > _LONGEST or _FORBIDDEN.search(each):
            found.append(f"is no sentence for people: {each!r}\n  {typed.command()}")
        for variable, _ in typed.variables:
            flag = f"--{variable.removeprefix('T2I_').lower().replace('_', '-')}"
            if flag not in flags and re.search(rf"{flag}(?![a-z-])", each):
                found.append(f"names {flag} where {variable} was typed: {each!r}\n  {typed.command()}")
    return found


@contextmanager
def _environment(variables: Sequence[tuple[str, str]]) -> Iterator[None]:
    """With these T2I_ variables and no others."""
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
"""What a server may end with when it cannot serve, each documented."""


def _started(typed: Typed) -> list[str]:
    """Start the real server around the steady model; what is wrong with how that goes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("T2I_")}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/clients/python"} | dict(typed.variables)
        listen = () if any(name[4:] == "LISTEN" for name, _ in typed.variables) else ("--listen", "127.0.0.1:0")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "steady_server.py"), *listen, *typed.flags],
            env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, errors="backslashreplace",
        )  # fmt: skip
        found, code = outcome(process)
        if code == 0 and (left := os.listdir(folder)):
            found.append(f"left {left}")
    return [f"{words}\n  {typed.command()}" for words in found]


def outcome(process: "subprocess.Popen[str]") -> tuple[list[str], int]:
    """Wait until the server serves or ends, and end it; what is wrong with that, and its exit code."""
    lines: list[str] = []
    serves = False
    assert process.stderr is not None
    hung = threading.Timer(PATIENCE, process.kill)
    hung.start()
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if re.search(r"lifecycle(: |\", \"message\": \")serving ", line):
            serves = True
            process.send_signal(signal.SIGTERM)
    code = process.wait(PATIENCE)
    hung.cancel()
    log = "\n".join(lines[-30:])
    found = []
    if "Traceback" in log or "Fatal Python error" in log:
        found.append(f"a traceback:\n{log}")
    if serves and code != 0:
        found.append(f"exit code {code} after SIGTERM:\n{log}")
    if not serves and code not in CODES:
        found.append(f"exit code {code}, which is not documented for this:\n{log}")
    said = [line for line in lines if " ERROR " in line or line.startswith("python -m server: ")]
    if not serves and len(said) != 1 and code != 2:
        found.append(f"{len(said)} sentences and not one:\n{log}")
    return found, code


# The other commands.


def _commands(report: Report) -> None:
    """Options of `t2i` with values that they cannot have, and a command line of server.verify that is wrong."""
    runner = CliRunner()
    for words in _t2i():
        report.counts["t2i with a wrong value"] += 1
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
        report.counts["server.verify with a wrong value"] += 1
        ended = subprocess.run(
            [sys.executable, "-m", "server.verify", *words],
            cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
        unnamed = [name for name in variables if name not in ended.stderr]
        if ended.returncode != 2 or _FORBIDDEN.search(ended.stderr) or unnamed:
            report.violations.append(f"server.verify {words}: exit code {ended.returncode}, {ended.stderr[-500:]}")


def _t2i() -> Iterator[list[str]]:
    """Each command with each option that takes a number or a choice, and with an argument for each that it needs."""
    for name, command in cli.main.commands.items():
        given = ["x" for each in command.params if isinstance(each, click.Argument) and each.required]
        for option in command.params:
            kind = option.type
            numeric = isinstance(kind, click.types.IntParamType | click.types.FloatParamType)
            if option.opts[0].startswith("--") and (numeric or isinstance(kind, click.Choice)):
                for value in ("", "x", "nan", "1e", "\0", "-"):
                    yield [name, *given, f"{option.opts[0]}={value}"]


def repeat(flags: Sequence[str], variables: dict[str, str]) -> list[str]:
    """Try one case alone: how it is refused, or how a server starts with it."""
    typed = Typed(tuple(flags), tuple(variables.items()))
    words = _taken_or_refused(typed)
    return _started(typed) if words is None else words
