"""The page in a real browser: typing, streaming, cancelling, an error, adapters side by side.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver), else it is
skipped. `make test-browser PICTURES=docs/images` also makes the pictures of docs/serve.md, of the
demo's runs in runs/.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from t5x_lite.serving import app
from t5x_lite.serving.hosting import Host
from t5x_lite.serving.serve import open_all
from t5x_lite.serving.worker import Worker
from tests import folders
from tests.serving.common import EchoEngine, OneDevice, running, wait_for

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402 (after the check)
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PICTURES = os.environ.get("PICTURES")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no Chromium with its driver here: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1000,760",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def gpt2(scratch):
    folder = folders.hugging_face("peft/gpt2/base", scratch)
    adapter = folders.FIXTURES / "peft" / "gpt2" / "adapter"
    return Host("small", open_all(str(folder), {"tuned": str(adapter)}, None, OneDevice()))


class Page:
    """What a person does and sees."""

    def __init__(self, browser, host, engines, places=40):
        self.browser = browser
        self.worker = Worker(engines, places)
        self.app = app.build(host, self.worker)

    @contextlib.contextmanager
    def open(self):
        try:
            with running(self.app) as client:
                self.browser.get(str(client.base_url))
                self.until(lambda: self.all("[role=tab]"))
                yield self
                self.browser.get("about:blank")  # leaves: connections end
        finally:
            self.worker.close()
        problems = [entry for entry in self.browser.get_log("browser") if "JS" in str(entry)]
        assert problems == []

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def until(self, condition):
        return WebDriverWait(self.browser, 120, 0.02).until(lambda _: condition())

    def type(self, selector, text):
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def ask(self):
        self.one("#run").click()

    def answered(self):
        self.until(lambda: self.one("#run").is_enabled())

    def texts(self):
        return [node.text for node in self.all("#answers .text")]

    def headings(self):
        return [node.text for node in self.all("#answers h2")]

    def error(self):
        box = self.one("#error")
        return box.text if box.is_displayed() else None


def test_typing_streaming_and_cancelling(browser, gpt2):
    engine = EchoEngine()
    with Page(browser, gpt2, {"": engine, "tuned": engine}).open() as page:
        assert page.browser.title == "small - t5x_lite"
        assert "decoder" in page.one("#about").text
        assert [tab.text for tab in page.all("[role=tab]")] == ["Generate", "Fill gaps", "Embed"]
        engine.held.set()
        page.type("#prompt", "alpha beta gamma")
        page.ask()
        page.until(lambda: engine.pending)
        assert not page.one("#run").is_enabled()
        engine.step_once()
        engine.step_once()
        page.until(lambda: page.texts() == ["<unk> alpha"])  # while the rest is not written yet
        assert page.one("article").get_attribute("aria-busy") == "true"
        engine.held.clear()
        page.answered()
        assert page.texts() == ["<unk> alpha beta gamma"]
        assert "4 tokens" in page.one("#answers .note").text
        assert page.error() is None

        engine.held.set()
        page.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)  # asks too
        page.until(lambda: engine.pending)
        page.one("#cancel").click()
        page.answered()
        assert page.one("#answers .note").text == "cancelled"
        wait_for(lambda: page.worker.held == 0)
        assert engine.cancelled


def test_errors_are_shown_and_go_away(browser, gpt2):
    engine = EchoEngine()
    with Page(browser, gpt2, {"": engine, "tuned": engine}, places=1).open() as page:
        page.ask()
        page.answered()
        assert page.error() == "the text is empty: write something"
        page.type("#prompt", "alpha " * 9)
        page.ask()
        page.answered()
        assert "10 tokens" in page.error()
        page.type("#prompt", "alpha")
        page.ask()
        page.answered()
        assert page.error() is None
        page.one("#adapters input[value=tuned]").click()
        engine.held.set()  # two at once, and one place
        page.ask()
        page.until(page.error)
        assert "1 requests wait or run" in page.error()
        assert "in 1 s" in page.error()
        engine.held.clear()
        page.answered()


def test_what_a_model_writes_is_text_and_never_markup(browser, gpt2):
    engine = EchoEngine()
    host = Host("<b>small</b>", gpt2._models)
    with Page(browser, host, {"": engine, "tuned": engine}).open() as page:
        assert page.one("#name").text == "<b>small</b>"
        page.type("#prompt", "<unk>")
        page.ask()
        page.answered()
        assert page.texts()[0].startswith("<unk>")


def test_adapters_are_switched_and_compared(browser, gpt2):
    with Page(browser, gpt2, gpt2.engines(slots=2)).open() as page:
        page.type("#prompt", "alpha beta")
        page.ask()
        page.answered()
        (plain,) = page.texts()
        boxes = page.all("#adapters input")
        boxes[0].click()
        boxes[1].click()
        page.ask()
        page.answered()
        assert page.headings() == ["tuned"]
        (tuned,) = page.texts()
        assert plain
        assert tuned
        assert tuned != plain
        boxes[0].click()
        page.ask()
        page.answered()
        assert page.headings() == ["without adapter", "tuned"]
        assert page.texts() == [plain, tuned]
        left, right = (node.rect for node in page.all("article"))
        assert left["y"] == right["y"]
        assert left["x"] < right["x"]
        boxes[0].click()
        boxes[1].click()
        page.ask()
        page.answered()
        assert page.error() == "Choose at least one to answer."


def test_an_encoders_page(browser, scratch):
    folder = folders.hugging_face("bert_mlm", scratch)
    host = Host("masked", open_all(str(folder), {}, None, OneDevice()))
    with Page(browser, host, {}).open() as page:
        assert [tab.text for tab in page.all("[role=tab]")] == ["Fill mask", "Embed"]
        assert not page.one("#adapters").is_displayed()
        assert not page.one("#strategy").is_displayed()
        page.type("#prompt", "alpha <mask> beta")
        page.type("#candidates", "3")
        page.ask()
        page.answered()
        assert len(page.all(".candidate")) == 3
        shares = [float(node.text.rstrip("%")) for node in page.all(".share")]
        assert shares == sorted(shares, reverse=True)
        widths = [bar.rect["width"] for bar in page.all(".bar")]
        assert widths == sorted(widths, reverse=True)
        page.one("[role=tab]").send_keys(Keys.ARROW_RIGHT)
        assert page.one("#tab-embed").get_attribute("aria-selected") == "true"
        page.type("#prompt", "alpha beta")
        page.type("#second", "alpha beta")
        page.ask()
        page.answered()
        assert page.one(".share").text == "1.0000"


@pytest.mark.skipif(not PICTURES, reason="PICTURES names no folder for pictures")
@pytest.mark.parametrize(
    ("run", "adapters", "prompt", "picture"),
    [
        ("demo_bert", {}, "And the LORD said <mask> Moses,", "serve_fill_mask.png"),
        (
            "demo/pretrained",
            {"kjv_to_bbe": "demo/lora"},
            "And God said, Let there be light: and there was light.",
            "serve_adapters.png",
        ),
        ("demo_gpt", {}, "And it came to pass, when", "serve.png"),
    ],
)
def test_pictures_for_the_docs(browser, run, adapters, prompt, picture):
    runs = ROOT / os.environ.get("RUNS", "runs")
    adapters = {name: str(runs / folder) for name, folder in adapters.items()}
    host = Host(Path(run).name, open_all(str(runs / run), adapters, None, OneDevice()))
    with Page(browser, host, host.engines(slots=8)).open() as page:
        for box in page.all("#adapters input:not(:checked)"):
            box.click()
        if "generate" in host.describe()["modes"] and not adapters:
            Select(page.one("#strategy")).select_by_value("sampling")
            page.type("#temperature", "0.8")
        page.type("#prompt", prompt)
        page.ask()
        page.answered()
        assert page.error() is None
        height = page.browser.execute_script("return document.body.scrollHeight")
        page.browser.set_window_size(1000, max(500, height + 170))
        os.makedirs(PICTURES, exist_ok=True)
        page.browser.save_screenshot(os.path.join(PICTURES, picture))
        page.browser.set_window_size(1000, 760)
