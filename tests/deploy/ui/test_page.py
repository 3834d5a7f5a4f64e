"""The page in a real browser: from a dirty file to a model that is downloaded, in two languages; runs that go on."""

import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.deploy.ui.jobs import all_jobs

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no browser: apt-get install chromium"),
]
NAME = "first \"run\" 'é' 🐣".replace('"', "")
PATIENCE = 300


class Server:
    """``halfbyte ui`` over a folder; it can end and begin again."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, "0"
        self.begin()

    def begin(self) -> None:
        words = ["-m", "halfbyte", "ui", "--root", str(self.root), "--port", self.port]
        self.process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                self.url, self.port = found[0], found[1]
                return
        raise AssertionError("it did not begin")

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("ui")
    shutil.copytree(tiny_model_folder, root / "tiny")
    server = Server(root)
    yield server
    server.end()
    for job in all_jobs(root / ".halfbyte-ui" / "jobs"):
        job.stop()


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        page = opened(context, server)
        yield page
        assert page.problems == []
        browser.close()


def opened(context: Any, server: Server, query: str = "") -> Any:
    """Open the page; what its console says is kept, and what it asks of other hosts."""
    page = context.new_page()
    page.problems = problems = []
    page.on("response", lambda got: problems.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((server.url, "data:", "blob:")) else problems.append(asked.url),
    )
    page.goto(server.url + query)
    page.wait_for_selector("#hb-stations")
    wait(page, "#hb-tab-start", "Models|模型")
    return page


def pick(page: Any, place: str, text: str) -> None:
    field = page.locator(f"{place} input")
    field.click()
    field.fill(text)
    field.press("Enter")


def wait(page: Any, place: str, pattern: str) -> str:
    """Wait until a place has a text; return all that it has."""
    ends = time.monotonic() + PATIENCE
    while True:
        text = " ".join(page.locator(place).all_inner_texts())
        if re.search(pattern, text):
            return text
        assert time.monotonic() < ends, f"{pattern!r} is not in {text!r}"
        page.wait_for_timeout(100)


def fill(page: Any, place: str, text: str) -> None:
    page.locator(f"{place} :is(input, textarea)").first.fill(text)


def test_from_a_dirty_file_to_a_model_that_is_downloaded(page: Any, server: Server, tmp_path: Path) -> None:
    rows = [f'{{"Frage": "What is {i}?", "Antwort": "It is {i}."}}' for i in range(60)]
    dirty = tmp_path / "<b>dirty & 数据.jsonl"
    dirty.write_text("\n".join([*rows, '{"Frage": "lonely"}', "{broken"]))
    page.click("#hb-tab-train-button")
    pick(page, "#hb-model", "tiny")
    page.set_input_files("#hb-files input[type=file]", str(dirty))
    assert "Frage" in wait(page, "#hb-preview", "First rows")  # the columns are no known ones
    pick(page, "#hb-prompt", "Frage")
    pick(page, "#hb-completion", "Antwort")
    page.click("#hb-look")
    told = wait(page, "#hb-preview", "Rows to train on")
    assert "no column Antwort" in told and "not JSON" in told and "row 61" in told and ".halfbyte-ui" not in told
    assert "It is" in page.locator(".hb-trained").first.inner_text()
    page.click("#hb-skip input")
    wait(page, "#hb-plan", "Memory at the peak")
    fill(page, "#hb-name", "../escape")
    page.click("#hb-start")
    wait(page, ".hb-told", "cannot be a name")
    fill(page, "#hb-name", NAME)
    page.click("#hb-start")
    wait(page, ".hb-told", "has started")
    page.click("#hb-tab-runs-button")
    pick(page, "#hb-run", f"runs/{NAME}")
    page.wait_for_function("location.search.includes('run=')")
    shown = wait(page, "#hb-shown", "finished")
    assert "Step 4 of 4" in shown and page.locator("#hb-shown svg").count() > 2
    page.reload()
    assert NAME in wait(page, "#hb-shown", "finished")  # the address names it

    page.click("#hb-tab-chat-button")
    pick(page, "#hb-talk", f"runs/{NAME}")
    page.click("#hb-open")
    wait(page, ".hb-told", "is open")
    fill(page, "#hb-message", "What is 3? <b onclick=alert(1)>")
    page.click("#hb-send")
    wait(page, "#hb-left", r"What is 3")
    page.wait_for_selector("#hb-left .bot")
    page.wait_for_selector("#hb-right .bot")
    page.wait_for_timeout(1500)
    page.click("#hb-right-better")
    wait(page, ".hb-told", "the goal DPO learns from it")
    [pair] = [line for file in (server.root / "feedback").glob("*-dpo.jsonl") for line in file.read_text().splitlines()]
    assert '"chosen"' in pair and "What is 3?" in pair
    page.click("#hb-close")

    page.click("#hb-tab-ship-button")
    pick(page, "#hb-ship", f"runs/{NAME}")
    page.wait_for_function("document.querySelector('#hb-card textarea').value.includes('Recipe')")
    fill(page, "#hb-card", "# Mine\n\nMy own words.")
    page.click("#hb-make")
    page.wait_for_selector(".hb-download", timeout=PATIENCE * 1000)
    with page.expect_download() as download:
        page.locator(".hb-download").first.click()
    download.value.save_as(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = {Path(name).name for name in archive.namelist()}
        assert {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        } <= names and archive.testzip() is None
        card = archive.read(f"{NAME}-model/README.md").decode()
    assert card.startswith("# Mine\n\nMy own words.\n") and "## Use" in card


def test_a_run_goes_on_without_the_page_and_its_server_and_is_stopped_and_resumed(page: Any, server: Server) -> None:
    page.click("#hb-tab-train-button")
    pick(page, "#hb-model", "tiny")
    fill(page, "#hb-paste", "\n".join(f'{{"prompt": "{i}?", "completion": "{i * i}."}}' for i in range(200)))
    fill(page, "#hb-name", "long")
    page.get_by_text("More options").click()
    fill(page, "#hb-yaml", "max_steps: 3000\nsave_steps: 5\neval_samples: 0")
    page.click("#hb-start")
    wait(page, ".hb-told", "long has started")
    fill(page, "#hb-name", "after")
    page.click("#hb-start")
    wait(page, ".hb-told", "waits for its turn")
    page.close()
    server.end()
    server.begin()
    context = page.context.browser.new_context(locale="zh-CN", viewport={"width": 390, "height": 844})
    again = opened(context, server, "?run=runs/long")
    wait(again, "#hb-shown", r"第 [1-9][\d,]* 步，共 3,000 步")
    other = opened(context, server, "?run=runs/after")
    wait(other, "#hb-shown", "等待中")
    other.click("#hb-stop")
    wait(other, "#hb-shown", "已停止")
    again.click("#hb-stop")
    wait(again, "#hb-shown", r"long\s+已停止")
    again.click("#hb-resume")
    wait(again, "#hb-shown", r"long\s+运行中")
    again.click("#hb-delete")
    again.click("#hb-really")
    wait(again, ".hb-status", "请先停止它")
    again.click("#hb-stop")
    wait(again, "#hb-shown", r"long\s+已停止")
    ends = time.monotonic() + PATIENCE
    while "已删除" not in " ".join(again.locator(".hb-status").all_inner_texts()):  # its process has to end first
        assert time.monotonic() < ends
        again.click("#hb-really")
        again.wait_for_timeout(3000)
    assert not (server.root / "runs" / "long").exists()
    assert again.problems == [] and other.problems == []


def test_who_begins_before_the_page_is_whole_stays_where_they_went(page: Any, server: Server) -> None:
    page.goto(server.url)
    page.click("#hb-tab-train-button")
    wait(page, "#hb-tab-start", "Models")  # by when all is loaded
    page.wait_for_timeout(500)
    assert page.locator("#hb-start").is_visible()


def test_the_question_is_about_one_run_and_goes_with_it(page: Any, server: Server) -> None:
    for name in ("kept", "asked"):
        (server.root / "runs" / name).mkdir(parents=True)
        (server.root / "runs" / name / "run.json").write_text("{}")
    page.click("#hb-tab-runs-button")
    wait(page, "#hb-runs", "asked")
    pick(page, "#hb-run", "runs/asked")
    page.click("#hb-delete")
    wait(page, ".hb-status", "Is runs/asked to be deleted")
    pick(page, "#hb-run", "runs/kept")
    page.wait_for_selector("#hb-really", state="hidden")
    page.click("#hb-delete")
    wait(page, ".hb-status", "Is runs/kept to be deleted")
    page.click("#hb-really")
    wait(page, ".hb-status", "runs/kept is deleted")
    assert (server.root / "runs" / "asked").exists() and not (server.root / "runs" / "kept").exists()


def test_nothing_outside_of_its_folders_is_shown_or_read(page: Any, server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    page.click("#hb-tab-train-button")
    pick(page, "#hb-model", "tiny")
    fill(page, "#hb-path", str(tmp_path / "secret.jsonl"))
    page.click("#hb-look")
    wait(page, ".hb-told", "outside of the folders")
    for path in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={tmp_path}/secret.jsonl",
        "download/../../etc/passwd",
    ):
        answer = page.request.get(server.url + path)
        assert answer.status in (403, 404) and '"secret"' not in answer.text() and "root:" not in answer.text()
    other = page.request.post(
        server.url + "gradio_api/queue/join", headers={"Origin": "http://evil.example"}, data={"data": []}
    )
    assert other.status == 403
    assert "script-src 'self'" in page.request.get(server.url).headers["content-security-policy"]


def test_the_language_changes_all_that_is_said_and_is_kept(page: Any, server: Server) -> None:
    page.locator("#hb-language label").nth(1).click()
    wait(page, "#hb-tab-train-button", "训练")
    wait(page, "#hb-tab-start", "这台机器上的模型")
    page.click("#hb-tab-train-button")
    page.click("#hb-start")
    wait(page, ".hb-told", "请给运行起个名称")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.reload()
    wait(page, "#hb-tab-train-button", "训练")
    page.click("#hb-tab-train-button")
    page.click("#hb-start")
    wait(page, ".hb-told", "请给运行起个名称")
    fill(page, "#hb-paste", '{"frage": "1?", "antwort": "1."}')
    page.click("#hb-look")
    wait(page, "#hb-preview", "前几行")
    page.locator("#hb-language label").nth(0).click()
    wait(page, "#hb-preview", "First rows")
    assert not re.search("[\u4e00-\u9fff]", " ".join(page.locator(".hb-status").all_inner_texts()))


GRADIOS = {"aria-prohibited-attr": "Empty value", "landmark-unique": "placeholder-content"}
"""What axe finds in gradio's (6.31) own parts: empty pictures and chats."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_somebody_out(server: Server, scheme: str) -> None:
    """WCAG 2.1 A and AA and axe's best practices, by axe-core: names, roles, contrast, headings, of each station."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    levels = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 1000}, bypass_csp=True)
        page = opened(context, server)
        for station in ("start", "train", "chat", "runs", "ship"):
            page.click(f"#hb-tab-{station}-button")
            folded = page.locator(f"#hb-tab-{station} .label-wrap:not(.open)")
            for _ in range(folded.count()):
                folded.first.click()
            page.wait_for_timeout(1000)
            found = axe.run(page, options=levels).response["violations"]
            left = [
                (one["id"], node["html"])
                for one in found
                for node in one["nodes"]
                if GRADIOS.get(one["id"], "\0") not in node["html"]
            ]
            assert left == [], station
        browser.close()


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page: Any) -> None:
    page.locator("#hb-tab-start-button").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hb-start")
    seen = """() => {
      const one = document.activeElement, around = one.closest('label') || one;
      const styles = [one, around].map(x => getComputedStyle(x));
      return [one.id, styles.some(x => x.outlineStyle != 'none' || x.boxShadow != 'none')];
    }"""
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(seen)
        if page.evaluate("document.activeElement.tagName") == "BODY":
            break
        assert shown, page.evaluate("document.activeElement.outerHTML")
        reached.add(name)
    assert {"hb-look", "hb-start"} <= reached
