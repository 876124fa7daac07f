"""The page in a real browser: `pip install playwright`, and a Chromium (Debian's `apt-get install chromium`)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("starlette")
pytest.importorskip("httpx")

from llama4 import Llama4  # noqa: E402
from llama4.serve.app import Settings  # noqa: E402
from tests.serve.running import Running, until  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.xdist_group("chromium"),
]
PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"
ABLE = "I can only answer questions about drawings of coloured shapes and short texts."
REPLY = ".message.assistant .said"

HOSTILE = """\
<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> <svg onload=window.hacked=1>
[run](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>) [file](file:///etc/passwd)
![seen](http://other.example/pixel.png) <http://pointed.example/> [`good`](https://good.example/a_(b)) http://bare.example.
<style>body{display:none}</style> <iframe src=//other.example></iframe> [rel](//other.example) [a](/v1/models)

| a<img src=x onerror=window.hacked=1> | b |
|---|--:|
| `<b>` | **bold** |

```html" onmouseover="window.hacked=1
<img src=x onerror=window.hacked=1>
```
"""
MARKDOWN = """\
# Title

Text with **bold**, *slanted*, ~~gone~~, `code`, snake_case_name and 2 * 3 * 4.

1. one
   - inner
   - [x] done
2. two

> said

| left | right |
|:-----|------:|
| a\\|b | 1     |

```python
def f():  # note
    return "text" + 1
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    server = Running(Llama4.from_pretrained("tiny", progress=False), Settings("tiny", api_key="secret"))
    yield server
    server.close()


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    yield from opened(browser, running)


def opened(browser: Any, server: Running, **options: Any) -> Iterator[Any]:
    """The page in a browser of its own; nothing may fail in it, and nothing may be asked of another address."""
    context = browser.new_context(viewport={"width": 1100, "height": 760}, **options)
    context.set_default_timeout(20_000)
    asked: list[str] = []
    problems: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.extend([message.text] if message.type == "error" else []))
    page.goto(server.url)
    wait(page, "document.title === 'tiny' || document.querySelector('dialog[open]')")
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((f"{server.url}/", "data:", "blob:"))]
    assert not [problem for problem in problems if not re.search("TrustedHTML|status of 4(01|29)", problem)]


def wait(page: Any, expression: str) -> None:
    """Until it is true. Playwright's own way evaluates text in the page, which the page's policy forbids."""
    until(lambda: page.evaluate(expression))


def ask(page: Any, text: str, expected: str | None = None) -> None:
    count = page.locator(".message.assistant .figures").count()
    page.fill("#message", text)
    page.keyboard.press("Enter")
    wait(page, f"document.querySelectorAll('.message.assistant .figures').length > {count}")
    if expected is not None:
        assert page.locator(REPLY).last.inner_text() == expected


def script(page: Any, *replies: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer from here in the model's place; returns the bodies of requests, as they come."""
    bodies: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        reply = replies[len(bodies)]
        bodies.append(route.request.post_data_json)
        deltas = [{"content": reply}] if isinstance(reply, str) else reply
        events: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        events.append({"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 8, "total_tokens": 17}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=text)

    page.route("**/v1/chat/completions", answer)
    return bodies


def never_ending(page: Any) -> None:
    def go_on(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True, "max_tokens": 5000}))

    page.route("**/v1/chat/completions", go_on)


def transfer(page: Any, event: str) -> None:
    """A picture is dropped or pasted."""
    page.evaluate(
        """([event, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "shapes.png", { type: "image/png" }));
            const made = event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
                : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
            document.querySelector("#message").dispatchEvent(made);
        }""",
        [event, base64.b64encode(PICTURE.read_bytes()).decode()],
    )


def test_a_question_is_answered_and_a_reload_keeps_it(page: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("What can")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you do?")
    assert page.input_value("#message") == "What can\nyou do?"
    ask(page, "What can you do?", ABLE)
    assert re.fullmatch(r"15 tokens · [\d,.]+ a second · first after [\d.]+ s", page.inner_text(".figures"))
    assert re.fullmatch(r"\d+ of \d,\d{3} tokens", page.inner_text("#context-text"))
    assert page.inner_text("#announcer") == ABLE
    assert page.evaluate("document.activeElement.id") == "message"
    page.reload()
    page.wait_for_selector(REPLY)
    assert page.inner_text(REPLY) == ABLE
    page.click("#new-chat")
    assert page.is_visible("#welcome")
    ask(page, "Hello", ABLE)
    assert page.locator(".conversation").count() == 2
    page.click(".conversation:not(.current) .open")
    assert page.inner_text(".message.user .said") == "What can you do?"
    with page.expect_download() as download:
        page.click(".conversation.current [aria-label^=Export]")
    exported = json.loads(Path(download.value.path()).read_text())
    assert [message["content"] for message in exported["messages"]] == ["What can you do?", ABLE]
    page.click(".conversation.current [aria-label^=Delete]")
    wait(page, "document.querySelectorAll('.conversation').length === 1")
    page.click(".toast button")
    wait(page, "document.querySelectorAll('.conversation').length === 2")


@pytest.mark.parametrize("way", ["drop", "paste", "choice"])
def test_a_picture_is_seen(page: Any, way: str) -> None:
    if way == "choice":
        page.set_input_files("#files", PICTURE)
    else:
        transfer(page, way)
    page.wait_for_selector("#attached img")
    ask(page, "What colour is the circle?", "Red.")
    assert page.locator(".message.user img").count() == 1
    assert page.locator("#attached li").count() == 0
    if way == "drop":
        ask(page, "What colour is the star?", "Blue.")  # the picture is still in the conversation
        page.reload()
        page.wait_for_selector(".message.user img")


def test_what_is_no_picture_is_said(page: Any) -> None:
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector(".toast")
    assert "is not a picture" in page.inner_text(".toast")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop(page: Any, running: Running, how: str) -> None:
    never_ending(page)
    page.fill("#message", "Go on")
    page.keyboard.press("Enter")
    wait(page, f"(document.querySelector('{REPLY}')?.innerText.length ?? 0) > 30")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    page.wait_for_selector(".note")
    assert page.inner_text(".note") == "Stopped."
    until(running.is_idle)  # the server stops, too
    assert page.evaluate("document.activeElement.id") == "message"
    page.unroute("**/v1/chat/completions")
    ask(page, "What can you do?", ABLE)


def test_what_is_deleted_while_it_is_written_stays_deleted(page: Any, running: Running) -> None:
    never_ending(page)
    page.fill("#message", "Go on")
    page.keyboard.press("Enter")
    wait(page, f"(document.querySelector('{REPLY}')?.innerText.length ?? 0) > 30")
    page.click(".conversation.current [aria-label^=Delete]")
    until(running.is_idle)
    page.wait_for_timeout(200)
    page.reload()
    wait(page, "document.title === 'tiny'")
    assert page.locator(".conversation").count() == 0 and page.is_visible("#welcome")


def test_edit_and_regenerate_keep_versions(page: Any) -> None:
    bodies = script(page, "first", "second", "third", "fourth")
    ask(page, "one", "first")
    page.hover(".message.user")
    page.click("[aria-label=Edit]")
    assert page.input_value(".editor textarea") == "one"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit"
    page.keyboard.press("Enter")
    page.fill(".editor textarea", "two")
    page.keyboard.press("Enter")
    wait(page, f"document.querySelector('{REPLY}')?.innerText === 'second'")
    page.click("[aria-label='Answer again']")
    wait(page, f"document.querySelector('{REPLY}')?.innerText === 'third'")
    ask(page, "more", "fourth")
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    assert said == [["one"], ["two"], ["two"], ["two", "third", "more"]]
    page.locator(".message.assistant [aria-label='Version before']").first.click()
    assert page.locator(REPLY).all_inner_texts() == ["second"]
    page.click(".message.user [aria-label='Version before']")
    assert page.locator(REPLY).all_inner_texts() == ["first"]
    page.click(".message.user [aria-label='Next version']")
    assert page.locator(REPLY).all_inner_texts() == ["third", "fourth"]


def test_hostile_text_is_inert(page: Any) -> None:
    script(page, HOSTILE, HOSTILE)
    ask(page, HOSTILE)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    links = page.eval_on_selector_all("#messages a", "links => links.map((a) => [a.href, a.rel, a.innerText])")
    rel = "noopener noreferrer nofollow"
    assert links == [
        ["http://other.example/pixel.png", rel, "seen"],
        ["http://pointed.example/", rel, "http://pointed.example/"],
        ["https://good.example/a_(b)", rel, "good"],
        ["http://bare.example/", rel, "http://bare.example"],
    ]
    assert page.locator("#messages :is(img, script, style, iframe, svg[onload])").count() == 0
    assert "<img src=x onerror" in page.inner_text(REPLY)
    assert page.locator("#messages [onerror], #messages [onmouseover], #messages [style]").count() == 0
    with pytest.raises(sync_api.Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>'")


def test_markdown(page: Any) -> None:
    script(page, MARKDOWN)
    ask(page, "Markdown")
    texts = "elements => elements.map((element) => element.textContent)"
    for selector, expected in {
        "h3": ["Title"],
        "p strong": ["bold"],
        "p em": ["slanted"],
        "p s": ["gone"],
        "p code": ["code"],
        "ol > li > ul > li": ["inner", "done"],
        "li input[type=checkbox]": [""],
        "blockquote p": ["said"],
        "th.to-end": ["right"],
        "td": ["a|b", "1"],
        "pre code": ['def f():  # note\n    return "text" + 1'],
        ".code .word": ["def", "return"],
        ".code .note-text": ["# note"],
        ".code .text": ['"text"'],
    }.items():
        assert page.eval_on_selector_all(f"{REPLY} {selector}", texts) == expected, selector
    assert page.locator(f"{REPLY} ol > li").count() == 2
    assert "snake_case_name and 2 * 3 * 4." in page.inner_text(REPLY)


def test_long_and_nested_text_keeps_the_page_quick(page: Any) -> None:
    page.evaluate(
        """async () => {
            const { MarkdownView } = await import("./page/markdown.js");
            window.render = (text) => {
                const box = document.createElement("div");
                document.querySelector("#messages").append(box);
                const begun = performance.now();
                new MarkdownView(box).update(text, true);
                box.offsetHeight;
                const took = performance.now() - begun;
                const length = box.textContent.length;
                box.remove();
                return [took, length];
            };
        }"""
    )
    n = 50_000
    texts = ["```c\n" + "int x = 1; // y\n" * n, "> " * n, "*_" * n, "[" * n, "`" + " ``" * n, "- " * n, "\n" * n + "x"]
    texts += ["**a " * n, "| " * n + "\n" + "|-" * n, "((" * n, "[a](" * n, "- a\n" + "\n" * n]
    texts += [" " * n + "|\n" + " " * n + "|x"]
    texts += ["<http://a" * n, "http://a" + ")" * n, "#" * n, "- - " * n, "a\n" * n, "~~a~~ " * n, "x\\" * n]
    for text in texts:
        took, length = page.evaluate("text => render(text)", text)
        assert took < 4000, text[:20]
        assert length or not text.strip("#->| \n"), text[:20]


def test_tool_calls_are_shown_and_answered(page: Any) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": ' "<b>Bern"}'}}
    bodies = script(page, [{"tool_calls": [call]}, {"tool_calls": [rest]}], "Sunny.")
    page.click("#open-settings")
    page.fill("[name=tools]", "[1]")
    page.click("text=Done")
    assert page.is_visible("#settings"), "what is wrong is not taken"
    page.fill("[name=tools]", '[{"type": "function", "function": {"name": "weather"}}]')
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.5")
    page.fill("[name=top_p]", "0.9")
    page.fill("[name=max_tokens]", "100")
    page.fill("[name=seed]", "7")
    page.click("text=Done")
    ask(page, "Weather?")
    assert page.inner_text(".tool h3") == "Calls weather"
    assert page.inner_text(".tool pre") == '{\n  "city": "<b>Bern"\n}'
    page.fill(".tool-results textarea", "sun")
    page.click("text=Send result")
    wait(page, f"[...document.querySelectorAll('{REPLY}')].at(-1).innerText === 'Sunny.'")
    function = {"name": "weather", "arguments": '{"city": "<b>Bern"}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    settings = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 100, "seed": 7}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    streamed = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    assert bodies[1] == {**settings, **streamed, "tools": tools, "messages": messages}
    assert page.locator(".tool-results").count() == 0


def test_the_key_is_asked_for_and_kept_for_the_session(browser: Any, locked: Running) -> None:
    for page in opened(browser, locked):
        page.wait_for_selector("#settings-alert:not([hidden])")
        assert page.evaluate("document.activeElement.name") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        wait(page, "document.querySelector('#settings-alert').innerText.includes('wrong')")
        page.fill("[name=key]", "secret")
        page.keyboard.press("Enter")
        wait(page, "document.title === 'tiny'")
        ask(page, "What can you do?", ABLE)
        assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")
        page.reload()
        wait(page, "document.title === 'tiny'")


def test_an_error_is_said_and_can_be_tried_again(page: Any) -> None:
    error = {"error": {"message": "the queue is full"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=error))
    ask(page, "What can you do?")
    assert page.inner_text(".problem") == "the queue is full"
    page.unroute("**/v1/chat/completions")
    page.click("[aria-label='Answer again']")
    wait(page, f"document.querySelector('{REPLY}')?.innerText === {json.dumps(ABLE)}")


CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => (x * a + below[i] * (255 - a)) / 255);
    const ground = (node) => {
        if (!node) return [255, 255, 255];
        const own = rgba(getComputedStyle(node).backgroundColor);
        return own[3] === 255 ? own.slice(0, 3) : over(own, ground(node.parentElement));
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const poor = [];
    let seen = 0;
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const node = walk.currentNode.parentElement;
        const isShown = node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
        if (!walk.currentNode.data.trim() || !isShown || node.closest(".unseen, .skip, [inert], :disabled")) continue;
        const below = ground(node);
        const above = over(rgba(getComputedStyle(node).color), below);
        const [high, low] = [light(above), light(below)].sort((a, b) => b - a);
        const contrast = (high + 0.05) / (low + 0.05);
        seen++;
        if (contrast < 4.5) poor.push([walk.currentNode.data.slice(0, 40), contrast]);
    }
    return [seen, poor];
}"""
NAMED = {"button", "textbox", "spinbutton", "checkbox", "link", "dialog", "navigation", "region", "image", "meter"}


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_names_and_contrasts(browser: Any, running: Running, colours: str) -> None:
    """What a screen reader is told, from Chromium's own tree; contrasts of all text, computed."""
    for page in opened(browser, running, color_scheme=colours):
        call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": "{}"}}
        script(page, MARKDOWN + HOSTILE, [{"content": "Wait."}, {"tool_calls": [call]}])
        transfer(page, "drop")
        page.wait_for_selector("#attached img")
        ask(page, "Markdown")
        ask(page, "Tools")
        session = page.context.new_cdp_session(page)
        for opens in (None, "#open-settings"):
            if opens:
                page.click(opens)
            seen, poor = page.evaluate(CONTRASTS)
            assert seen > 20 and not poor
            nodes = session.send("Accessibility.getFullAXTree")["nodes"]
            shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED]
            assert len(shown) > 10
            assert not [node for node in shown if not node.get("name", {}).get("value", "").strip()]
        assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == page.evaluate(
            "document.querySelectorAll('[id]').length"
        )
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(251, 250, 248)", "dark": "rgb(24, 23, 21)"}[colours]
        page.keyboard.press("Escape")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper, "the switch is kept"


def test_a_phone(browser: Any, running: Running) -> None:
    for page in opened(browser, running, is_mobile=True, has_touch=True):
        page.set_viewport_size({"width": 360, "height": 640})
        script(page, MARKDOWN + HOSTILE + "\n\n" + "x" * 500 + "\n\n    " + "y" * 500 + f"\n\n```\n{'z' * 500}\n```")
        ask(page, "a" * 300)
        widths = "[document.documentElement.scrollWidth, document.querySelector('#transcript').scrollWidth, innerWidth]"
        assert page.evaluate(widths) == [360, 360, 360]
        assert not page.is_visible("#sidebar")
        page.click("#open-sidebar")
        assert page.evaluate("document.activeElement.id") == "close-sidebar"
        assert page.evaluate("document.querySelector('.main').inert")
        page.keyboard.press("Escape")
        assert not page.is_visible("#sidebar")
        assert page.evaluate("document.activeElement.id") == "open-sidebar"
        page.click("#open-sidebar")
        page.click("#new-chat")
        assert page.is_visible("#welcome") and not page.is_visible("#sidebar")
        page.click("#open-settings")
        box = page.locator("#settings").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
