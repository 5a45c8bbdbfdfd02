"""The console's page in Chromium: what it shows, and what it can do."""

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets
from certificates import Authority
from faults import FaultyBackend
from playwright.async_api import Browser, Page, async_playwright, expect
from programs import program
from service import DEADLINE, RecordingBackend, Service
from tornado.ioloop import IOLoop
from tornado.web import RequestHandler
from wire import handshake

# How long the page is watched under load; `make soak` has five minutes of it.
LOAD_SECONDS = float(os.environ.get("CONSOLE_SECONDS", "5"))
MESSAGES_PER_SECOND = 300
CROWD = int(os.environ.get("CONSOLE_CLIENTS", "3000"))

pytestmark = pytest.mark.gen_test(timeout=60 + LOAD_SECONDS)

TOKEN = "a-token-of-the-console-0123"
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests: they share a browser."""
    return module_io_loop


@pytest.fixture(scope="module")
def browser(io_loop, shared) -> Browser:
    """Debian's Chromium; each test has its own context in it."""
    path = program("chromium", "chromium", "chromium-browser", "google-chrome")

    async def begin() -> Browser:
        playwright = await shared.enter_async_context(async_playwright())
        return await playwright.chromium.launch(
            executable_path=path,
            # Root, and most containers, cannot have a sandbox.
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                  "--no-proxy-server", "--enable-precise-memory-info"],
        )

    return io_loop.run_sync(begin, timeout=60)


@contextlib.asynccontextmanager
async def opened(
    browser: Browser, service: Service, *expected: str, **options: Any
) -> AsyncIterator[Page]:
    """The console in a browser, live.

    What the browser complains of must be `expected`, or nothing at all: errors of
    scripts, requests that fail, and breaches of the policy.
    """
    context = await browser.new_context(**options)
    complaints: list[str] = []
    page = await context.new_page()
    page.set_default_timeout(DEADLINE * 1000)
    expect.set_options(timeout=DEADLINE * 1000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(message.text)
        if message.type in ("error", "warning")
        else None,
    )
    await page.goto(f"{service.callback_url}/")
    try:
        yield page
    finally:
        await context.close()
    unexpected = [
        complaint
        for complaint in complaints
        if not any(text in complaint for text in expected)
    ]
    assert not unexpected


async def is_live(page: Page) -> None:
    await expect(page.get_by_role("status").first).to_have_text("Live")


def state_of_playground(page: Page) -> Any:
    return page.locator("#playground-state")


async def connect(page: Page) -> None:
    """In the playground."""
    await page.get_by_role("button", name="Connect", exact=True).click()
    await expect(state_of_playground(page)).to_have_text(re.compile(r"^Connected"))


def pairs(page: Page) -> Any:
    """The playground's rows."""
    return page.get_by_label("Frames and the events that they caused").locator("> li")


# What the page shows.


async def test_page_loads_and_counts(io_loop, browser):
    """The browser logs no error; counts, rates and charts follow the clients."""
    async with Service("--instance_name=relay-7") as service:
        async with opened(browser, service) as page:
            await is_live(page)
            assert await page.title() == "SocketDock console"
            await expect(page.locator("#instance")).to_have_text("relay-7")
            await expect(page.locator("#backend")).to_have_text("loopback")
            await expect(page.get_by_text("Nobody is connected.")).to_be_visible()
            assert await page.locator("#command").inner_text() == (
                f"websocat {service.ws_url}"
            )
            assert await painted(page, "#chart-messages") < 0.05
            async with websockets.connect(service.ws_url) as client:
                await expect(page.locator("#open")).to_have_text("1")
                async with asyncio.timeout(DEADLINE):
                    while await page.locator("#in").inner_text() == "0":
                        await client.send("x")
                        await client.recv()
                await expect(page.locator("#latency")).to_have_text(re.compile("ms"))
                assert await painted(page, "#chart-open") > 0.01
            await expect(page.locator("#open")).to_have_text("0")
            await expect(page.locator("#total")).to_have_text("1")
            for chart in await page.get_by_role("img").all():
                if name := await chart.get_attribute("aria-label"):
                    assert name


