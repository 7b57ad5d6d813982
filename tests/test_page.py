"""The page in a real Chromium, against a real server: what a person does with it. Skipped where there is none."""

import shutil
from dataclasses import replace

import axe_playwright_python.sync_playwright as axe
import pytest
from serving_site import QUESTION, serving

from qlora.serving.guard import Rules

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)")
# Root has no sandbox, and containers have little shared memory.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
HOSTILE = (
    "# Otter <img src=x onerror=alert(1)>\n\n<script>document.title='owned'</script> The otter is **Bramble**. \x1b[31m"
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A new page, which fails the test for any error on its console."""
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": 1100, "height": 800})
    opened.set_default_timeout(30_000)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    yield opened
    opened.close()
    unexpected = [text for text in errors if "Failed to load resource" not in text and "ERR_CONNECTION" not in text]
    assert not unexpected


def ask(page, question: str = QUESTION) -> None:
    """Asks, and waits until the answer is whole."""
    count = page.locator(".turns > li").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector(f".turns > li:nth-child({count + 1}) .meta")


def test_an_answer_its_citation_and_the_sentence_behind_it(page, site):
    with serving(site) as url:
        page.goto(url)
        page.wait_for_selector(".examples button:text-is('Who sails?')")
        ask(page)
        answer = page.locator(".answer").inner_text()
        page.click(".answer .chip")
        marked = page.locator("#drawer mark")
        marked.wait_for()
        assert answer.partition(" 1")[0][:30] in " ".join(marked.inner_text().split())
        assert ".md, line" in page.locator("#drawer .place").inner_text()
        page.keyboard.press("Escape")
        page.locator("#drawer").wait_for(state="hidden")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "question"
        page.reload()
        page.click("#open-history")
        page.click(f"#drawer button:has-text('{QUESTION}')")
        assert page.locator(".answer").inner_text() == answer


def test_stop_and_ask_again(page, site):
    slow = site.worker.answer.__self__.generator.model_copy(update={"pause": 0.15})
    quick = site.worker.answer
    site.worker.answer = replace(quick.__self__, generator=slow).answer
    with serving(site) as url:
        page.goto(url)
        page.fill("#question", QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer p")
        page.keyboard.press("Escape")
        page.wait_for_selector("text=Stopped.")
        site.worker.answer = quick
        page.click("text=Ask again")
        page.wait_for_selector(".turns > li:nth-child(2) .meta")


def test_documents_are_dropped_read_and_deleted_with_undo(page, site, tmp_path):
    good, bad = tmp_path / "otter.md", tmp_path / "broken.pdf"
    good.write_text("# Otter\n\nThe otter of the boathouse is called Bramble by everybody.")
    bad.write_bytes(b"no PDF")
    with serving(site) as url:
        page.goto(url)
        page.click("#open-documents")
        page.set_input_files("#pick", [good, bad])
        page.wait_for_selector("text=Not added:")
        page.wait_for_selector(".files .name:has-text('otter.md')")
        page.click("[aria-label='Delete otter.md']")
        page.click("text=Undo")
        assert page.locator(".files .name:has-text('otter.md')").is_visible()
        page.click("[aria-label='Delete otter.md']")
        page.wait_for_selector(".files .name:has-text('otter.md')", state="detached", timeout=20_000)
    assert "otter.md" not in {entry.source for entry in site.library.store.documents()}


def test_what_people_think_is_kept(page, site):
    with serving(site) as url:
        page.goto(url)
        ask(page)
        page.click("text=Wrong")
        page.fill("#right-answer", "The mate")
        page.check("#not-there")
        page.click("#judge-form .primary")
        page.wait_for_selector("text=Thank you")
        page.click(".sources button")
        page.click("text=This passage is the right one")
        page.wait_for_function("document.querySelectorAll('.toast').length > 0")
        page.wait_for_timeout(300)
    bad, good = site.feedback.all()
    assert (bad.rating, bad.right_answer, bad.not_in_documents) == ("bad", "The mate", True)
    assert good.right_passage in [passage["id"] for passage in bad.passages]


def test_nothing_of_a_document_becomes_a_part_of_the_page(page, site, tmp_path):
    path = tmp_path / "otter <b>.md"
    path.write_text(HOSTILE)
    with serving(site) as url:
        page.goto(url)
        page.click("#open-documents")
        page.set_input_files("#pick", path)
        page.wait_for_selector(".files .name:has-text('otter')")
        page.click("#drawer-close")
        ask(page, "What is the otter <img src=x onerror=alert(2)> called?")
        page.click(".answer .chip")
        page.wait_for_selector("#drawer .passage")
        assert page.title() == "Ask your documents"
        assert page.locator("main img, main script, #drawer img, #drawer script, #drawer b").count() == 0
        assert "<script>" in page.locator("#drawer .passage").inner_text()


def test_a_key_is_asked_for_until_it_is_right(page, site):
    with serving(replace(site, rules=Rules("0.0.0.0", "right"))) as url:
        page.goto(url)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=That key is not the right one.")
        page.fill("#key", "right")
        page.keyboard.press("Enter")
        ask(page)
        page.reload()
        page.wait_for_selector(".examples button")  # it is remembered


def test_a_server_that_is_gone_is_noticed_and_waited_for(page, site):
    with serving(site) as url:
        page.goto(url)
        page.wait_for_selector(".examples button")
        page.route("**/v1/**", lambda route: route.abort())
        page.route("**/health", lambda route: route.abort())
        page.fill("#question", QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector("#gone:not([hidden])")
        page.unroute("**/v1/**")
        page.unroute("**/health")
        page.wait_for_selector("#gone", state="hidden")
        page.click("text=Ask again")
        page.wait_for_selector(".turns > li:nth-child(2) .meta")


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 550, 1100])  # a telephone; 1100 at a zoom of 200 %; a laptop
def test_it_fits_every_screen_and_can_be_read(browser, site, look, width):
    context = browser.new_context(viewport={"width": width, "height": 720}, color_scheme=look)
    page = context.new_page()
    with serving(site) as url:
        page.goto(url)
        ask(page)
        for opened in ("", "#open-documents", "#open-history"):
            if opened:
                page.click(opened)
                page.wait_for_selector("#drawer[open]")
            wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            assert not wide, (opened, width)
            assert "Found 0 " in faults_of(page)
            page.keyboard.press("Escape")
    context.close()


def faults_of(page) -> str:
    """What axe-core finds: names, roles, contrast (WCAG 2.2, level AA), and its best practices."""
    return axe.Axe().run(page).generate_report()
