"""Compressed files: every form that is read, damage of every kind, and archives that would fill the disk."""

import gzip
import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from gpt_jax.errors import UserError
from gpt_jax.inputs import archives
from gpt_jax.inputs.archives import Unpacked


def pack(content: bytes) -> bytes:
    """Compresses with gzip, without the time of day."""
    return gzip.compress(content, mtime=0)


TEXT = b"".join(b"line %d of a text\n" % i for i in range(20_000))
RANDOM = random.Random(0).randbytes(300_000).hex().encode()  # It hardly compresses, so that its pieces end anywhere.


def unpack(path: Path, kind: str) -> bytes:
    with path.open("rb") as file, io.BufferedReader(Unpacked(file, path, kind)) as unpacked:
        return unpacked.read()


def zstd_stream(content: bytes, **options) -> bytes:
    """Compresses without the size of the content in the header, as a pipe does."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("gzip", pack(TEXT), TEXT),
        ("gzip", pack(RANDOM), RANDOM),
        ("gzip", pack(TEXT[:100]) + pack(b"") + pack(TEXT[100:]), TEXT),
        ("gzip", pack(TEXT) + b"\0" * 1000, TEXT),  # padding, as on tapes
        ("gzip", pack(b""), b""),
        ("zstd", zstandard.compress(TEXT), TEXT),
        ("zstd", zstd_stream(RANDOM), RANDOM),
        ("zstd", b"".join(zstandard.compress(line) for line in TEXT[:5000].splitlines(keepends=True)), TEXT[:5000]),
        ("zstd", b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(TEXT), TEXT),  # an index, as pzstd writes it
        ("zstd", zstandard.compress(TEXT) + b"\x50\x2a\x4d\x18\x03\0\0\0abc", TEXT),
        ("zstd", zstandard.compress(b""), b""),
        ("zstd", zstandard.compress(b"") + zstandard.compress(TEXT), TEXT),
    ],
)
def test_every_member_and_frame_is_read(tmp_path, kind, content, expected):
    (tmp_path / "file").write_bytes(content)
    assert unpack(tmp_path / "file", kind) == expected


def test_zstd_with_a_long_window_is_read(tmp_path):
    """Large collections of text were compressed with `zstd --long=31`, which the library refuses by default."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    (tmp_path / "long.zst").write_bytes(zstd_stream(TEXT, compression_params=parameters))
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "long.zst").read_bytes())
    assert unpack(tmp_path / "long.zst", "zstd") == TEXT


@pytest.mark.parametrize("size", [1, 5, 250_000, -1])
@pytest.mark.parametrize(("kind", "whole"), [("gzip", pack(RANDOM)), ("zstd", zstd_stream(RANDOM))])
def test_a_file_that_ends_early_is_an_error_wherever_it_ends(tmp_path, kind, whole, size):
    (tmp_path / "cut").write_bytes(whole[:size])
    with pytest.raises(UserError, match=rf"cut: broken {kind} archive") as caught:
        unpack(tmp_path / "cut", kind)
    assert (" after 0 bytes of content" in str(caught.value)) == (size in (1, 5))


@pytest.mark.parametrize(
    ("kind", "whole"), [("gzip", pack(TEXT)), ("zstd", zstandard.ZstdCompressor(write_checksum=True).compress(TEXT))]
)
def test_garbage_after_the_end_and_damage_inside_are_errors(tmp_path, kind, whole):
    middle = len(whole) // 2
    for content in (whole + b"garbage", whole[:middle] + b"????" + whole[middle + 4 :], whole[:2] + b"garbage"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=rf"file: broken {kind} archive"):
            unpack(tmp_path / "file", kind)


def test_zstd_that_needs_a_dictionary_is_an_error(tmp_path):
    samples = [b"line %d of a text and more of it\n" % i for i in range(2000)]
    dictionary = zstandard.train_dictionary(1000, samples)
    (tmp_path / "d.zst").write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(TEXT))
    with pytest.raises(UserError, match=r"d.zst: broken zstd archive after 0 bytes of content: .*[Dd]ictionary"):
        unpack(tmp_path / "d.zst", "zstd")


BOMB = """
import io, resource, sys
from pathlib import Path
from gpt_jax.errors import UserError
from gpt_jax.inputs.archives import Unpacked
import gpt_jax.inputs.archives, gzip, zstandard

path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    with io.BufferedReader(Unpacked(path.open("rb"), path, sys.argv[2])) as file:
        while file.read(1 << 16):
            pass
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_an_archive_of_zeros_is_refused_without_filling_the_memory(tmp_path, kind):
    content = pack(bytes(1 << 24)) * 8 if kind == "gzip" else zstd_stream(bytes(1 << 29))
    path = tmp_path / "zeros"
    path.write_bytes(content)
    assert len(content) < 200_000
    done = subprocess.run([sys.executable, "-c", BOMB, str(path), kind], capture_output=True, text=True, check=True)
    message, kilobytes = done.stdout.splitlines()
    assert f"{path}: unpacks to more than 67,108,864 bytes (the limit is 200 times its size, or 67,108,864)" in message
    assert message.endswith(f"; if it really is text, decompress it yourself with {kind} -d")
    assert int(kilobytes) < 300_000


def test_the_limit_grows_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1000)
    (tmp_path / "small").write_bytes(pack(b"a" * 100_000))
    with pytest.raises(UserError, match="unpacks to more than"):
        unpack(tmp_path / "small", "gzip")
    (tmp_path / "large").write_bytes(pack(RANDOM) + pack(b"a" * 100_000))
    assert len(unpack(tmp_path / "large", "gzip")) == 700_000
