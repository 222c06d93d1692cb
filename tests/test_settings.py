"""What is wrong with flags and T2I_ variables is said in one sentence each, all at once, by the name that was typed."""

import pytest

from server.errors import InvalidSettings
from server.settings import read


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
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_flag_or_variable(monkeypatch, name, value, words):
    if name not in ("device", "scheduling-policy"):  # argparse itself looks at the choices of a flag
        assert problems([f"--{name}={value}"]) == [f"--{name}: {words}"]
    variable = f"T2I_{name.replace('-', '_').upper()}"
    monkeypatch.setenv(variable, value)
    assert problems([]) == [f"{variable}: {words}"]


def test_all_that_is_wrong_is_said_at_once(monkeypatch):
    monkeypatch.setenv("T2I_KSERVE", "maybe")
    assert problems(["--max-queue=x", "--listen=nowhere"]) == [
        "--listen: give HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051, with a port of 0 to 65535, is 'nowhere'",
        "--max-queue: must be a whole number, is 'x'",
        "T2I_KSERVE: must be true or false, is 'maybe'",
    ]


def test_contradictions_are_said_at_once_and_by_the_names_that_were_typed(monkeypatch):
    monkeypatch.setenv("T2I_REFINER", "somewhere")
    monkeypatch.setenv("t2i_tls_key", "key.pem")
    assert problems(["--plaintext-tokens"]) == [
        "T2I_REFINER was given without --base; give both folders, or neither",
        "--tls-certificate and t2i_tls_key go together; give both files, or neither",
        "--plaintext-tokens was given without --tokens",
    ]


def test_a_flag_takes_the_place_of_its_variable(monkeypatch):
    monkeypatch.setenv("T2I_MAX_QUEUE", "3")
    assert read(["--max-queue", "5"]).max_queue == 5
    assert problems(["--max-queue", "x"]) == ["--max-queue: must be a whole number, is 'x'"]


def test_what_is_no_flag_is_shown_on_one_line():
    assert problems(["--no-such-flag", "a\nb\x1b"]) == [
        r"unrecognized arguments: --no-such-flag a\nb\x1b; --help lists the flags"
    ]
