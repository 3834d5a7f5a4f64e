"""Whether what is installed goes together: the versions that packages ask of each other, and their files on the disk.

Read from pip's metadata alone, so that it works where nothing can be imported:

    requirements   all that halfbyte needs, and what that needs in turn, against the versions that are there
    extras         a library that halfbyte can do without, but in a version that it was not made for
    twice          two versions of a library in one folder, as an upgrade leaves them that was broken off
    files          each file of a library is there and as long as RECORD says
    shadows        a file or folder of a library's name that Python finds before the library
"""

import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from halfbyte.errors import counted, named
from halfbyte.plan.doctor.finding import Finding, looked

ROOT = "halfbyte"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
"""Whose versions are always told."""
WHOLE = (*LIBRARIES, "safetensors", "tokenizers", "huggingface-hub", "numpy", "pydantic", "gguf", "pyarrow")
"""Whose files are looked at, beside those of what halfbyte needs directly."""
MODULES = {"huggingface-hub": "huggingface_hub"}
"""What is imported, where the name is another."""
MOVING = (".pyc", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Ends of files that others write."""

Index = Mapping[str, Sequence[Distribution]]


def check(path: Sequence[str] | None = None) -> list[Finding]:
    """Return what is found of the distributions in the folders of ``path`` (of this Python, if None)."""
    path = list(sys.path if path is None else path)
    there = index(path)
    findings = list(_versions(there))
    for what, look in (
        ("requirements", lambda: requirements(there)),
        ("extras", lambda: extras(there)),
        ("installed twice", lambda: twice(there)),
        ("leftovers", lambda: leftovers(path)),
        ("files", lambda: files(there)),
        ("shadowed", lambda: shadows(there, path)),
    ):
        findings += looked(what, look)
    return findings


def index(path: Sequence[str]) -> Index:
    """Return the distributions in the folders of ``path`` by their names, the one that is imported first."""
    found: dict[str, list[Distribution]] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        name = distribution.metadata["Name"]
        if name:  # a damaged folder has none
            found.setdefault(canonicalize_name(name), []).append(distribution)
    return found


def _versions(there: Index) -> Iterator[Finding]:
    for name in LIBRARIES:
        if name in there:
            yield Finding(name, there[name][0].version)


def requirements(there: Index) -> Iterator[Finding]:
    """Yield what halfbyte needs, directly or not, and that is not there or of another version."""
    if ROOT not in there:
        yield Finding(
            ROOT,
            "has no metadata",
            "It runs from a folder of sources, so nobody knows whether its libraries are those that it needs.",
            "pip install .",
            "note",
        )
        return
    seen: set[tuple[str, str]] = set()
    missing: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(ROOT, frozenset())]
    while waiting:
        owner, wished = waiting.pop(0)
        for requirement in _of(there[owner][0], wished):
            name = canonicalize_name(requirement.name)
            if name not in there:
                if name not in missing:
                    missing.add(name)
                    yield _missing(owner, requirement)
                continue
            version = there[name][0].version
            if not requirement.specifier.contains(version, prereleases=True):
                yield _other(owner, requirement, version, "fault" if owner == ROOT else "warning")
            for extra in ("", *requirement.extras):
                if (name, extra) not in seen:
                    seen.add((name, extra))
                    waiting.append((name, frozenset({extra} - {""})))


def extras(there: Index) -> Iterator[Finding]:
    """Yield what is there, is not needed, and is of a version that halfbyte was not made for."""
    if ROOT not in there:
        return
    needed = {requirement.name for requirement in _of(there[ROOT][0], frozenset())}
    told: set[str] = set()
    for requirement in map(Requirement, there[ROOT][0].requires or ()):
        name = canonicalize_name(requirement.name)
        if requirement.name in needed or name in told or name not in there:
            continue
        version = there[name][0].version
        if not requirement.specifier.contains(version, prereleases=True):
            told.add(name)
            yield _other(ROOT, requirement, version, "warning")


def _of(distribution: Distribution, extra: frozenset[str]) -> Iterator[Requirement]:
    """Yield what a distribution needs here; with one of its extras also what that needs."""
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of an old package's, that pip passes over too
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": one}) for one in extra or {""}):
            yield requirement


def _missing(owner: str, requirement: Requirement) -> Finding:
    return Finding(
        requirement.name,
        f"is not installed, and {owner} needs {_wish(requirement)}",
        "What needs it ends with an ImportError.",
        f"pip install '{_wish(requirement)}'",
        "fault",
    )


def _other(owner: str, requirement: Requirement, version: str, level: str) -> Finding:
    why = (
        "halfbyte reads private names of these libraries, and was tested with those versions alone: with another one "
        "it may end with an error, or compute something else."
        if owner == ROOT
        else f"{owner} was made for another version and may end with an error."
    )
    return Finding(
        requirement.name,
        f"is {version}, and {owner} needs {_wish(requirement)}",
        why,
        f"pip install '{_wish(requirement)}'",
        "fault" if level == "fault" else "warning",
    )


def _wish(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def twice(there: Index) -> Iterator[Finding]:
    """Yield libraries of which two versions stand in one folder."""
    for name, found in sorted(there.items()):
        homes: dict[str, set[str]] = {}
        for distribution in found:
            homes.setdefault(str(distribution.locate_file("")), set()).add(distribution.version)
        for home, versions in homes.items():
            if len(versions) > 1:
                yield Finding(
                    "installed twice",
                    f"{name} {named(sorted(versions))} in {home}",
                    "An upgrade was broken off: its files are some of one version and some of the other.",
                    f"pip uninstall -y {name}; pip uninstall -y {name}; pip install {name}",
                    "fault" if canonicalize_name(name) in WHOLE else "warning",
                )


def leftovers(path: Sequence[str]) -> Iterator[Finding]:
    """Yield what a pip that was broken off has left: it renames what it removes to ``~ame``."""
    left = [str(folder) for home in path if Path(home).is_dir() for folder in sorted(Path(home).glob("~*"))]
    if left:
        yield Finding(
            "leftovers",
            named(left),
            "A pip that was broken off left these; they take space, and pip warns of them each time.",
            f"rm -r {' '.join(left)}",
            "note",
        )


def files(there: Index) -> Iterator[Finding]:
    """Yield libraries with files that are missing, or longer or shorter than they were installed."""
    direct = _of(there[ROOT][0], frozenset()) if ROOT in there else ()
    for name in dict.fromkeys([*WHOLE, *(canonicalize_name(requirement.name) for requirement in direct)]):
        if name not in there:
            continue
        distribution = there[name][0]
        missing, other = _damaged(distribution)
        if not missing and not other:
            continue
        parts = [
            f"{counted(len(names), 'file')} of {name} {said} ({named(names[:3])}{' ...' if len(names) > 3 else ''})"
            for names, said in ((missing, "not there"), (other, "of another size than they were installed with"))
            if names
        ]
        yield Finding(
            "files",
            "; ".join(parts),
            "The library is damaged: it may end with an error anywhere, or compute something else.",
            f"pip install --force-reinstall --no-deps {name}=={distribution.version}",
            "fault" if missing else "warning",
        )


def _damaged(distribution: Distribution) -> tuple[list[str], list[str]]:
    """Return the files of a distribution that are not there, and those of another size."""
    missing, other = [], []
    for file in distribution.files or ():
        if file.size is None or str(file).startswith("..") or file.name.endswith(MOVING):
            continue
        try:
            size = Path(str(distribution.locate_file(file))).stat().st_size
        except OSError:
            missing.append(str(file))
            continue
        if size != file.size:
            other.append(str(file))
    return missing, other


def shadows(there: Index, path: Sequence[str]) -> Iterator[Finding]:
    """Yield libraries that Python does not find where they are installed."""
    for name in (*WHOLE, "bitsandbytes"):
        if name not in there or "editable" in (there[name][0].read_text("direct_url.json") or ""):
            continue
        module = MODULES.get(name, name)
        spec = importlib.machinery.PathFinder.find_spec(module, list(path))
        where = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        home = Path(str(there[name][0].locate_file(""))).resolve()
        if where and not Path(where).resolve().is_relative_to(home):
            yield Finding(
                "shadowed",
                f"import {module} finds {where}, and {name} is installed in {home}",
                "A file or folder of that name stands before the library: its names are not the library's.",
                f"mv {where} {where}.away",
                "fault",
            )
