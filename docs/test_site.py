"""The built site in a browser: no broken link, no error on the console. `make docs` builds it, then runs this."""

import functools
import http.server
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

SITE = Path(__file__).parent / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links |= {found[name] or "" for name in ("href", "src") if name in found and tag != "base"}
        self.ids |= {found[name] or "" for name in ("id", "name") if name in found}


@functools.cache
def ids(path: Path) -> set[str]:
    return _Page(path.read_text("utf-8")).ids if path.suffix == ".html" else set()


def broken(page: str, text: str) -> list[str]:
    """The links of a page, given as HTML, that lead to no file of the site or to no place in it."""
    found = []
    for link in _Page(text).links:
        target, place = urldefrag(urljoin(f"http://site/{page}", link))
        parts = urlparse(target)
        if parts.scheme not in ("http", "https") or parts.netloc != "site":
            continue
        path = SITE / unquote(parts.path).lstrip("/")
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file() or (place and path.suffix == ".html" and unquote(place) not in ids(path)):
            found.append(link)
    return found


@pytest.fixture(scope="module")
def address():
    """The site, served on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def opened(url: str, profile: Path) -> tuple[str, list[str]]:
    """A page as the browser has it after its scripts have run, and what the console says."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    own = [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", url]
    done = subprocess.run([str(CHROMIUM), *quiet, *own], text=True, capture_output=True, timeout=120)
    return done.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)


def test_a_broken_link_and_a_console_error_are_found(tmp_path):
    page = '<a href="nowhere.html"></a> <a href="index.html#no-such-place"></a> <a href="index.html"></a>'
    assert sorted(broken("index.html", page)) == ["index.html#no-such-place", "nowhere.html"]
    if CHROMIUM:
        (tmp_path / "page.html").write_text("<p>before</p><script>console.error('a fault'); nothing.here()</script>")
        dom, said = opened((tmp_path / "page.html").as_uri(), tmp_path / "profile")
        assert "before" in dom
        assert "a fault" in said[0]
        assert "ReferenceError" in said[1]


def test_the_site_has_its_pages():
    assert {"index.html", "start.html", "concepts.html", "zoo.html", "costs.html", "api/nn.html"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_broken(page):
    assert not broken(page, (SITE / page).read_text("utf-8"))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("page", PAGES)
def test_a_browser_opens_it_without_an_error(page, address, tmp_path):
    dom, said = opened(f"{address}/{page}", tmp_path)
    assert "</html>" in dom
    assert not said
    assert not broken(page, dom.replace(f"{address}/", "/"))
