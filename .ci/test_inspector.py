"""The inspector page in a real browser, against a running homeserver with the sample bridge and an IRC client on a socket.

    python -m pip install pytest playwright && python -m playwright install --with-deps chromium
    python -m pytest -q .ci/test_inspector.py

Any Chromium that is installed will do (CHROMIUM=… names one); without playwright or a browser the tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import sys
import time
import urllib.request

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import asbridge

try:
    import playwright.sync_api as playwright
    from playwright.sync_api import expect
except ImportError:
    playwright = None
# Test by test, for pytest fails when a whole file is skipped.
pytestmark = pytest.mark.skipif(playwright is None, reason="the page is tested in a browser: playwright is not installed")

BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SAMPLE = {**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": 0}}
EVIL = "<img src=x onerror=document.title='evil'>"


# ============================================================================
# Helpers
# ============================================================================

class Irc:
    """Somebody on IRC, with what he has read."""

    def __init__(self, port: int, nick: str) -> None:
        self.sock, self.read = socket.create_connection(("127.0.0.1", port), 10), ""
        self.say(f"NICK {nick}\r\nUSER {nick} 0 * :{nick}\r\nJOIN #lobby")
        self.expect(" 366 ")

    def say(self, line: str) -> None:
        self.sock.sendall(line.encode() + b"\r\n")

    def expect(self, text: str, seconds: float = 10) -> None:
        self.hear(seconds, lambda: text in self.read)
        assert text in self.read, self.read

    def hear(self, seconds: float, enough=lambda: False) -> str:
        """Everything read so far, after so many seconds or when that is enough."""
        deadline = time.monotonic() + seconds
        while not enough() and (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                self.read += self.sock.recv(65536).decode()
        return self.read


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"the page is tested in a browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def hs():
    with asbridge.Homeserver(registrations=[SAMPLE]) as hs:
        yield hs


@pytest.fixture
def irc(hs):
    irc = Irc(hs.samples[0].irc_port, "bob")
    yield irc
    irc.sock.close()


@pytest.fixture
def page(browser, hs):
    """The page, which must not say a word in the console: no error, and nothing that its own policy forbids."""
    context, said = browser.new_context(viewport={"width": 1440, "height": 900}), []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.goto(hs.url)
    expect(page.locator("#services article", has_text="irc")).to_be_visible()
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0])
        page.screenshot(path=f"{folder}/{name}.png")
    context.close()
    assert not said


def arrive(page, name: str = "alice") -> None:
    """Makes a person in the tab of the rooms, who says something in what follows."""
    page.get_by_role("tab", name="Rooms").click()
    page.get_by_placeholder("a new person's name").fill(name)
    page.get_by_role("button", name="Make a person").click()
    expect(page.get_by_label("Say it as")).to_have_value(f"@{name}:localhost")


def say(page, text: str) -> None:
    page.get_by_role("tab", name="Rooms").click()
    page.get_by_placeholder("say something").fill(text)
    page.get_by_role("button", name="Say", exact=True).click()
    expect(page.locator("#timeline")).to_contain_text(text)


def arrows(page, text: str):
    return page.locator("#rows .row", has_text=text)


# ============================================================================
# What it shows
# ============================================================================

def test_a_message_from_irc_arrives_with_its_arrow_and_its_why(hs, irc, page):
    irc.say("PRIVMSG #lobby :hello from IRC")
    sent = arrows(page, "/send/m.room.message").filter(has_text="as @_irc_bob").first
    expect(sent).to_be_visible()                             # the ghost's request
    pushed = arrows(page, "PUT transaction").filter(has_text="m.room.message by @_irc_bob").first
    expect(pushed).to_be_visible()                           # and the homeserver's push
    pushed.click()
    details = page.locator("#details")
    expect(details).to_contain_text("hello from IRC")
    expect(details).not_to_contain_text(SAMPLE["hs_token"])
    details.get_by_role("button", name="why?").first.click()
    expect(details.locator(".why")).to_contain_text("sender @_irc_bob:localhost matches users[0]")
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()
    page.get_by_role("tab", name="Rooms").click()
    expect(page.locator("#timeline")).to_contain_text("hello from IRC")


def test_a_lost_acknowledgement_is_seen_and_the_retry_has_the_same_transaction_id(hs, irc, page):
    arrive(page)
    say(page, "the first")
    irc.expect("PRIVMSG #lobby :the first")
    page.get_by_role("tab", name="Services").click()
    page.get_by_role("button", name="Lose the next ACK").click()
    expect(page.locator("#services .tag.fault")).to_contain_text("lose_ack on transactions, 1 time")
    say(page, "once, I hope")
    lost = page.locator("#rows .row.lost").first
    expect(lost).to_be_visible()
    again = page.locator("#rows .row.fine", has=page.locator(".tag", has_text="attempt 2")).last
    expect(again).to_be_visible()
    txn_id = lost.locator(".again").get_attribute("title")
    assert txn_id and again.locator(".again").get_attribute("title") == txn_id
    expect(page.locator(".rail.leave")).to_have_count(1)     # they are joined
    expect(page.locator(".rail.arrive")).to_have_count(1)
    hs.settle()
    assert irc.hear(1.0).count("PRIVMSG #lobby :once, I hope") == 1
    page.get_by_role("tab", name="Transactions").click()
    line = page.locator("#transactions li", has=page.locator(f"[title='{txn_id}']"))
    expect(line).to_contain_text("2 attempts")
    expect(line).to_contain_text("✓")


def test_what_anybody_writes_is_text(hs, irc, page):
    arrive(page)
    irc.say(f"PRIVMSG #lobby :{EVIL}")
    say(page, EVIL)
    irc.expect(f"PRIVMSG #lobby :{EVIL}")
    arrows(page, "m.room.message by @alice").last.click()
    expect(page.locator("#details")).to_contain_text(EVIL)
    page.get_by_role("tab", name="Namespaces").click()
    page.get_by_label("An ID or a URI").fill(f"@{EVIL}:localhost")
    page.wait_for_timeout(500)
    assert page.locator("img").count() == 0 and page.title() == "asbridge"


def test_the_playground_says_who_claims_an_id_as_it_is_typed(hs, page):
    page.get_by_role("tab", name="Namespaces").click()
    typed = page.get_by_label("An ID or a URI")
    typed.fill("@_irc_bob:localhost")
    expect(page.locator("#names article")).to_contain_text("claims it exclusively")
    typed.fill("@Irc_bob:localhost")
    expect(page.locator("#names article")).to_contain_text("miss")


def test_pause_resume_and_the_clock(hs, irc, page):
    arrive(page)
    page.get_by_role("tab", name="Services").click()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#services .state")).to_have_text("paused")
    say(page, "later")
    page.get_by_role("tab", name="Services").click()
    page.get_by_role("button", name="Resume").click()
    irc.expect("PRIVMSG #lobby :later")
    page.get_by_role("button", name="+1 h").click()
    expect(page.locator("#time")).to_contain_text("(+60 min)")


def test_it_is_usable_with_the_keyboard_alone(hs, irc, page):
    expect(page.locator("#rows .row").first).to_be_visible()
    page.locator("#rows .row").first.wait_for()
    page.get_by_role("tab", name="Services").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Transactions")).to_have_attribute("aria-selected", "true")
    page.locator("#rows .row[tabindex='0']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()
    assert page.evaluate("document.activeElement.classList.contains('row')")


def test_it_survives_a_restart_of_the_homeserver(browser):
    with asbridge.Homeserver(registrations=[SAMPLE]) as first:
        page = browser.new_page()
        page.goto(first.url)
        urllib.request.urlopen(first.url + "/_matrix/client/versions").read()
        expect(arrows(page, "GET /_matrix/client/versions").first).to_be_attached()
        port = first.port
    expect(page.locator("#banner")).to_be_visible(timeout=15000)
    with asbridge.Homeserver(registrations=[SAMPLE], port=port) as second:
        expect(page.locator("#banner")).to_be_hidden(timeout=15000)
        expect(arrows(page, "GET /_matrix/client/versions")).to_have_count(0)
        urllib.request.urlopen(second.url + "/_matrix/client/versions").read()
        expect(arrows(page, "GET /_matrix/client/versions")).to_have_count(1)
    page.close()


def test_an_admin_token_is_asked_for_once(browser):
    with asbridge.Homeserver(registrations=[SAMPLE], admin_token="open sesame") as hs:
        page = browser.new_page()
        page.goto(hs.url)
        page.get_by_label("admin_token").fill("open sesame")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#services article", has_text="irc")).to_be_visible()
        page.reload()
        expect(page.locator("#services article", has_text="irc")).to_be_visible()
        assert not page.locator("dialog").is_visible()
        page.close()
