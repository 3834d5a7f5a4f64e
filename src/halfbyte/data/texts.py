"""Files of bytes as text: unpacked, and in the encoding that they are in.

Packing is told by the first bytes (gzip, bzip2, zstd, which Arrow unpacks as they are read; xz). The encoding is the
one that is given, or that a byte order mark tells, or else it is found at the first bytes that are not ASCII: UTF-8 if
they are valid, and if they are not, by how they stand. In Windows-1252 they stand alone among letters, in GB18030 in
pairs; what is neither is for charset-normalizer. In UTF-8 a few invalid bytes among many valid characters are damage,
not another encoding. UTF-16 without a mark shows in zeros and control characters, which no other text has so many of.
"""

import codecs
import io
import lzma
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, TextIO, cast

from halfbyte.data.examples import BadRow
from halfbyte.errors import InputError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

PACKINGS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
SUFFIXES = (".gz", ".bz2", ".zst", ".xz")
"""Endings of packed files, which are no part of a file's kind."""
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
BLOCK = 1 << 20
SAMPLE = 1 << 16
"""Bytes, from the first that is not ASCII, that tell an encoding."""
ENOUGH = 200
"""Bytes beyond ASCII that are in pairs throughout by no chance."""
NO_TEXT = 0.05
"""Share of control characters from which on bytes are no text; of bytes at random it is a tenth."""
SHOWN = {"cp1252": "Windows-1252", "utf_16_le": "UTF-16", "utf_16_be": "UTF-16", "utf-16": "UTF-16", "utf-32": "UTF-32",
         "gb18030": "GB18030", "utf-8": "UTF-8", "utf-8-sig": "UTF-8"}  # fmt: skip
KEPT = "halfbyte.kept"
"""How bytes that an encoding does not have are read: each as a lone surrogate, which no text holds (:func:`damage`)."""


def _keep(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(KEPT, _keep)


def open_bytes(path: Path, file: BinaryIO) -> BinaryIO:
    """Return the unpacked bytes of ``file`` from its beginning."""
    file.seek(0)
    head = file.read(5)
    file.seek(0)
    packing = next((name for mark, name in PACKINGS.items() if head.startswith(mark)), None)
    if packing is None:
        return file
    kept = cast(IO[bytes], _Kept(file))
    unpacked = lzma.LZMAFile(kept) if packing == "xz" else _by_arrow(kept, packing)  # noqa: SIM115 read by the caller
    return io.BufferedReader(_Unpacked(path, packing, unpacked), BLOCK)


def _by_arrow(file: IO[bytes], packing: str) -> "pa.CompressedInputStream":
    import pyarrow as pa  # takes a while to import

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), packing)


class _Unpacked(io.RawIOBase):
    """A stream that unpacks; a damaged file is told."""

    def __init__(self, path: Path, packing: str, stream: "pa.CompressedInputStream | lzma.LZMAFile") -> None:
        self._path, self._packing, self._stream = path, packing, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError) as error:  # Arrow's errors are of the first kind
            reason = str(error).split(": ")[-1].rstrip(".")
            raise InputError(
                f"{self._path} is damaged or cut off: {self._packing} cannot unpack it ({reason}); fetch it again."
            ) from None
        buffer[: len(data)] = data
        return len(data)


def find_encoding(path: Path, file: BinaryIO, given: str | None = None) -> str:
    """Return the encoding of a file, as Python calls it.

    Raises:
        InputError: there is no encoding of the given name, or none is found.
    """
    stream = open_bytes(path, file)
    head = stream.read(BLOCK)
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if given is not None:
        try:
            found = codecs.lookup(given)
        except (LookupError, ValueError):
            found = None
        if found is None or not found._is_text_encoding:
            known = ("utf-8", "utf-16", "gb18030", "windows-1252", "shift_jis", "latin-1")
            raise InputError(f"There is no encoding {given!r} of text{nearest(given, known)}.")
        if marked and found.name.startswith(marked.removesuffix("-sig")):
            return marked  # the mark is no part of the text
        unmarked = {"utf-8": "utf-8-sig", "utf-16": _wide(head[:SAMPLE]) or "utf-16-le", "utf-32": "utf-32-le"}
        return unmarked.get(found.name, found.name)
    if marked:
        return marked
    if (wide := _wide(head[:SAMPLE])) is not None:
        return wide
    while head:
        if not head.isascii():
            first = next(place for place, byte in enumerate(head) if byte > 127)
            sample = head[max(first - 64, 0) : first + SAMPLE]
            return _encoding_of(path, sample + stream.read(max(SAMPLE - len(sample), 0)))
        head = stream.read(BLOCK)
    return "utf-8-sig"


def open_text(path: Path, file: BinaryIO, encoding: str, newline: str | None = None) -> TextIO:
    """Return the text of a file from its beginning; a byte that the encoding does not have becomes a lone surrogate."""
    stream = open_bytes(path, file)
    return io.TextIOWrapper(io.BufferedReader(_Kept(stream), BLOCK), encoding, KEPT, newline)


def shown(encoding: str) -> str:
    """Return an encoding's usual name."""
    return SHOWN.get(encoding, encoding)


