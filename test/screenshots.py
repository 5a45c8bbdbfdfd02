"""Takes the pictures of the console that the docs show: `make screenshots`.

    python test/screenshots.py [--seconds=75]

A relay of its own at each shot, on the ports that the docs name, which must be free.
What the pictures show has happened: clients that talk, a backend that answers and
is unreachable for a moment.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import shutil
import sys
from collections.abc import AsyncIterator

import websockets
from playwright.async_api import Browser, Page, async_playwright, expect
from service import PROJECT, Service

IMAGES = PROJECT / "docs" / "images"
WIDE = {"width": 1120, "height": 900}
PHONE = {"width": 390, "height": 800}
CLIENTS = 60
BACKEND = "http://127.0.0.1:8000"
HTTP = (
    "--backend=http", "--instance_name=relay-1", "--bindport=8765",
    *(f"--{kind}uri={BACKEND}/{kind}" for kind in ("connect", "message", "disconnect")),
)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=75, help="of load")
    seconds = parser.parse_args().seconds
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is missing: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        async with Service("--bindport=8765", "--instance_name=relay-1"):
            async with console(browser, WIDE) as page:
                await page.screenshot(path=IMAGES / "first-look.png")
                await say(page, "Hello")
                await expect(page.locator("#pairs li ul li")).to_have_count(5)
                await shoot(page, "first-echo.png")
        async with backend(), Service(*HTTP):
            async with console(browser, WIDE) as page:
                await say(page, "Hello")
                await expect(page.locator("#pairs li ul li")).to_have_count(5)
                await page.get_by_role("button", name="Disconnect").click()
                await expect(page.locator("#pairs li ul li")).to_have_count(7)
                await shoot(page, "first-backend.png")
        async with Service(*HTTP[:3], f"--messageuri={BACKEND}/message"):
            async with console(browser, WIDE) as page:
                await say(page, "Are you there?")
                failed = page.locator("#pairs li ul li.bad")
                await failed.nth(4).wait_for()
                async with backend():
                    await expect(page.locator("#pairs > li")).to_have_count(3)
                    await expect(page.locator("#pairs")).to_contain_text("sent: text")
                    await shoot(page, "first-away.png")
        async with backend(), Service(*HTTP) as service:
            async with console(browser, WIDE) as page:
                phone_context = await browser.new_context(
                    viewport=PHONE, device_scale_factor=2
                )
                phone = await phone_context.new_page()
                await phone.goto("http://localhost:8765/")
                await say(page, "Hello")
                async with talking(service, seconds):
                    await page.evaluate("document.activeElement.blur()")
                    await page.screenshot(path=IMAGES / "console-light.png")
                    await page.emulate_media(color_scheme="dark")
                    await page.screenshot(path=IMAGES / "console-dark.png")
                    await phone.screenshot(
                        path=IMAGES / "console-phone.png", scale="css"
                    )
        await outages(browser)
        await browser.close()


async def outages(browser: Browser) -> None:
    """The console while the backend, then the relay itself is unreachable."""
    async with Service(*HTTP[:3], f"--messageuri={BACKEND}/message") as service:
        async with console(browser, WIDE) as page, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(CLIENTS)
            ]
            for client in clients:
                await client.send("Are you there?")
            await page.locator("#outage").wait_for()
            await asyncio.sleep(20)  # of an outage, for the charts
            await page.screenshot(path=IMAGES / "console-outage.png")
            async with backend():
                await page.locator("#outage").wait_for(state="hidden")
            service.process.terminate()
            await service.process.wait()
            await page.locator("body[data-relay=lost]").wait_for()
            await asyncio.sleep(0.5)  # until it is painted
            await page.screenshot(path=IMAGES / "console-relay-gone.png")


@contextlib.asynccontextmanager
async def console(browser: Browser, size: dict[str, int]) -> AsyncIterator[Page]:
    """The page, live."""
    context = await browser.new_context(viewport=size)  # type: ignore[arg-type]
    page = await context.new_page()
    await page.goto("http://localhost:8765/")
    await expect(page.get_by_role("status").first).to_have_text("Live")
    yield page
    await context.close()


async def say(page: Page, text: str) -> None:
    """Connect in the playground, and send."""
    await page.get_by_role("button", name="Connect", exact=True).click()
    await page.get_by_text("Connected.", exact=True).wait_for()
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def shoot(page: Page, name: str) -> None:
    await page.evaluate("document.activeElement.blur()")
    box = await page.locator("#playground").bounding_box()
    assert box is not None
    clip = {"x": 0, "y": box["y"], "width": WIDE["width"], "height": box["height"] + 16}
    await page.screenshot(path=IMAGES / name, full_page=True, clip=clip)


@contextlib.asynccontextmanager
async def backend() -> AsyncIterator[None]:
    """`examples/backend.py`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "examples/backend.py", cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()

    async def drop(stdout: asyncio.StreamReader) -> None:
        while await stdout.read(65536):
            pass

    dropping = asyncio.create_task(drop(process.stdout))
    try:
        yield
    finally:
        process.terminate()
        await process.wait()
        await dropping


@contextlib.asynccontextmanager
async def talking(service: Service, seconds: float) -> AsyncIterator[None]:
    """Clients that connect, send and leave; some are rejected."""
    async with contextlib.AsyncExitStack() as stack:
        clients: list[websockets.ClientConnection] = []
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        for step in itertools.count():
            if loop.time() > end:
                yield
                return
            if len(clients) < CLIENTS and step % 8 == 0:
                clients.append(
                    await stack.enter_async_context(websockets.connect(service.ws_url))
                )
            elif step % 150 == 149:
                await clients.pop(0).close(1001, "bye")
                with contextlib.suppress(websockets.InvalidStatus):
                    await websockets.connect(service.ws_url, origin="http://x.example")
            share = 0.5 + 0.4 * math.sin(step / 40) + 0.1 * math.sin(step / 7)
            busy = clients[: max(1, int(len(clients) * share * 0.25))]
            await asyncio.gather(*(exchange(client) for client in busy))
            await asyncio.sleep(0.08)  # what paces the load, not what waits for it


async def exchange(client: websockets.ClientConnection) -> None:
    await client.send('{"ask": "time"}')
    await client.recv()


if __name__ == "__main__":
    asyncio.run(main())
