"""`verify` reads every image and says which are broken."""

import struct
import zlib

import pytest

from tnt_lightning.verify import verify

from . import layouts
from .conftest import command, resolved


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 50,000 x 50,000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_broken_images_are_listed_and_the_exit_code_is_1(tmp_path):
    layouts.folder(tmp_path)
    truncated = tmp_path / "train" / "cat" / "cat_0.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:300])
    (empty := tmp_path / "val" / "dog" / "dog_1.JPEG").write_bytes(b"")
    (text := tmp_path / "val" / "dog" / "dog_2.JPEG").write_text("hello")
    (huge := tmp_path / "test" / "cat" / "huge.png").write_bytes(bomb())
    done = command("verify", "data=folder", f"data.root={tmp_path}", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    for file, why in ((truncated, "runcated"), (empty, "empty"), (text, "of none of the kinds JPEG, "), (huge, "bomb")):
        assert any(line.strip().startswith(f"{file}: ") and why in line for line in done.stdout.splitlines()), file
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert rows == [
        ["0", "cat", "6", "4", "5"],
        ["1", "dog", "6", "4", "4"],
        ["", "2 classes", "12", "8", "9"],
        ["", "broken", "1", "2", "1"],
    ]
    assert "4 fault(s):" in done.stdout and sorted(path.name for path in tmp_path.iterdir()) == ["test", "train", "val"]


@pytest.mark.parametrize("subset, lines", [("true", 0), ("false", 2)])
def test_other_counts_than_the_official_ones_are_faults(tmp_path, subset, lines, capfd):
    layouts.cifar10(tmp_path)
    wrong = verify(resolved("data=cifar10", f"data.root={tmp_path}", f"data.subset={subset}"))
    assert len(wrong) == lines and all("officially" in line for line in wrong)
    assert ("a subset: train has 20 images, officially 50,000" in capfd.readouterr().out) == (subset == "true")
