"""Files are written atomically, and unnamed files are not overwritten."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from text_to_image_client._files import write_atomically
from text_to_image_client.v1 import text_to_image_pb2 as pb


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path):
    path = tmp_path / "cat.jpg"
    assert write_atomically(path, b"one") == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    write_atomically(path, b"two")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two", 0o640)
    assert os.listdir(tmp_path) == ["cat.jpg"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_symbolic_link_stays_a_link(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "cat.jpg").symlink_to(tmp_path / "there" / "real.jpg")
    write_atomically(tmp_path / "cat.jpg", b"one")
    assert (tmp_path / "cat.jpg").is_symlink()
    assert (tmp_path / "there" / "real.jpg").read_bytes() == b"one"


full = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this machine has no /dev/full")


@full
def test_a_device_is_written_and_not_replaced(tmp_path: Path):
    (tmp_path / "cat.jpg").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "cat.jpg", b"one")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert os.listdir(tmp_path) == ["cat.jpg"]


def test_without_overwrite_the_first_free_name_is_used(tmp_path: Path):
    for number, name in enumerate(("cat.jpg", "cat.1.jpg", "cat.2.jpg")):
        assert write_atomically(tmp_path / "cat.jpg", b"%d" % number, overwrite=False) == tmp_path / name
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "cat.jpg": b"0",
        "cat.1.jpg": b"1",
        "cat.2.jpg": b"2",
    }


WRITE = """
import pathlib, resource, sys
from text_to_image_client._files import write_atomically
from text_to_image_client.v1 import text_to_image_pb2 as pb
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # like a disk that fills up during the write
write_atomically(pathlib.Path(sys.argv[1]), b"x" * 5000, overwrite=sys.argv[2] == "overwrite")
"""


@pytest.mark.parametrize("overwrite", ["overwrite", "not"])
@pytest.mark.parametrize("before", [None, b"whole"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, before: bytes | None, overwrite: str):
    path = tmp_path / "cat.jpg"
    if before is not None:
        path.write_bytes(before)
    ended = subprocess.run([sys.executable, "-c", WRITE, path, overwrite], capture_output=True, text=True, check=False)
    assert "File too large" in ended.stderr
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if before is None else [before])


SAVE = """
import resource, sys
from text_to_image_client import Preview
from text_to_image_client.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
main(sys.argv[1:])
"""


@pytest.mark.parametrize("large", ["image", "preview", "metadata"])
def test_t2i_leaves_no_partial_file_and_reports_the_reason(service, image_metadata, tmp_path: Path, large: str):
    size = {name: 5000 if name == large else 5 for name in ("image", "preview", "metadata")}
    image_metadata.scheduler = "x" * size["metadata"]
    ready = pb.ChoiceReady(choice=pb.Choice(raw=b"x" * size["image"]), metadata=image_metadata)
    service.answer(
        [
            pb.StreamGenerateResponse(preview=pb.Preview(raw=b"x" * size["preview"])),
            pb.StreamGenerateResponse(choice=ready),
            pb.StreamGenerateResponse(done=pb.Done(metadata=pb.Metadata(images=[image_metadata]))),
        ]
    )
    names = {"image": "cat.jpg", "preview": "preview.jpg", "metadata": "cat.json"}
    arguments = [
        "generate",
        "cat",
        "-o",
        names["image"],
        "--preview",
        names["preview"],
        "--metadata",
        names["metadata"],
    ]
    ended = subprocess.run(
        [sys.executable, "-c", SAVE, *arguments, "--target", service.target],
        cwd=tmp_path,
        # Coverage would fail to write its own file, too.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert f"Error: cannot write {names[large]}: File too large\n" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert names[large] not in os.listdir(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@full
def test_a_full_disk_behind_stdout_is_reported(service, image_metadata):
    service.answer(pb.GetModelResponse(name="mini"))
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "text_to_image_client", "model", "--target", service.target],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert "Error: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