async def painted(page: Page, canvas: str) -> float:
    """Return the share of a canvas that is not empty."""
    return await page.evaluate(
        """(selector) => {
            const canvas = document.querySelector(selector);
            const pen = canvas.getContext("2d");
            const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
            return data.filter((_, i) => i % 4 === 3 && data[i]).length
                / (data.length / 4);
        }""",
        canvas,
    )


async def test_rejected_handshakes_are_shown(io_loop, browser):
    """A rejected handshake is counted, listed, and found by the filter."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        async with websockets.connect(service.ws_url) as client:
            await client.send("x")
            await client.recv()
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(service.ws_url, origin="http://x.example")
            tail = page.get_by_label("Events, the newest first")
            await expect(tail).to_contain_text(
                "handshake from 127.0.0.1: rejected by the relay, 403"
            )
            await expect(page.locator("#errors-total")).to_contain_text("1 while")
            await page.get_by_label("failures only").check()
            await expect(tail.get_by_role("listitem")).to_have_count(0)
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(service.ws_url, origin="http://x.example")
            await client.send("x")
            await expect(tail.get_by_role("listitem")).to_have_count(1)


async def test_tail_shows_no_bodies_and_can_be_paused(io_loop, browser):
    """It shows metadata of each event; paused, it counts the hidden events."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        tail = page.get_by_label("Events, the newest first")
        async with websockets.connect(service.ws_url) as client:
            await client.send("marked-body")
            await expect(tail).to_contain_text("text, 11 bytes, from the client")
            await expect(tail).to_contain_text("text, 11 bytes, to the client")
            await expect(tail).to_contain_text("message event delivered")
            await page.get_by_role("button", name="Pause").click()
            before = await tail.inner_text()
            await client.send("12")
            await expect(page.locator("#skipped")).to_contain_text("3 since you paused")
            assert await tail.inner_text() == before
            await page.get_by_role("button", name="Continue").click()
        await expect(tail).to_contain_text("with 1000, by the client")
        await page.get_by_label("Show", exact=True).select_option("frames")
        assert "marked" not in await page.content()


# Connections.


async def test_connection_is_found_sent_to_and_closed(io_loop, browser):
    """Search, open, send a frame, close with a code and a reason."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        async with (
            websockets.connect(service.ws_url, user_agent_header="alpha") as client,
            websockets.connect(service.ws_url, user_agent_header="beta"),
        ):
            rows = page.locator("#rows tr")
            await expect(rows).to_have_count(2)
            await page.get_by_label("Search").fill("alph")
            await expect(rows).to_have_count(1)
            await expect(page.locator("#found")).to_have_text("1 of 2 connections.")
            await page.get_by_label("Search").fill("nobody")
            await expect(page.locator("#found")).to_have_text("None of 2 matches.")
            await page.get_by_label("Search").fill("alpha")
            await rows.get_by_role("button").click()
            dialog = page.get_by_role("dialog")
            await expect(dialog).to_contain_text("alpha")
            await dialog.get_by_label("Send a frame").fill("by hand")
            await dialog.get_by_role("button", name="Send").click()
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "by hand"
            await expect(dialog.get_by_role("status")).to_have_text(
                "The frame was sent."
            )
            await dialog.get_by_label("as", exact=True).select_option("binary")
            await dialog.get_by_label("Send a frame").fill("zz")
            await dialog.get_by_role("button", name="Send").click()
            await expect(dialog.get_by_role("status")).to_contain_text("in hex")
            await dialog.get_by_label("Send a frame").fill("00 ff")
            await dialog.get_by_role("button", name="Send").click()
            assert await asyncio.wait_for(client.recv(), DEADLINE) == b"\x00\xff"
            await dialog.get_by_label("Close with code").fill("4002")
            await dialog.get_by_label("Reason").fill("enough")
            await dialog.get_by_role("button", name="Close", exact=True).click()
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert (client.close_code, client.close_reason) == (4002, "enough")
            state = dialog.locator("dd").first
            await expect(state).to_contain_text("closed with 4002, by an operator")
            # What it did remains, and nothing more can be done with it.
            await expect(dialog).to_contain_text("binary, 2 bytes, to the client")
            await expect(dialog).to_contain_text("2 messages, 9 bytes")
            for name in ("Send", "Close"):
                button = dialog.get_by_role("button", name=name, exact=True)
                await expect(button).to_be_disabled()
            await page.keyboard.press("Escape")
            tail = page.get_by_label("Events, the newest first")
            await tail.get_by_role("button").first.click()
            await expect(dialog).to_contain_text("text, 7 bytes, to the client")


async def test_rejected_action_shows_the_reason(io_loop, browser):
    """The page shows the relay's problem detail."""
    async with Service() as service:
        async with opened(browser, service, "400 (Bad Request)") as page:
            await is_live(page)
            async with websockets.connect(service.ws_url):
                await page.locator("#rows button").click()
                dialog = page.get_by_role("dialog")
                await dialog.get_by_label("Close with code").fill("1005")
                await dialog.get_by_role("button", name="Close", exact=True).click()
                await expect(dialog.get_by_role("status")).to_contain_text(
                    "code must be 1000"
                )


