"""What is wrong with flags and T2I_ variables is said in one sentence each, all at once, by the name that was typed."""

import re

import pytest
from serving import ROOT

from server.errors import InvalidSettings
from server.settings import GROUPS, Settings, read, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2I_COMPILE", raising=False)  # which conftest.py may set


def problems(flags: list[str]) -> list[str]:
    with pytest.raises(InvalidSettings) as caught:
        read(flags)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max-queue", "many", "must be a whole number, is 'many'"),
        ("max-queue", "", "must be a whole number"),
        ("max-queue", "0", "must be at least 1, is '0'"),
        ("max-queue", "9" * 5000, f"must be a whole number, is '{'9' * 63}..."),
        ("max-queue-pixels", "9" * 400, f"must be at most 9007199254740992, is '{'9' * 63}..."),
        ("device-timeout-seconds", "nan", "must be at most 86400, is 'nan'"),
        ("device-timeout-seconds", "0", "must be above 0, is '0'"),
        ("slow-reader-seconds", "soon", "must be a number, is 'soon'"),
        ("device", "CUDA", "must be one of auto, cuda, mps, cpu, is 'CUDA'"),
        ("scheduling-policy", "FIRST_COME", "must be one of shortest, first-come, is 'FIRST_COME'"),
        ("tokens", "", "must not be empty"),
        ("ready-file", ".", "must be the path of a file, is '.'"),
        ("ready-file", "/", "must be the path of a file, is '/'"),
        ("model-name", " ", "give a name of 1 to 128 characters, on one line, is ' '"),
        ("model-name", "\udcff", r"give a name of 1 to 128 characters, on one line, is '\udcff'"),
    ],
)
def test_invalid_value_is_rejected_by_its_flag_or_variable(monkeypatch, name, value, words):
    if name not in ("device", "scheduling-policy"):  # argparse itself looks at the choices of a flag
        assert problems([f"--{name}={value}"]) == [f"--{name}: {words}"]
    variable = f"T2I_{name.replace('-', '_').upper()}"
    monkeypatch.setenv(variable, value)
    assert problems([]) == [f"{variable}: {words}"]


def test_all_problems_are_reported_at_once(monkeypatch):
    monkeypatch.setenv("T2I_KSERVE", "maybe")
    assert problems(["--max-queue=x", "--listen=nowhere"]) == [
        "--listen: give HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051, with a port of 0 to 65535, is 'nowhere'",
        "T2I_KSERVE: must be true or false, is 'maybe'",
        "--max-queue: must be a whole number, is 'x'",
    ]


def test_conflicts_are_reported_at_once_by_the_given_names(monkeypatch):
    monkeypatch.setenv("T2I_REFINER", "somewhere")
    monkeypatch.setenv("t2i_tls_key", "key.pem")
    assert problems(["--plaintext-tokens"]) == [
        "T2I_REFINER was given without --base; give both folders, or neither",
        "--tls-certificate and t2i_tls_key go together; give both files, or neither",
        "--plaintext-tokens was given without --tokens",
    ]


def test_flag_overrides_its_variable(monkeypatch):
    monkeypatch.setenv("T2I_MAX_QUEUE", "3")
    assert read(["--max-queue", "5"]).max_queue == 5
    assert problems(["--max-queue", "x"]) == ["--max-queue: must be a whole number, is 'x'"]


def test_unknown_flag_is_shown_on_one_line():
    assert problems(["--no-such-flag", "a\nb\x1b"]) == [
        r"unrecognized arguments: --no-such-flag a\nb\x1b; --help lists the flags"
    ]


def test_unknown_flag_comes_with_the_nearest_one():
    assert problems(["--max-qeue", "3"]) == [
        "unrecognized arguments: --max-qeue 3 (did you mean --max-queue?); --help lists the flags"
    ]
    assert problems(["--no-reflexion"]) == [
        "unrecognized arguments: --no-reflexion (did you mean --no-reflection?); --help lists the flags"
    ]


def test_help_shows_placeholders_and_each_default_once(capsys):
    with pytest.raises(SystemExit):
        read(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ("--listen ADDRESS", "--base PATH", "--max-queue N", "--grace-seconds SECONDS", "--model-name NAME"):
        assert f"{flag} " in shown
    assert "Default: the embedded ensemble. --refiner" in shown
    assert "so that grpcurl needs no proto files. Default: on." in shown
    assert "(default" not in shown


def test_help_groups_the_flags(capsys):
    with pytest.raises(SystemExit):
        read(["--help"])
    shown = capsys.readouterr().out
    flags = [name for name in Settings.model_fields if name in GROUPS]
    assert flags == list(GROUPS)
    titles = [line[:-1] for line in shown.splitlines() if line in {f"{title}:" for title in GROUPS.values()}]
    assert titles == list(GROUPS.values())
    options = shown.partition("options:")[2].partition("network:")[0]
    assert "--" in options
    assert not any(f"--{name.replace('_', '-')} " in options for name in Settings.model_fields)


def test_unknown_variables_are_found_unless_the_client_reads_them(monkeypatch):
    assert unknown_variables() == []
    for name in ("T2I_MAX_QEUE", "t2i_warm_up", "T2I_MAX_QUEUE", "t2i_listen", "T2I_TOKEN", "T2IX"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == ["T2I_MAX_QEUE (did you mean T2I_MAX_QUEUE?)", "t2i_warm_up"]


def test_the_clients_variables_are_known(monkeypatch):
    sources = (ROOT / "clients" / "python" / "text_to_image_client").rglob("*.py")
    variables = {name for source in sources for name in re.findall(r"\bT2I_[A-Z_]+", source.read_text("utf-8"))}
    assert "T2I_TARGET" in variables
    for name in variables:
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == []
