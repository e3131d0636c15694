"""Jane Austen's six novels as running prose, read out of Debian's package r-cran-janeaustenr."""

import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

RDB = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRSXP = 16  # R's type number of a character vector
HELD_OUT = 0.05  # the last part of every novel, by characters
CHAPTER = re.compile(r"(chapter|volume) [ivxlc\d]+", re.IGNORECASE)
LAST_WORDS = {"finis", "the end"}
EDITORS_NOTE = "A NOTE ON THE TEXT"  # stands after the end of one novel, and is not the author's


def members(deb: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of a .deb, which is an `ar` archive: 60-byte headers, even offsets."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(" /"), int(deb[at + 48 : at + 58])
        yield name, deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def lazy_load_database(deb: Path) -> bytes:
    """The R lazy-load database of the novels."""
    data = next(body for name, body in members(deb.read_bytes()) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.extractfile(RDB)
        assert found is not None
        return found.read()


def character_vector(entry: bytes) -> list[str]:
    """A character vector in R's binary serialisation (XDR, version 3)."""
    (name_length,) = struct.unpack_from(">i", entry, 14)  # the native encoding's name
    flags, count = struct.unpack_from(">ii", entry, 18 + name_length)
    assert entry[:2] == b"X\n"
    assert flags & 0xFF == STRSXP
    at, strings = 26 + name_length, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", entry, at + 4)  # after the string's flags
        strings.append(entry[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def novels_in_lines(rdb: bytes) -> Iterator[list[str]]:
    """Every entry of the database is a length of 4 bytes, then a zlib stream."""
    while rdb:
        stream = zlib.decompressobj()
        yield character_vector(stream.decompress(rdb[4:]))
        rdb = stream.unused_data


def paragraphs(lines: list[str]) -> list[str]:
    """Wrapped lines joined; title page, headings and emphasis marks dropped; "" between chapters."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(lines))]
    headings = [at for at, block in enumerate(blocks) if CHAPTER.fullmatch(block)]
    end = blocks.index(EDITORS_NOTE) if EDITORS_NOTE in blocks else len(blocks)
    body = ["" if CHAPTER.fullmatch(block) else block for block in blocks[headings[0] : end]]
    prose = [block.replace("_", "").replace(" * ", " ") for block in body]
    return [text for text in prose if text.lower() not in LAST_WORDS and not text.startswith(("*", "["))]


def chapters(blocks: list[str]) -> list[str]:
    """The paragraphs of each chapter, one a line."""
    texts = [text.strip("\n") for text in "\n".join(blocks).split("\n\n")]
    return [text + "\n" for text in texts if text]


def split(deb: Path) -> tuple[list[str], list[str]]:
    """Training chapters of all novels, and one held-out text for each novel: its last part."""
    training, held_out = [], []
    for lines in novels_in_lines(lazy_load_database(deb)):
        blocks = paragraphs(lines)
        left, cut = HELD_OUT * sum(map(len, blocks)), len(blocks)
        while left > 0:
            cut -= 1
            left -= len(blocks[cut])
        training += chapters(blocks[:cut])
        held_out.append("\n".join(filter(None, blocks[cut:])) + "\n")
    return training, held_out