async def test_bodies_are_shown_on_request(io_loop, browser):
    """Of the shown connection, with a notice, until the view is closed."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        async with websockets.connect(service.ws_url) as client:
            await page.locator("#rows button").click()
            dialog = page.get_by_role("dialog")
            await client.send("before")
            await expect(dialog).to_contain_text("text, 6 bytes, from the client")
            await dialog.get_by_role("button", name="Show bodies").click()
            await expect(dialog).to_contain_text("are shown from now on")
            await client.send("marked <b>body</b>")
            shown = dialog.locator("pre")
            await expect(shown).to_have_text(["marked <b>body</b>"] * 2)
            await client.send(b"\x00\x01")
            await expect(shown.first).to_have_text("00 01")
            content = await page.content()
            assert "before" not in content
            await page.keyboard.press("Escape")
            await expect(dialog).to_have_count(0)
            assert "marked" not in await page.content()
            await page.locator("#rows button").click()
            await client.send("after it")
            await expect(dialog).to_contain_text("text, 8 bytes")
            await expect(shown).to_have_count(0)


async def test_bodies_cannot_be_requested_if_they_are_off(io_loop, browser):
    """The button is disabled, and explains why."""
    async with Service("--console_bodies=off") as service:
        async with opened(browser, service) as page:
            await is_live(page)
            async with websockets.connect(service.ws_url):
                await page.locator("#rows button").click()
                button = page.get_by_role("button", name="Show bodies")
                await expect(button).to_be_disabled()
                await expect(page.get_by_role("dialog")).to_contain_text(
                    "--console_bodies=off"
                )


# The playground.


async def test_playground_with_the_echo(io_loop, browser):
    """With one listener: each frame, and beside it the relay's events."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        await connect(page)
        await page.get_by_label("Message", exact=True).fill("hello")
        await page.keyboard.press("Enter")
        await page.get_by_label("Message", exact=True).fill("0 0 f f 7")
        await page.get_by_label("Send as").select_option("binary")
        await page.get_by_role("button", name="Send", exact=True).click()
        await expect(page.get_by_role("alert").filter(has_text="hex")).to_be_visible()
        await page.get_by_label("Message", exact=True).fill("00 ff")
        await page.keyboard.press("Enter")
        rows = pairs(page)
        await expect(rows).to_have_count(5)
        for number, texts in enumerate([
            ("→", "connect to ws://", "connect event delivered", "is open"),
            ("→", "hello", "text, 5 bytes, from the client", "message event delivered"),
            ("←", "hello", "text, 5 bytes, to the client"),
            ("→", "00 ff", "binary, 2 bytes, from the client", "message event"),
            ("←", "00 ff", "binary, 2 bytes, to the client"),
        ]):
            for text in texts:
                await expect(rows.nth(number)).to_contain_text(text)
        await page.get_by_role("button", name="Disconnect").click()
        await expect(rows.nth(5)).to_contain_text("closed with 1000")
        await expect(rows.nth(5)).to_contain_text("disconnect event delivered")
        await expect(state_of_playground(page)).to_have_text("Closed with 1000.")
        await connect(page)  # and again
        await expect(rows).to_have_count(1)


async def test_playground_with_an_http_backend_and_two_listeners(io_loop, browser):
    """The clients' origin is not the page's; a callback arrives as a frame."""
    async with RecordingBackend() as backend:
        answers = 0

        async def answer(handler: RequestHandler, event: Any) -> None:
            nonlocal answers
            answers += 1
            if answers == 1:  # it is retried
                handler.set_status(503)
                return
            await backend.call(
                event["meta"]["send"], body=b"you said it",
                headers={"Content-Type": "text/plain"},
            )

        backend.answers["message"] = answer
        flags = (*backend.flags(), "--callbackport=0", "--subprotocols=chat")
        async with Service(*flags) as service, opened(browser, service) as page:
            await is_live(page)
            await page.get_by_text("Query and subprotocols").click()
            await page.get_by_label("Query").fill("room=7")
            await page.get_by_label("Subprotocols").fill("json, chat")
            await connect(page)
            (event,) = await backend.wait_for("connect", 1)
            assert event["meta"]["query"] == "room=7"
            assert event["meta"]["subprotocols"] == ["json", "chat"]
            await expect(state_of_playground(page)).to_contain_text("subprotocol chat")
            await page.get_by_label("Message", exact=True).fill("hello")
            await page.keyboard.press("Enter")
            rows = pairs(page)
            await expect(rows.nth(1)).to_contain_text("the backend is unreachable, 503")
            await expect(rows.nth(1)).to_contain_text("delivered, 200")
            await expect(rows.nth(2)).to_contain_text("you said it")
            await expect(rows.nth(2)).to_contain_text("text, 11 bytes, to the client")


async def test_playground_over_tls(io_loop, browser, tmp_path):
    """The page over https, its WebSocket over wss, on one listener."""
    certificate = Authority(tmp_path).server().both
    async with Service(f"--tls_cert={certificate}") as service:
        async with opened(browser, service, ignore_https_errors=True) as page:
            await is_live(page)
            await connect(page)
            await page.keyboard.press("Enter")
            await expect(pairs(page)).to_have_count(3)
            await expect(pairs(page).first).to_contain_text("connect to wss://")


async def test_playground_shows_a_refused_handshake(io_loop, browser):
    """The backend refuses; the events show the details."""
    async with RecordingBackend() as backend:

        async def refuse(handler: RequestHandler, event: Any) -> None:
            handler.set_status(403)

        backend.answers["connect"] = refuse
        expected = "Error during WebSocket handshake"
        async with Service(*backend.flags()) as service:
            async with opened(browser, service, expected) as page:
                await is_live(page)
                await page.get_by_role("button", name="Connect", exact=True).click()
                await expect(state_of_playground(page)).to_contain_text(
                    "The handshake was refused"
                )
                await expect(pairs(page).first).to_contain_text(
                    "connect event refused by the backend, 403"
                )


# Access, and an outage of the relay.


async def test_page_asks_for_a_token(io_loop, browser):
    """No data before; a wrong token is reported; the tab keeps the right one."""
    flags = (f"--callback_token={TOKEN}", "--bindip=0.0.0.0")
    async with Service(*flags) as service:
        service.callback_url = service.callback_url.replace("0.0.0.0", "127.0.0.1")
        async with opened(browser, service, "401 (Unauthorized)") as page:
            heading = page.get_by_role("heading", name="This relay requires a token")
            await expect(heading).to_be_visible()
            await expect(page.get_by_role("heading", name="Overview")).to_be_hidden()
            await expect(page.get_by_label("Token", exact=True)).to_be_focused()
            await page.keyboard.type("wrong-token-0123456789")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("alert").first).to_have_text(
                "That token is not accepted."
            )
            await page.get_by_label("Token", exact=True).fill(TOKEN)
            await page.keyboard.press("Enter")
            await is_live(page)
            await connect(page)
            await expect(pairs(page).first).to_contain_text("is open")
            await page.reload()
            await is_live(page)
            storage = "[localStorage.length, document.cookie]"
            assert await page.evaluate(storage) == [0, ""]
            assert TOKEN not in page.url
            other = await page.context.new_page()
            await other.goto(page.url)
            await expect(other.get_by_role("heading", name="token")).to_be_visible()


async def test_page_reconnects_after_a_restart(io_loop, browser):
    """It shows that the relay is unreachable, and that another run has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--bindport={port}"
    async with Service(flag) as service:
        async with opened(browser, service, "ERR_CONNECTION", "ERR_INCOMPLETE") as page:
            await is_live(page)
            status = page.get_by_role("status").first
            service.process.send_signal(signal.SIGTERM)
            await service.process.wait()
            await expect(status).to_contain_text("can't be reached; trying again")
            async with Service(flag) as again, websockets.connect(again.ws_url):
                await is_live(page)
                tail = page.get_by_label("Events, the newest first")
                await expect(tail).to_contain_text("The relay was started again.")
                await expect(page.locator("#rows tr")).to_have_count(1)


async def test_outage_of_the_backend_is_shown_at_a_glance(io_loop, browser):
    """Since when, where, why, and what waits; the header is not green."""
    async with FaultyBackend() as backend:
        backend.make_unreachable("refused")
        url = backend.url("message")
        flags = ("--backend=http", f"--messageuri={url}?key=secret",
                 "--breaker_connections=1", "--breaker_attempts=1")
        async with Service(*flags) as service, opened(browser, service) as page:
            await is_live(page)
            outage = page.locator("#outage")
            await expect(outage).to_be_hidden()
            await connect(page)
            await page.keyboard.press("Enter")
            status = page.get_by_role("status").first
            await expect(status).to_have_text("The backend is unreachable")
            await expect(status).to_have_attribute("data-state", "away")
            await expect(page.get_by_role("alert").first).to_have_text(
                re.compile(r"^The backend is unreachable since \d\d:\d\d:\d\d$")
            )
            cause = f"POST {url}: cannot connect: Connection refused"
            await expect(outage).to_contain_text(cause)
            await expect(outage).to_contain_text("1 event waits for it, for ")
            assert "secret" not in await page.content()
            # Each attempt has its time and its number, and none is a latency.
            await expect(pairs(page).nth(1)).to_contain_text(
                re.compile(r"\d\d:\d\d:\d\d\.\d{3} backend: .*, attempt 2, ")
            )
            await expect(page.locator("#latency")).to_have_text("\u2013")
            await backend.make_reachable()
            await is_live(page)
            await expect(outage).to_be_hidden()


async def test_page_without_its_relay_is_dimmed(io_loop, browser):
    """Its figures are old."""
    async with Service() as service:
        async with opened(browser, service, "ERR_CONNECTION", "ERR_INCOMPLETE") as page:
            await is_live(page)
            inside = page.locator("#inside")
            await expect(inside).to_have_css("opacity", "1")
            service.process.send_signal(signal.SIGTERM)
            await service.process.wait()
            await expect(inside).to_have_css("opacity", "0.5")


async def test_frames_are_edited_as_json(io_loop, browser):
    """In several lines: Shift+Enter starts one, Enter sends."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        await connect(page)
        message = page.get_by_label("Message", exact=True)
        await message.fill('{"a": [1, ')
        await expect(page.locator("#frame-note")).to_have_text("Not JSON yet.")
        await page.get_by_role("button", name="Format JSON").first.click()
        await expect(page.locator("#frame-note")).to_have_text("This is not JSON.")
        await message.fill('{"a":[1,2]}')
        await page.get_by_role("button", name="Format JSON").first.click()
        formatted = '{\n  "a": [\n    1,\n    2\n  ]\n}'
        await expect(message).to_have_value(formatted)
        await message.press("End")
        await message.press("Shift+Enter")
        await message.press("Enter")
        await expect(pairs(page).nth(2)).to_contain_text("text, 30 bytes")


async def test_id_and_a_command_are_copied(io_loop, browser):
    """The command works as it is; it has no token."""
    async with Service() as service:
        options = {"permissions": ["clipboard-read", "clipboard-write"]}
        async with opened(browser, service, **options) as page:
            await is_live(page)
            async with websockets.connect(service.ws_url) as client:
                await page.locator("#rows button").click()
                place = await page.locator("#rows button").get_attribute("value")
                dialog = page.get_by_role("dialog")
                await dialog.get_by_role("button", name="Copy id").click()
                answer = dialog.get_by_role("status")
                await expect(answer).to_have_text("The id was copied.")
                clipboard = "navigator.clipboard.readText()"
                assert await page.evaluate(clipboard) == place
                await dialog.get_by_role("button", name="Copy curl").click()
                await expect(answer).to_have_text("The command was copied.")
                command = await page.evaluate(clipboard)
                assert command.startswith("curl ")
                curl = await asyncio.create_subprocess_shell(command + " -sf")
                assert await asyncio.wait_for(curl.wait(), DEADLINE) == 0
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "Hello"


async def test_columns_are_sorted(io_loop, browser):
    """By a button in their heading; age has both directions."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        async with (
            websockets.connect(service.ws_url, user_agent_header="alpha") as client,
            websockets.connect(service.ws_url, user_agent_header="beta"),
        ):
            await client.send("x")
            clients = page.locator("#rows td:nth-child(3)")
            for name, order, first in (
                ("Age", "descending", "alpha"), ("Age", "ascending", "beta"),
                ("Messages in", "descending", "alpha"),
            ):
                await page.get_by_role("button", name=name, exact=True).click()
                column = page.get_by_role("columnheader", name=name, exact=True)
                await expect(column).to_have_attribute("aria-sort", order)
                await expect(clients.first).to_have_text(first)


async def test_theme_is_chosen_and_kept(io_loop, browser):
    """Against the system's; charts follow it."""
    async with Service() as service:
        async with opened(browser, service, color_scheme="light") as page:
            await is_live(page)
            ground = "getComputedStyle(document.documentElement).backgroundColor"
            light = await page.evaluate(ground)
            await page.get_by_label("Theme").select_option("dark")
            dark = await page.evaluate(ground)
            assert dark != light
            await page.reload()
            await is_live(page)
            assert await page.evaluate(ground) == dark
            await page.get_by_label("Theme").select_option("as the system")
            assert await page.evaluate(ground) == light


# Accessibility.


