"""What mkdocs is told when it makes a site of docs/: README.md is its first page, and links out of docs/ lead on.

Pages are written to be read in the repository, where ``../LOG.md`` and ``../src/halfbyte/...`` are beside docs/. On the
site what is linked to lies under ``repository/``, pages as pages and all else as it is; that of a folder is its text
alone. Headings have GitHub's anchors, in Chinese too. Notebooks are pages with their outputs.
"""

import base64
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS, HOME, OUTSIDE, NOTEBOOK = "docs/", "README.md", "repository/", ".ipynb"
PICTURE = "what the code above draws"
FENCED = re.compile(r"(^```.*?^```|^~~~.*?^~~~)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))|^(\[[^\]]+\]: +)(\S+)()$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Let headings have the anchors that GitHub gives them."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the first page, lessons as pages, and what pages link to outside of docs/."""
    files.append(_file(HOME, config))
    for file in [file for file in files if file.src_uri.endswith(NOTEBOOK)]:
        files.remove(file)
        text, pictures = lesson(DOCS + file.src_uri)
        files.append(File.generated(config, of_site(DOCS + file.src_uri), content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(file.src_uri), name), content=picture))
    waiting = [DOCS + file.src_uri for file in files.documentation_pages() if file.src_uri != "index.md"] + [HOME]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if target in seen or target.startswith(DOCS) or not (ROOT / target).is_file():
                continue
            seen.add(target)
            files.append(_file(target, config))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead where their targets are on the site."""
    here = of_repository(page.file.src_uri)

    def moved(begin: str, target: str, end: str) -> str:
        path, mark, place = target.partition("#")
        if "://" in target or not path or target.startswith("mailto:"):
            return f"{begin}{target}{end}"
        full = _resolved(here, path)
        if (ROOT / full).is_dir():
            return begin.removesuffix("](").lstrip("!").removeprefix("[") if end else f"{begin}{target}{end}"
        return (
            f"{begin}{posixpath.relpath(of_site(full), posixpath.dirname(page.file.src_uri) or '.')}{mark}{place}{end}"
        )

    return _with_links(markdown, moved)


def lesson(path: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as a page, and the pictures that lie beside it by their names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in nbformat.read(ROOT / path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        shell = cell.source.startswith("%%bash\n")
        parts.append(_fence("bash" if shell else "python", cell.source.removeprefix("%%bash\n")))
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{posixpath.basename(path).removesuffix(NOTEBOOK)}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{PICTURE}]({name})")
            else:
                parts.append(_fence("text", output.get("text") or data["text/plain"]))
    return "\n\n".join(parts), pictures


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def anchor(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def of_site(path: str) -> str:
    """Return where a file of the repository is on the site."""
    if path.startswith(DOCS):
        uri = path.removeprefix(DOCS)
        return f"{uri.removesuffix(NOTEBOOK)}.md" if uri.endswith(NOTEBOOK) else uri
    return "index.md" if path == HOME else OUTSIDE + path


def of_repository(uri: str) -> str:
    """Return which file of the repository a page of the site is."""
    return HOME if uri == "index.md" else uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS + uri


def _with_links(markdown: str, moved: Callable[[str, str, str], str]) -> str:
    parts = FENCED.split(markdown)
    parts[::2] = [
        LINK.sub(lambda m: moved(*(m.group(1, 2, 3) if m[1] is not None else m.group(4, 5, 6))), part)
        for part in parts[::2]
    ]
    return "".join(parts)


def _targets(page: str) -> list[str]:
    found: list[str] = []

    def seen(begin: str, target: str, end: str) -> str:
        if "://" not in target and not target.startswith(("#", "mailto:")):
            found.append(_resolved(page, target.partition("#")[0]))
        return ""

    _with_links(_text(page), seen)
    return found


def _text(page: str) -> str:
    file = ROOT / page
    return file.read_text(encoding="utf-8") if file.exists() else lesson(f"{page.removesuffix('.md')}{NOTEBOOK}")[0]


def _resolved(page: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def _file(path: str, config: Any) -> Any:
    return File.generated(config, of_site(path), abs_src_path=str(ROOT / path))