class _Kept(io.RawIOBase):
    """A stream that stays open when the text over it is closed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _wide(head: bytes) -> str | None:
    """Return which UTF-16 without a mark this is, if any.

    Every other byte of Latin text is zero then. Of other scripts many bytes would be control characters; a text that
    has them for another reason does not become letters of scripts as well.
    """
    even, odd = head[0::2].count(0), head[1::2].count(0)
    half = len(head) // 2
    if half and max(even, odd) > 0.3 * half and min(even, odd) < 0.05 * half:
        return "utf_16_be" if even > odd else "utf_16_le"
    is_plain = len(_PLAIN.findall(head)) > 0.7 * len(head)  # ASCII, of which pairs would be Chinese characters
    if is_plain or len(_CONTROLS.findall(head)) < max(3, 0.02 * len(head)) or b"\0\0\0\0" in head:
        return None
    shares = {encoding: _share_of_letters(head, encoding) for encoding in ("utf_16_le", "utf_16_be")}
    likely = max(shares, key=lambda encoding: shares[encoding])
    return likely if shares[likely] > 0.95 else None


def _share_of_letters(head: bytes, encoding: str) -> float:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return 0
    return len(_LETTERS.findall(text)) / len(text) if text else 0


_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PLAIN = re.compile(rb"[ -~]")
_LETTERS = re.compile(
    "[\t\n\r -~\u00a0-\u052f\u0590-\u06ff\u0900-\u0dff\u0e00-\u0eff\u10a0-\u10ff\u1e00-\u206f\u3000-\u30ff"
    "\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef\U0001f300-\U0001faff]"
)
"""Characters of the scripts in use, punctuation, and emoji."""


def _encoding_of(path: Path, sample: bytes) -> str:
    valid, invalid = _utf8(sample)
    if not invalid or valid > 2 * invalid:
        return "utf-8-sig"  # if there are invalid bytes, they will be told with their lines
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", sample)]
    alone = sum(length for length in runs if length == 1) / sum(runs)
    if alone < 0.5 and (paired := _pairs(sample)):
        return paired
    if alone >= 0.5 and _decodes(sample, "cp1252"):
        return "cp1252"
    found = _guess(sample) or ("cp1252" if _decodes(sample, "cp1252") else None)
    if found is None and len(_CONTROLS.findall(sample)) > NO_TEXT * len(sample):
        raise InputError(f"{path} is no text, and no data file that can be read here; give JSON, CSV, Parquet or text.")
    if found is None:
        raise InputError(f"{path} is text in no encoding that can be found; name it with encoding (--encoding).")
    return found


def _pairs(sample: bytes) -> str | None:
    """Return the encoding of some lines, or of half of them if others are damaged, if it writes letters in pairs."""
    if _decodes(sample, "gb18030"):
        guess = _guess(sample)
        others = ("cp949", "euc_kr", "euc_jp", *(() if _decodes(sample, "gb2312") else ("big5", "shift_jis", "cp932")))
        if guess and guess in others:
            return guess
        text = sample.decode("gb18030", "ignore")  # kana stand at the same places in EUC-JP, the characters elsewhere
        is_japanese = len(_KANA.findall(text)) > 0.2 * sum(not character.isascii() for character in text)
        return "euc_jp" if is_japanese and _decodes(sample, "euc_jp") else "gb18030"
    lines = sample.splitlines(keepends=True)
    halves = (b"".join(lines[: len(lines) // 2]), b"".join(lines[len(lines) // 2 :])) if len(lines) > 1 else ()
    enough = (half for half in halves if sum(byte > 127 for byte in half) >= ENOUGH)
    return next(filter(None, map(_pairs, enough)), None)


_KANA = re.compile("[\u3041-\u30fe]")


def _guess(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes  # takes a while to import

    guesses = from_bytes(sample)
    best = guesses.best()
    if best is None or best.encoding in ("ascii", "utf_8"):
        return None
    equal = [guess for guess in guesses if (guess.chaos, guess.coherence) == (best.chaos, best.coherence)]
    return "cp1252" if any("cp1252" in guess.could_be_from_charset for guess in equal) else best.encoding


def _decodes(sample: bytes, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        decoder.decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _utf8(sample: bytes) -> tuple[int, int]:
    """Return how many characters beyond ASCII are valid in UTF-8, and how many bytes are not."""
    sample = sample.lstrip(bytes(range(0x80, 0xC0)))  # the rest of a character before the sample
    text = sample.decode("utf-8", "surrogateescape")
    broken = re.findall("[\udc80-\udcff]", text)
    cut = re.search("[\udc80-\udcff]{1,3}$", text)  # the beginning of a character at the end of the sample
    valid = sum(not character.isascii() for character in text) - len(broken)
    if cut and not valid and len(sample) < SAMPLE and not _BEGINS.search(sample):
        cut = None
    return valid, len(broken) - (len(cut[0]) if cut else 0)


_BEGINS = re.compile(rb"([\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{1,2})\Z")
"""A character of UTF-8 that is cut off: one that is not as well a word's last letter (an é is e9) in Windows-1252."""


def nul_bytes(where: str) -> BadRow:
    """Return the bad row ``where`` NUL bytes are: no text has them, but files that were not written to their end."""
    return BadRow(where, "NUL bytes", "holds NUL bytes, as files do that were not written to their end; remove it.")


def damage(line: int, text: str, encoding: str) -> str:
    """Return what is wrong with ``text``, which begins in ``line``, as the end of a sentence; if nothing, ""."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte, place = ord(text[error.start]) & 0xFF, line + text.count("\n", 0, error.start)
        return (
            f"is not {shown(encoding)} text (byte 0x{byte:02x} in line {place}); save the file as UTF-8, or name its "
            "encoding (--encoding)."
        )
    return ""


def damaged(where: str, what: str) -> BadRow:
    """Return the bad row ``where`` bytes are not of the file's encoding, which :func:`damage` has told as ``what``."""
    return BadRow(where, what.partition(" (")[0].removeprefix("is "), what)