async def test_page_works_by_keyboard(io_loop, browser):
    """Tab, Enter and Escape: playground, a connection, sending, and back."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)

        async def tab_to(name: str) -> None:
            for _ in range(40):
                await page.keyboard.press("Tab")
                focused = page.locator(":focus")
                label = await focused.evaluate(
                    "e => e.labels?.[0]?.textContent || e.textContent"
                )
                if re.fullmatch(name, label.strip()):
                    # The focus is visible.
                    assert await focused.evaluate(
                        "e => getComputedStyle(e).outlineStyle"
                    ) == "solid"
                    return
            raise AssertionError(f"no way to {name} by Tab")

        await page.keyboard.press("Tab")
        assert await page.locator(":focus").inner_text() == "Skip to content"
        await page.keyboard.press("Enter")
        await tab_to("Connect")
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        await page.keyboard.type("typed")
        await page.keyboard.press("Enter")
        await expect(pairs(page)).to_have_count(3)
        await expect(page.locator("#rows tr")).to_have_count(1)
        await tab_to("[0-9a-f]{8}")
        place = await page.locator(":focus").get_attribute("value")
        await page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_be_visible()
        await tab_to("Send a frame")
        await page.keyboard.type("by keyboard")
        await page.keyboard.press("Enter")
        await expect(dialog.get_by_role("status")).to_have_text("The frame was sent.")
        await page.keyboard.press("Escape")
        await expect(dialog).to_have_count(0)
        # The focus has returned.
        assert await page.locator(":focus").get_attribute("value") == place
        await expect(pairs(page).nth(3)).to_contain_text("by keyboard")
        await tab_to("Pause")
        await page.keyboard.press("Space")
        pause = page.get_by_role("button", name="Continue")
        await expect(pause).to_have_attribute("aria-pressed", "true")


async def test_page_has_labels_landmarks_and_headings(io_loop, browser):
    """For screen readers."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        for role in ("banner", "navigation", "main", "search"):
            await expect(page.get_by_role(role)).to_have_count(1)
        for name in ("Overview", "Playground", "Connections", "Events"):
            await expect(page.get_by_role("region", name=name)).to_be_visible()
            await expect(page.get_by_role("heading", name=name)).to_be_visible()
            link = page.get_by_role("link", name=name, exact=True)
            await expect(link).to_be_visible()
        nameless = await page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, canvas, ol")]
                .filter((e) => !e.labels?.length && !e.ariaLabel
                    && !(e.matches("button") && e.textContent.trim()))
                .map((e) => e.outerHTML)"""
        )
        assert nameless == []
        ids = await page.evaluate(
            "() => [...document.querySelectorAll('[id]')].map((e) => e.id)"
        )
        assert len(ids) == len(set(ids))
        assert await page.locator("html").get_attribute("lang") == "en"


async def test_page_fits_a_phone(io_loop, browser):
    """360 pixels, without horizontal scrolling, even with long words."""
    async with Service() as service:
        async with opened(browser, service, viewport=PHONE, has_touch=True) as page:
            await is_live(page)
            agent = "a-long-user-agent-without-a-space/" * 8
            async with websockets.connect(service.ws_url, user_agent_header=agent):
                await connect(page)
                await page.get_by_label("Message", exact=True).fill("x" * 400)
                await page.keyboard.press("Enter")
                await expect(pairs(page)).to_have_count(3)
                await expect(page.locator("#rows tr")).to_have_count(2)
                assert await width(page) == PHONE["width"]
                # Each cell is a line with its name, and none is hidden.
                cells = page.locator("#rows tr").last.locator("td")
                for cell in await cells.all():
                    box = await cell.bounding_box()
                    assert box is not None and box["width"] > 250
                await page.locator("#rows button").last.click()
                await expect(page.get_by_role("dialog")).to_contain_text(agent)
                assert await width(page) == PHONE["width"]
                dialog = await page.get_by_role("dialog").evaluate(
                    "e => [e.scrollWidth - e.clientWidth, e.offsetWidth]"
                )
                assert dialog[0] == 0 and dialog[1] <= PHONE["width"]
                too_small = await page.evaluate(
                    """() => [...document.querySelectorAll("button, input, select")]
                        .filter((e) => e.closest("dialog"))
                        .filter((e) => e.offsetHeight && e.offsetHeight < 24)
                        .map((e) => e.outerHTML)"""
                )
                assert too_small == []


async def width(page: Page) -> int:
    return await page.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_enough_contrast(io_loop, browser, scheme):
    """At least 4.5 (WCAG 2.2, 1.4.3), in the light and the dark theme."""
    async with Service() as service:
        async with opened(browser, service, color_scheme=scheme) as page:
            await is_live(page)
            await connect(page)
            await page.keyboard.press("Enter")
            await expect(pairs(page)).to_have_count(3)
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(service.ws_url, origin="http://x.example")
            await expect(page.locator("#tail .failed")).to_have_count(1)
            ground = await page.evaluate(
                "getComputedStyle(document.documentElement).backgroundColor"
            )
            assert (max(numbers(ground)) < 128) == (scheme == "dark")
            await page.get_by_role("link", name="Connections").click()
            await expect(page.locator("#rows tr")).to_have_count(1)
            seen = await page.evaluate(COLORS)
            await page.locator("#rows button").first.click()
            await page.get_by_role("button", name="Show bodies").click()
            await expect(page.get_by_role("dialog")).to_contain_text("from now on")
            seen += await page.evaluate(COLORS)
            assert len(seen) > 60
            poor = {
                (text, front, back)
                for text, front, back in seen
                if contrast(front, back) < 4.5
            }
            assert poor == set()


# Each text that is visible: its beginning, its color, and that behind it.
COLORS = """() => {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) {
        const element = node.parentElement;
        if (!node.data.trim() || element.disabled) continue;
        if (!element.checkVisibility()) continue;
        let behind = element;
        while (/, 0\\)|transparent/.test(getComputedStyle(behind).backgroundColor)) {
            behind = behind.parentElement;
            if (!behind) break;
        }
        found.push([node.data.trim().slice(0, 40), getComputedStyle(element).color,
            getComputedStyle(behind ?? document.documentElement).backgroundColor]);
    }
    return found;
}"""


def numbers(color: str) -> list[float]:
    """`rgb(1, 2, 3)`."""
    return [float(part) for part in re.findall(r"[\d.]+", color)[:3]]


def contrast(one: str, other: str) -> float:
    """Of two colors (WCAG 2.2, contrast ratio)."""

    def luminance(color: str) -> float:
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (value / 255 for value in numbers(color))
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


# Under load.


@pytest.mark.long
async def test_page_works_with_many_connections(io_loop, browser):
    """With thousands of open connections the page has a limited number of rows."""
    wanted = CROWD + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= wanted, f"ulimit -n {wanted}"
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    flags = ("--ping_interval=0", f"--max_connections={CROWD + 10}")
    async with Service(*flags) as service, opened(browser, service) as page:
        await is_live(page)
        async with crowd(service), websockets.connect(
            service.ws_url, user_agent_header="the-one"
        ) as client:
            await expect(page.locator("#open")).to_have_text(f"{CROWD + 1:,}")
            rows = page.locator("#rows tr")
            found = page.locator("#found")
            await expect(found).to_contain_text(f"of {CROWD + 1:,}")
            assert await rows.count() == 10
            async with asyncio.timeout(DEADLINE):
                await page.get_by_label("Search").fill("the-one")
                await expect(rows).to_have_count(1)
                await rows.get_by_role("button").click()
                dialog = page.get_by_role("dialog")
                await dialog.get_by_label("Send a frame").fill("found you")
                await dialog.get_by_role("button", name="Send").click()
                assert await client.recv() == "found you"
                for _ in range(100):  # the page does not disturb the clients
                    await client.send("x")
                    await client.recv()
            nodes = await page.evaluate("document.querySelectorAll('*').length")
            assert nodes < 5000  # a row for each would be several times as many


@contextlib.asynccontextmanager
async def crowd(service: Service) -> AsyncIterator[None]:
    """Open `number` WebSockets that send nothing."""
    address, port = service.ws_url.split("/")[2].split(":")
    request = handshake()
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:

        async def join() -> None:
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            await loop.sock_connect(client, (address, int(port)))
            await loop.sock_sendall(client, request)
            assert (await loop.sock_recv(client, 4096)).startswith(b"HTTP/1.1 101")

        for _ in range(CROWD // 100):
            await asyncio.gather(*(join() for _ in range(100)))
        yield


@pytest.mark.long
async def test_page_under_load_does_not_grow(io_loop, browser):
    """300 messages per second each way; memory is stable after a forced GC."""
    async with Service() as service, opened(browser, service) as page:
        await is_live(page)
        asked_again: list[str] = []
        page.on(
            "request",
            lambda request: asked_again.append(request.url)
            if request.url.endswith("/live")
            else None,
        )
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable")
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(30)
            ]
            load = asyncio.create_task(talk(clients))
            # Until the tail and the charts hold their maximum.
            await expect(page.locator("#tail > li")).to_have_count(500)
            await expect(page.locator("#in")).to_have_text(
                re.compile(r"^(2[789]|3[012])\d$")
            )
            began = time.monotonic()
            before = await size_of(session)
            await asyncio.wait({load}, timeout=LOAD_SECONDS)
            assert time.monotonic() - began >= LOAD_SECONDS
            after = await size_of(session)
            assert not load.done()
            load.cancel()
            await is_live(page)
            assert await page.locator("#tail > li").count() == 500
            assert not asked_again  # there is only one stream
        assert after["JSEventListeners"] <= before["JSEventListeners"] + 5
        assert after["Nodes"] <= before["Nodes"] + 1000
        assert after["JSHeapUsedSize"] <= before["JSHeapUsedSize"] + 2**18


async def talk(clients: list[Any]) -> None:
    """Each client sends ten messages per second, and reads their echoes."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += len(clients) / MESSAGES_PER_SECOND
        await asyncio.gather(*(client.send("x" * 40) for client in clients))
        await asyncio.gather(*(client.recv() for client in clients))
        await asyncio.sleep(max(0.0, due - loop.time()))


async def size_of(session: Any) -> dict[str, float]:
    """Return what the page holds after a garbage collection."""
    for _ in range(3):
        await session.send("HeapProfiler.collectGarbage")
    metrics = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in metrics["metrics"]}
