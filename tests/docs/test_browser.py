"""Every page of the site in a browser: text, pictures, links that load, no error, and nothing from another host."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import pytest

pytestmark = pytest.mark.one_worker

# Pixels of a laptop and of a telephone.
WIDE, NARROW = 1280, 390
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(absent: Callable[[str], NoReturn], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        absent("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        absent("needs selenium: pip install -r requirements/docs.txt")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_page_load_timeout(60)
    # Chromium opens a page of its own first, which asks for other hosts: it is left, and what it said is dropped.
    browser.get("about:blank")
    complaints(browser, "")
    yield browser
    browser.quit()


@pytest.fixture
def other_host() -> Iterator[str]:
    """The address of a host that refuses connections: its port is taken and nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


def show(browser: Any, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def faults(events: Iterable[dict[str, Any]], address: str) -> list[str]:
    """Faults of the requests among events of the network. An event whose request is not among them does not count."""
    found: list[str] = []
    asked: set[str] = set()
    for event in events:
        given = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            asked.add(given["requestId"])
            url = given["request"]["url"]
            if not url.startswith((f"{address}/", "data:", "blob:", "about:")):
                found.append(f"asks for {url}")
        elif given.get("requestId") not in asked:
            continue
        elif event["method"] == "Network.responseReceived" and given["response"]["status"] >= 400:
            found.append(f"{given['response']['status']} for {given['response']['url']}")
        elif event["method"] == "Network.loadingFailed" and not given.get("canceled"):
            found.append(f"{given['errorText']} for a {given['type']}")
    return found


def complaints(browser: Any, address: str) -> list[str]:
    """What the console and the network report since the last call, but for pages that were left while they loaded."""
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return found + faults(
        (json.loads(entry["message"])["message"] for entry in browser.get_log("performance")), address
    )


FACTS = """
const article = document.querySelector('article');
return {
    title: document.title,
    words: article ? article.innerText.trim().split(/\\s+/).length : 0,
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
};
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_faults_are_those_of_requests_that_were_seen() -> None:
    def sent(request: str, url: str) -> dict[str, Any]:
        return {"method": "Network.requestWillBeSent", "params": {"requestId": request, "request": {"url": url}}}

    def failed(request: str, **how: bool) -> dict[str, Any]:
        given = {"requestId": request, "errorText": "net::ERR_NAME_NOT_RESOLVED", "type": "Document", **how}
        return {"method": "Network.loadingFailed", "params": given}

    # A page that was left before the first of the events.
    assert faults([failed("0"), sent("1", "http://here/a.html"), failed("0")], "http://here") == []
    assert faults([sent("1", "http://here/a.html"), failed("1", canceled=True)], "http://here") == []
    problem = "net::ERR_NAME_NOT_RESOLVED for a Document"
    assert faults([sent("1", "http://here/a.html"), failed("1")], "http://here") == [problem]
    assert faults([sent("1", "http://there/a.html")], "http://here") == ["asks for http://there/a.html"]


@pytest.mark.slow
def test_complaints_are_those_of_this_site(browser: Any, address: str, other_host: str) -> None:
    """Faults of a page are found: in its console, of its files, and other hosts, in a frame of the page too."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/index.html")
    complaints(browser, address)
    script = """
        console.error('a fault in the console');
        window.done = 0;
        for (const source of ['absent.png', arguments[0] + 'absent.png']) {
            const image = new Image();
            image.onerror = () => window.done++;
            image.src = source;
        }
        const frame = document.createElement('iframe');
        frame.onload = () => window.done++;
        frame.src = arguments[0] + 'absent.html';
        document.body.append(frame);
    """
    browser.execute_script(script, other_host)
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return window.done") == 3)
    found = complaints(browser, address)
    assert any("a fault in the console" in fault for fault in found)
    for fault in (
        f"404 for {address}/absent.png",
        f"asks for {other_host}absent.png",
        f"asks for {other_host}absent.html",
        "net::ERR_CONNECTION_REFUSED for a Image",
        "net::ERR_CONNECTION_REFUSED for a Document",
    ):
        assert fault in found


@pytest.mark.slow
def test_every_page(browser: Any, address: str, pages: list[str]) -> None:
    faults: dict[str, list[str]] = {}
    complaints(browser, address)
    for page in pages:
        show(browser, WIDE)
        browser.get(f"{address}/{page}")
        facts = browser.execute_script(FACTS)
        found = complaints(browser, address)
        found += [] if browser.current_url.startswith(f"{address}/{page}") else [f"leads to {browser.current_url}"]
        found += [] if facts["title"] else ["has no title"]
        found += [f"has {facts['words']} words"] if facts["words"] < 40 else []
        found += [f"does not show {source}" for source in facts["broken"]]
        for width in (WIDE, NARROW):
            show(browser, width)
            overflow = browser.execute_script(OVERFLOW)
            found += [f"is {overflow} pixels too wide for {width}"] if overflow > 0 else []
        if found:
            faults[page] = found
    assert faults == {}


@pytest.mark.slow
def test_pictures_follow_the_colours_of_the_page(browser: Any, address: str) -> None:
    colours = []
    for scheme in ("light", "dark"):
        show(browser, WIDE, scheme)
        browser.get(f"{address}/way-of-a-call.html")
        script = """const style = e => getComputedStyle(e);
            return [style(document.querySelector('svg.wf text')).fill, style(document.body).backgroundColor]"""
        colours.append(browser.execute_script(script))
    (ink, paper), (dark_ink, dark_paper) = colours
    assert ink != dark_ink and paper != dark_paper


@pytest.mark.slow
def test_search_finds_an_op(browser: Any, address: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, WIDE)
    browser.get(f"{address}/index.html")
    complaints(browser, address)
    browser.find_element(By.CSS_SELECTOR, "input[data-md-component=search-query]").send_keys("varlen_attention")
    found = "a.md-search-result__link[href*='reference/ops.html']"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, found))
    assert complaints(browser, address) == []
