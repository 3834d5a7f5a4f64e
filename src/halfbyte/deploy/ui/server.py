"""From the start to the end: the port, the page, what is downloaded, uvicorn."""

import contextlib
import io
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.deploy.address import bound, is_loopback, listen, url_of
from halfbyte.deploy.ui import uploads
from halfbyte.deploy.ui.options import UiOptions
from halfbyte.deploy.ui.places import Places
from halfbyte.errors import InputError, check_writable
from halfbyte.locks import is_locked, lock

PIECE = 1 << 20
"""Bytes of a file that are read for a download at a time."""


def serve(options: UiOptions, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM; jobs that it began go on.

    Args:
        options: of the command.
        ready: called with the address, once the page can be opened.

    Raises:
        InputError: the port, a folder or the users will not do.
    """
    users = options.users()
    places = Places(options.root or ["."])
    check_writable(places.roots[0])
    uploads.tidy(places)
    for variable in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_SHARE", "GRADIO_ALLOW_FLAGGING"):
        os.environ[variable] = "False"
    with contextlib.closing(bound(options.host, options.port)) as listening, _folder(places.arriving) as place:
        os.environ["GRADIO_TEMP_DIR"] = str(place)
        import uvicorn

        app, ui = make_app(options, places, users)
        try:
            config = uvicorn.Config(
                app, ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2
            )
            server = uvicorn.Server(config)
            listen(listening, options.host, options.port)
            ready(f"{url_of(listening)}/")
            server.run(sockets=[listening])
        finally:
            ui.close()


def make_app(options: UiOptions, places: Places, users: dict[str, str]) -> tuple[Any, Any]:
    """Return the application, and what it holds."""
    import fastapi
    import gradio as gr
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse

    from halfbyte.deploy.ui import jobs
    from halfbyte.deploy.ui.guard import Guard
    from halfbyte.deploy.ui.page import STYLE, make_page, theme
    from halfbyte.deploy.ui.station import Ui
    from halfbyte.deploy.ui.texts import Translated
    from halfbyte.runs.history import read_run
    from halfbyte.runs.report.page import report_page

    language = "en" if options.language == "auto" else options.language
    ui = Ui(options, places, Translated(language))
    inner = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @inner.get("/download/{name}")
    def download(name: str) -> Any:
        known = {job.folder.name: job for job in jobs.all_jobs(places.jobs) if job.kind == "export"}
        job = known.get(name)
        if job is None or job.state != "done" or not job.output.is_dir():
            return PlainTextResponse("There is no such thing to download.", 404)
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{_quoted(job.output.name)}.zip"}
        return StreamingResponse(zipped(job.output), media_type="application/zip", headers=headers)

    @inner.get("/report")
    def report(run: str) -> Any:
        try:
            return HTMLResponse(report_page(read_run(places.inside(run))))
        except InputError:
            return PlainTextResponse("There is no such run.", 404)

    page = make_page(ui)
    page.queue(default_concurrency_limit=8, max_size=64)
    mounted = gr.mount_gradio_app(
        inner, page, path="/", theme=theme(), css=STYLE.read_text(encoding="utf-8"), show_error=True, footer_links=[],
        max_file_size=int(options.max_upload), allowed_paths=[], enable_monitoring=False, ssr_mode=False, pwa=False,
        mcp_server=False, run_history=False,
    )  # fmt: skip
    return Guard(mounted, users, is_loopback(options.host), int(options.max_upload), places.arriving), ui


@contextlib.contextmanager
def _folder(home: Path) -> Iterator[Path]:
    """Yield a folder for what is being sent; those of servers that were killed are removed."""
    home.mkdir(parents=True, exist_ok=True)
    for old in home.iterdir():
        if old.is_dir() and not is_locked(old.with_suffix(".lock")):
            shutil.rmtree(old, ignore_errors=True)
    name = secrets.token_hex(6)
    with lock(home / f"{name}.lock"):
        (home / name).mkdir()
        try:
            yield home / name
        finally:
            shutil.rmtree(home / name, ignore_errors=True)


def zipped(folder: Path) -> Iterator[bytes]:
    """Yield a folder as a ZIP file, as it is read: stored, since weights cannot be made smaller."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
            about = zipfile.ZipInfo.from_file(
                file, Path(folder.name, file.relative_to(folder)), strict_timestamps=False
            )
            with archive.open(about, "w", force_zip64=True) as target, file.open("rb") as source:
                while piece := source.read(PIECE):
                    target.write(piece)
                    yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """A file that cannot seek, whose bytes are taken away as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._held = bytearray()

    def writable(self) -> bool:
        """It is written to."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes."""
        self._held += data
        return len(data)

    def taken(self) -> bytes:
        """Return what has come since the last time."""
        data = bytes(self._held)
        self._held.clear()
        return data


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
