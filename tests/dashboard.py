"""The dashboard in a real browser: dashboard.py URL UP_PID DECODE_PID TOKEN_FILE OUT. Chromium loads the page, asks, stops, reads charts
by keyboard, sees workers die and come back and has one leave, in light and dark and at a phone's width. Its pictures are left in OUT.
Knows nothing of the page but what a person meets: names, roles, words."""

import json
import re
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

QUESTION, ANSWER = "What does `Vec::push` do?", "Appends an element to the back of a collection."
SIZES = {"desk": (1440, 1000), "phone": (390, 844)}


def main(url, up, decode, token, out):
    out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=20_000)
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("no chromium in PATH: run tests/install")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        first(browser, url, out)
        stops(browser, url)
        dies_and_returns(browser, url, up, decode, out)
        refuses(browser, url)
        leaves(browser, url, up, token)
        for scheme in ("light", "dark"):
            for size in SIZES:
                looks(browser, url, scheme, size, token, out)
        browser.close()
    print("the dashboard is sound")


class Page:
    """A page, and everything that it should not do while it is open."""

    def __init__(self, browser, url, scheme="light", size="desk"):
        width, height = SIZES[size]
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce")
        self.page, self.url, self.wrong = context.new_page(), url, []
        self.page.set_default_timeout(20_000)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("console", self.heard)
        self.page.on("request", lambda request: request.url.startswith(url + "/") or self.wrong.append(f"outside: {request.url}"))

    def heard(self, message):
        # Browsers report every 404 as an error; the record of a stopped answer is there once the gateway has seen its client leave,
        # for which the page asks again. That a record is shown is looked for by itself.
        early = "/trace/" in message.location.get("url", "") and "404" in message.text
        if message.type in ("error", "warning") and not early:
            self.wrong.append(f"console: {message.text} {message.location}")

    def open(self, path="/dashboard"):
        self.page.goto(self.url + path)
        expect(self.page.get_by_role("status")).not_to_have_text("Connecting")
        return self.page

    def close(self):
        assert not self.wrong, self.wrong
        self.page.context.close()


def get(url):
    try:
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def traces(url):
    return "Unknown request URL" not in get(f"{url}/trace/absent").get("error", {}).get("message", "")


def until(what, holds, patience=20):
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"not in {patience} s: {what}"
        time.sleep(0.05)


def focus_by_tab(page, selector):
    """As somebody without a mouse gets there."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the Tab key never reaches {selector}")


def first(browser, url, out):
    """What a newcomer sees and does, with the keyboard alone."""
    opened = Page(browser, url)
    page = opened.open("/")
    assert page.url.endswith("/dashboard"), page.url
    expect(page.get_by_role("status")).to_have_text("Serving")
    members = {member["id"]: member["role"] for member in get(f"{url}/status")["members"]}
    assert sorted(members.values()) == ["decode", "decode", "prefill", "prefill"], members
    for member in members:
        expect(page.locator(f'[data-member="{member}"]')).to_contain_text("ready")
    expect(page.get_by_role("heading", name="Decode 2 of 2 ready")).to_be_visible()

    focus_by_tab(page, "#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="The cluster")
    expect(answer).to_contain_text(ANSWER)
    for role in ("prefill", "decode"):
        worker = answer.locator(f".worker.{role}")
        expect(worker).to_be_visible()
        assert members[worker.get_attribute("title")] == role
    if traces(url):
        expect(answer.get_by_text("Where the time went:")).to_be_visible()
        answer.get_by_text("As a table").click()
        for part in ("Queue", "Prefill", "Hand-off"):
            expect(answer.get_by_role("rowheader", name=part, exact=True)).to_be_visible()
    else:
        expect(answer).to_contain_text("no record of where the time went")

    chart = page.get_by_role("slider", name="Time to first token, through time")
    until("a sample with a first token", lambda: re.search(r"p50 \d", chart.get_attribute("aria-valuetext")))
    chart.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".reading:visible")).to_contain_text("p99")
    page.get_by_role("button", name="As tables").click()
    expect(page.get_by_role("group", name="Hand-off, as a table").get_by_role("row")).not_to_have_count(1)

    page.get_by_label("Your message").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="The cluster")).to_have_count(2)
    expect(page.get_by_role("article", name="The cluster").last.locator(".worker.decode")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article", name="The cluster")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    opened.close()


# From within the page: asked from here, the longest answer may have ended before a busy machine comes to press the button.
STOP_AT_FIRST_WORD = """() => {
    const stop = [...document.querySelectorAll("button")].find((button) => button.textContent === "Stop");
    new MutationObserver((_, observer) => {
        if (!document.querySelector("article[aria-label='The cluster']")?.textContent.includes("Appends")) return;
        observer.disconnect();
        if (!stop.checkVisibility()) throw new Error("an answer is on its way, and nothing to stop it is shown");
        stop.click();
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""


def stops(browser, url):
    """The stop button ends the answer, and nothing of it stays on any worker."""
    opened = Page(browser, url)
    page = opened.open()

    def endless(route):
        body = {**json.loads(route.request.post_data), "ignore_eos": True, "max_tokens": 1900}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", endless)
    page.get_by_label("Your message").fill(QUESTION)
    page.evaluate(STOP_AT_FIRST_WORD)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("article", name="The cluster")).to_contain_text("Appends")
    expect(page.get_by_text("Stopped.")).to_be_visible()

    def idle():
        status = get(f"{url}/status")
        loads = [member["load"] for member in status["members"]]
        held = sum(load["running"] + load["blocks_total"] - load["blocks_free"] for load in loads)
        return status["running"] == 0 and held == 0

    until("no worker holds anything of the stopped answer", idle)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    opened.close()


def dies_and_returns(browser, url, up, decode, out):
    """A killed worker is missing in words, until another takes its place; `baton up` is held so that this takes a while."""
    opened = Page(browser, url)
    page = opened.open()
    problems = page.get_by_role("region", name="What is wrong")
    lost = next(member["id"] for member in get(f"{url}/status")["members"] if member["pid"] == decode)
    os.kill(up, signal.SIGSTOP)
    try:
        os.kill(decode, signal.SIGKILL)
        expect(problems).to_contain_text("The decode pool has 1 of 2 workers ready.")
        expect(problems).to_contain_text(f"{lost} (process {decode}")
        expect(page.get_by_role("status")).to_have_text("Serving, with a warning")
        expect(page.locator(f'[data-member="{lost}"]')).to_contain_text("missing")
        page.screenshot(path=out / "missing.png")
    finally:
        os.kill(up, signal.SIGCONT)
    expect(page.get_by_role("status")).to_have_text("Serving")
    expect(page.locator(f'[data-member="{lost}"]')).to_have_count(0)
    expect(page.locator(".problem")).to_have_count(0)
    opened.close()

    opened = Page(browser, url)
    page = opened.open()
    page.route("**/status", lambda route: route.abort())
    expect(page.get_by_role("region", name="What is wrong")).to_contain_text("The gateway does not answer.")
    page.unroute("**/status")
    expect(page.get_by_role("status")).to_have_text("Serving")
    assert all("ERR_FAILED" in wrong for wrong in opened.wrong), opened.wrong
    page.context.close()


def give(page, token):
    """The admin token, by keyboard."""
    focus_by_tab(page, "#operate")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Admin token")).to_be_visible()
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)


def refuses(browser, url):
    """Without the token there is nothing to press, and a wrong one is forgotten with the words of who refused it."""
    opened = Page(browser, url)
    page = opened.open()
    buttons, told = page.get_by_role("button", name=re.compile("^Drain ")), page.locator("#ordered")
    expect(page.locator("[data-member]")).to_have_count(4)
    expect(buttons).to_have_count(0)
    give(page, "this is no such token")
    expect(buttons).to_have_count(4)
    buttons.first.click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(told).to_have_text("Refused: this is not the admin token.")
    expect(buttons).to_have_count(0)
    assert len(opened.wrong) == 1 and "401" in opened.wrong[0], opened.wrong
    assert len(get(f"{url}/status")["members"]) == 4
    page.context.close()


def leaves(browser, url, up, token):
    """A worker is told to leave, by keyboard, and is gone; `baton up` is held meanwhile, for it would start another."""
    opened = Page(browser, url)
    page = opened.open()
    told = page.locator("#ordered")
    member = next(member["id"] for member in get(f"{url}/status")["members"] if member["role"] == "decode")
    give(page, token)
    drain = f'[data-drain="{member}"]'
    focus_by_tab(page, drain)
    page.keyboard.press("Enter")
    asked = page.get_by_role("dialog", name=re.compile("leave"))
    expect(asked).to_contain_text(member)
    page.keyboard.press("Enter")
    expect(asked).to_have_count(0)
    expect(told).not_to_contain_text("takes nothing new")
    os.kill(up, signal.SIGSTOP)
    try:
        focus_by_tab(page, drain)
        page.keyboard.press("Enter")
        focus_by_tab(page, "dialog [value=drain]")
        page.keyboard.press("Enter")
        expect(told).to_contain_text("takes nothing new")
        expect(page.locator(f'[data-member="{member}"]')).to_have_count(0)
        expect(page.get_by_role("heading", name="Decode 1 of 2 ready")).to_be_visible()
    finally:
        os.kill(up, signal.SIGCONT)
    expect(page.get_by_role("heading", name="Decode 2 of 2 ready")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Serving")
    opened.close()


def looks(browser, url, scheme, size, token, out):
    """Nothing overflows, nothing moves for who wants no motion, axe finds no fault; also with what the admin token brings."""
    opened = Page(browser, url, scheme, size)
    page = opened.open()
    page.get_by_label("Your message").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="The cluster")).to_contain_text("→")
    page.wait_for_timeout(500)
    sound(page, f"{scheme} {size}")
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=out / f"{scheme}-{size}.png")
    page.screenshot(path=out / f"{scheme}-{size}-whole.png", full_page=True)
    page.get_by_role("button", name="As tables").click()
    sound(page, f"{scheme} {size}, as tables")
    give(page, token)
    sound(page, f"{scheme} {size}, with orders")
    page.screenshot(path=out / f"{scheme}-{size}-orders.png")
    page.get_by_role("button", name=re.compile("^Drain ")).first.click()
    sound(page, f"{scheme} {size}, asked whether to drain")
    page.screenshot(path=out / f"{scheme}-{size}-drain.png")
    page.keyboard.press("Escape")
    assert page.evaluate("document.getAnimations().length") == 0
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    opened.close()


def sound(page, where):
    beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert beyond <= 0, f"{where} is {beyond} px too wide"
    faults = Axe().run(page).response["violations"]
    told = [(fault["id"], [node["html"] + node["failureSummary"] for node in fault["nodes"][:3]]) for fault in faults]
    assert not told, f"{where}: {json.dumps(told, indent=1)}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).read_text().strip(), Path(sys.argv[5]))
