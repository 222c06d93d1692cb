"""The library of the C++ kernels is found in the package or the cache, or built; errors name folder and reason."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import ROOT

from server.acceleration.kernels import cpu, cpu_library
from server.acceleration.kernels.cpu_library import BuildError

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs an x86-64 CPU and g++"
)

NAME = cpu_library._NAME
ANOTHER_FOLDER = "name a folder that can be written to, has room, and is not mounted noexec"


@pytest.fixture(autouse=True)
def _without_prebuilt_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_library, "_PREBUILT", tmp_path / "prebuilt")
    cpu_library._load.cache_clear()
    yield
    cpu_library._load.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return cpu_library.build(tmp_path_factory.mktemp("whole")).read_bytes()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load_in_process(folder: Path | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load the library in a process of its own, which prints the reason if it cannot."""
    program = (
        "import sys, pathlib; from server.acceleration.kernels import cpu_library\n"
        "cpu_library._PREBUILT = pathlib.Path('/nonexistent')\n"
        "try:\n    print(cpu_library.load(pathlib.Path(sys.argv[1]) if sys.argv[1:] else None).linear)\n"
        "except cpu_library.BuildError as error:\n    sys.exit(str(error))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *([] if folder is None else [folder])],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_built_library_is_cached_and_not_built_again(cache: Path):
    assert load_in_process(cache).returncode == 0
    (cached,) = cache.iterdir()
    written = cached.stat().st_mtime_ns
    assert load_in_process(cache, CXX="no-such-compiler").returncode == 0
    assert [each.stat().st_mtime_ns for each in cache.iterdir()] == [written]


def test_prebuilt_library_needs_no_compiler_and_no_cache(cache: Path, whole: bytes, monkeypatch):
    assert cpu_library.prebuild().read_bytes() == whole
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu_library.prebuild().read_bytes() == whole, "it is not built again"
    assert cpu_library.load(cache)
    assert not cache.exists()


def for_arm(library: bytes) -> bytes:
    return library[:18] + b"\xb7\x00" + library[20:]  # ELF's e_machine


def signed(content: bytes) -> bytes:
    return content + cpu_library.hashlib.sha256(content).digest()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda library: b"",
    "truncated": lambda library: library[: len(library) // 2],
    "one bit flipped": lambda library: library[:9000] + bytes([library[9000] ^ 1]) + library[9001:],
    "not a library": lambda library: signed(b"not a library"),
    "for another architecture": lambda library: signed(for_arm(library[:-32])),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_unusable_library_is_built_again(defect: str, cache: Path, whole: bytes):
    """Load it in a process of its own, which a truncated library could kill."""
    cache.mkdir()
    (cache / NAME).write_bytes(BROKEN[defect](whole))
    failed = load_in_process(cache, CXX="no-such-compiler")
    assert re.fullmatch(
        rf"{cache / NAME} (is broken|cannot be loaded: .+); no-such-compiler: No such file or directory; "
        r"install a C\+\+ compiler\n",
        failed.stderr,
    )
    assert load_in_process(cache).returncode == 0
    assert (cache / NAME).read_bytes() == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_cached_library_that_another_user_could_have_written_is_not_loaded(cache: Path, whole: bytes):
    for owner, mode in ((12345, 0o755), (0, 0o757)):
        cpu_library._load.cache_clear()
        cache.mkdir(exist_ok=True)
        (cache / NAME).unlink(missing_ok=True)  # this process has mapped the previous case's file
        (cache / NAME).write_bytes(whole[:-32] + b"\0" * 32)
        (cache / NAME).chmod(mode)
        os.chown(cache / NAME, owner, owner)
        with pytest.raises(cpu_library._UnusableError, match="belongs to somebody else, or can be written by anybody"):
            cpu_library._open(cache / NAME, is_shared=True)
        assert cpu_library.load(cache)
        assert (cache / NAME).read_bytes() == whole
        assert (cache / NAME).stat().st_uid == 0


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "no-such-compiler: No such file or directory; install a C++ compiler"),
        ("false", "false: exit 1; set CXX to a C++ compiler that works"),
        ("/", "/: Permission denied; set CXX to a C++ compiler that can be run"),
    ],
)
def test_error_names_a_compiler_that_is_missing_or_fails(compiler: str, message: str, cache: Path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=re.escape(message)):
        cpu_library.load(cache)
    assert not list(cache.iterdir()), "no file is left"


def test_error_names_a_folder_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").touch()
    message = f"nothing can be written to {tmp_path}/file/cache: Not a directory; let --compile-cache {ANOTHER_FOLDER}"
    with pytest.raises(BuildError, match=re.escape(message)):
        cpu_library.load(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=48k", "nothing can be written to {}: No space left on device"),
        ("ro", "nothing can be written to {}: Read-only file system"),
        ("noexec", "{}/" + NAME + " is on a file system that is mounted noexec"),
    ],
)
def test_error_names_a_full_read_only_or_noexec_cache(options: str, message: str, mounted):
    folder = mounted(options)
    with pytest.raises(BuildError, match=re.escape(f"{message.format(folder)}; let --compile-cache {ANOTHER_FOLDER}")):
        cpu_library.load(folder)
    assert [each.name for each in folder.iterdir()] in ([], [NAME]), "no unfinished file is left"


def test_error_names_a_noexec_temporary_folder(mounted):
    folder = mounted("noexec")
    failed = load_in_process(None, TMPDIR=str(folder))
    assert f"{folder}/" in failed.stderr
    assert f"is on a file system that is mounted noexec; let TMPDIR {ANOTHER_FOLDER}" in failed.stderr


def test_stale_unfinished_builds_are_removed(cache: Path):
    old, new = (cache / f"{cpu_library._UNFINISHED}{name}" for name in ("old", "new"))
    for each in (old, new):
        each.mkdir(parents=True)
        (each / "part").touch()
    os.utime(old, (0, 0))
    cpu_library.build(cache)
    assert sorted(cache.iterdir()) == sorted([new, cache / NAME])


def test_command_builds_into_the_named_folder_or_prints_the_reason(tmp_path: Path, whole: bytes):
    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "server.acceleration.kernels.cpu_library",
            "--output",
            str(tmp_path / "output"),
        ]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
        )

    failed = run(CXX="no-such-compiler")
    assert failed.returncode == 1
    assert failed.stderr.endswith("no-such-compiler: No such file or directory; install a C++ compiler\n")
    assert Path(run().stdout.strip()).read_bytes() == whole


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_the_guess_without_torch_agrees_with_torch():
    assert cpu_library.can_run_here() == cpu.is_supported()
