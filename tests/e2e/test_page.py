"""The page at ``/`` in a real Chromium, over a real service of the built-in bridge that asks for a key."""

import base64
import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Page, Route, expect

from latentwire.bridge import wire
from latentwire.service.api.routes.page import FOLDER
from tests.e2e.conftest import KEY, WAIT_SECONDS, Open, number, opened_browser, run, running_service, said, sideways

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "page.png"  # the guide shows it
RENEW = 'to take it anew: python -c "from tests.e2e.test_page import take_picture; take_picture()"'
HOSTILE = '<img src="x" onerror="document.title = \'taken\'">'
LONG = {"source": "Mara lives in Rome.", "temperature": "9", "max-tokens": "400", "seed": "1"}  # 400 tokens


def pixels(page: Page) -> "np.ndarray[Any, Any]":
    """The heat map, (K, C, RGBA)."""
    read = "map => [map.height, map.width, [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data]]"
    height, width, data = page.locator("#map").evaluate(read)
    return np.array(data).reshape(height, width, 4)


def admitted_rows(service: str) -> float:
    text = httpx.get(f"{service}/metrics", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False).text
    (count,) = re.findall(r"^latentwire_admitted_rows (\S+)$", text, re.MULTILINE)
    return float(count)


def test_the_example_is_answered_rightly_from_the_latent_and_the_text_and_not_from_nothing(open_page: Open) -> None:
    page = open_page()
    sent: list[dict[str, Any]] = []
    page.on("request", lambda asked: sent.append(asked.post_data_json) if asked.url.endswith("/generate") else None)
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_contain_text("From the latent: Mara lives in Rome.")  # for screen readers
    expect(said(page, "bridge")).to_have_text("Mara lives in Rome.")
    expect(said(page, "direct")).to_have_text("Mara lives in Rome.")
    expect(said(page, "none")).to_have_text(re.compile(r"Mara lives in (?!Rome)\w+\."))
    given = {body["condition"]: body["inputs"][0] for body in sent}
    assert set(given) == {"bridge", "direct", "none"} and all(body["stream"] for body in sent)
    assert set(given["bridge"]) == {"latent"}  # no text left the page for the receiver of the first column
    assert given["direct"]["text"].startswith("Mara lives in Rome.") and given["none"] == {"text": ""}
    assert {body["prompt"] for body in sent} == {"Question: Where does Mara live?\nAnswer:"}
    for condition in given:
        for name in ("first", "total"):
            expect(number(page, condition, name)).to_have_text(re.compile(r"^\d[\d.]* m?s$"))
        expect(number(page, condition, "tokens")).to_have_text("6")


def test_what_the_receiver_reads_is_shown_as_it_is_composed_and_counted(open_page: Open) -> None:
    page = open_page()
    prompt, text = "\nQuestion: Where does Mara live?\nAnswer:", page.locator("#source").input_value()

    def reads() -> list[str]:
        return [column.text_content() or "" for column in page.locator("article .reads").all()]

    assert reads() == [f"soft tokens{prompt}", text + prompt, prompt]
    run(page)
    message = wire.message_bytes(10, 128, "float16")
    assert reads() == [f"10 soft tokens{prompt}", text + prompt, prompt]
    expect(number(page, "bridge", "read")).to_contain_text("10 soft tokens and 12 tokens of prompt")
    expect(number(page, "direct", "read")).to_have_text("44 tokens.")
    expect(number(page, "none", "read")).to_have_text("12 tokens.")
    counts = ["118 bytes", f"{message:,} bytes", "47 tokens", "32 tokens", "10 soft tokens"]
    expect(page.locator("#bars b")).to_have_text(counts)
    expect(page.locator("#saving")).to_contain_text("4.7 sender tokens became one soft token. The message is larger")
    widths = [bar.bounding_box()["width"] for bar in page.locator("#bars dd").all()]
    assert widths[0] < widths[1] / 10 and widths[2] > widths[3] > widths[4]


def test_the_settings_reach_the_service_and_a_prompt_of_ones_own_places_the_latent(open_page: Open) -> None:
    page = open_page()
    page.locator("#form summary").click()
    for name, value in (("temperature", "0.5"), ("max-tokens", "2"), ("seed", "7")):
        page.fill(f"#{name}", value)
    page.fill("#prompt", "Facts: {latent}\n{question}")
    expect(page.locator("article .reads").last).to_have_text("Facts: \nWhere does Mara live?")
    with page.expect_request("**/generate") as asked:
        run(page)
    body = asked.value.post_data_json
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 2, 7)
    assert body["prompt"] == "Facts: {latent}\nWhere does Mara live?"
    expect(number(page, "bridge", "tokens")).to_have_text("2 (the most)")


def test_the_page_reads_a_message_as_the_service_does(open_page: Open) -> None:
    page = open_page()
    latent = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    latent[0, :3] = (0, 6e-8, -3e-5)  # float16 keeps the last two only as subnormal numbers
    decode = "async (data) => { const { decode } = await import('./page/latent.js'); "
    decode += "const { K, C, numbers } = decode(data); return [K, C, [...numbers]]; }"
    for dtype in set(wire.CODES) - set(wire.CODED):  # the page asks for no codes, whose numbers the bridge alone has
        message = wire.encode(latent, "0" * 32, dtype, key=b"sixteen bytes ok")
        K, C, numbers = page.evaluate(decode, base64.b64encode(message).decode())
        np.testing.assert_array_equal(np.array(numbers, np.float32).reshape(K, C), wire.decode(message).latent)


def test_the_latent_is_painted_and_each_number_can_be_read(open_page: Open) -> None:
    page = open_page()
    with page.expect_response("**/encode") as answer:
        run(page)
    latent = wire.decode(base64.b64decode(answer.value.json()["latents"][0]["data"])).latent
    painted = pixels(page)
    assert painted.shape == (*latent.shape, 4) and (painted[..., 3] == 255).all()
    red, blue, clear = painted[..., 0], painted[..., 2], np.abs(latent) > 0.5
    assert (((red > blue) == (latent > 0)) | ~clear).all()
    assert len(np.unique(painted.reshape(-1, 4), axis=0)) > 100
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    assert pixels(page).mean() < painted.mean() - 50
    slot, channel = np.unravel_index(np.abs(latent).argmax(), latent.shape)
    strongest = f"slot {slot + 1}, channel {channel + 1}: {latent[slot, channel]:+.2f}".replace("-", "\N{MINUS SIGN}")
    expect(page.locator("#map-summary")).to_contain_text("10 slots (rows) of 128 channels (columns)")
    expect(page.locator("#map-summary")).to_contain_text(strongest)
    box = page.locator("#map").bounding_box()
    where = {"x": (channel + 0.5) / 128 * box["width"], "y": (slot + 0.5) / 10 * box["height"]}
    page.locator("#map").hover(position=where)
    expect(page.locator("#map-value")).to_have_text(strongest.replace("s", "S"))


def test_everything_is_reached_and_done_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()

    def tab() -> str:
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        focused: str = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        assert outline != "none", f"the focus on {focused} is not seen"
        return focused

    order = [tab() for _ in range(8)]
    assert order == ["forget", "A", "source", "bridge", "receiver", "question", "SUMMARY", "run"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("What does Otto want?")
    run(page)
    expect(said(page, "bridge")).to_have_text("Otto wants a cup of tea.")
    assert [tab() for _ in range(3)] == ["SUMMARY", "run", "map"]
    expect(page.locator("#map-value")).to_contain_text("Slot 1, channel 1:")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator("#map-value")).to_contain_text("Slot 2, channel 2:")
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    expect(page.locator("#map-value")).to_contain_text("Slot 1, channel 2:")
    adding = ["SUMMARY", "new-text", "new-title", "new-files", "new-forever", "new-cut", "add"]  # open: nothing is kept
    assert [tab() for _ in range(11)] == ["filter", *adding, "asked", "ask", "refresh"]


def test_every_field_has_a_name_for_those_who_do_not_see_it(open_page: Open) -> None:
    page = open_page()
    page.locator("#form summary").click()
    for role, names in {
        "textbox": ["Text for the sender to read", "Question for the receiver to answer", "Prompt"],
        "combobox": ["Bridge", "Receiver"],
        "spinbutton": ["Temperature", "Max tokens", "Seed"],
    }.items():
        for name in names:
            expect(page.get_by_role(role, name=name)).to_have_count(1)  # type: ignore[arg-type]


def test_escape_cancels_and_the_service_is_free_again(open_page: Open, service: str) -> None:
    page = open_page()
    page.locator("#form summary").click()
    for name, value in LONG.items():
        page.fill(f"#{name}", value)
    page.keyboard.press("Control+Enter")
    expect(said(page, "bridge")).to_have_text(re.compile(r"\w \w"))  # it streams: there are words, and it goes on
    assert page.locator("#answers").get_attribute("aria-busy") == "true"
    assert admitted_rows(service) > 0
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(number(page, "bridge", "total")).to_have_text("–")
    expect(page.locator("#cancel")).to_be_hidden()
    deadline = time.monotonic() + WAIT_SECONDS
    while admitted_rows(service):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for name, value in {"temperature": "0", "max-tokens": "32", "seed": ""}.items():
        page.fill(f"#{name}", value)
    run(page)
    expect(said(page, "bridge")).to_have_text("Mara lives in Rome.")


def test_a_phone_shows_it_all_without_scrolling_sideways(open_page: Open) -> None:
    page = open_page(viewport={"width": 375, "height": 720}, has_touch=True, is_mobile=True)
    assert sideways(page) == 0
    page.fill("#source", "Mara lives in Rome. " + "w" * 60)
    page.locator("#form summary").click()
    run(page)
    assert sideways(page) == 0
    tops = [column.bounding_box()["y"] for column in page.locator("article").all()]
    assert tops == sorted(set(tops))  # one below the other


def test_bridges_are_listed_with_their_memory_and_engine(open_page: Open, service: str) -> None:
    page = open_page()
    run(page)
    (bridge,) = httpx.get(
        f"{service}/bridges", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False
    ).json()["bridges"]  # fmt: skip
    sizes = {model: f"{count / 1e6:.1f} MB" for model, count in bridge["loaded"].items()}
    rows = page.locator("#bridges tbody tr")
    expect(rows.nth(0)).to_have_text(f"builtin:neoxsender{sizes['builtin:neox']}–")
    expect(rows.nth(1)).to_have_text(f"builtin:llamareceiver{sizes['builtin:llama']}continuous")
    expect(page.locator("#bridge option")).to_have_text(["demo"])
    expect(page.locator("#receiver option")).to_have_text(["builtin:llama"])


def test_what_the_service_refuses_is_told_in_its_own_words(open_page: Open) -> None:
    page = open_page()
    page.fill("#source", "Mara lives in Rome. " * 200)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("sender tokens")
    expect(said(page, "bridge")).to_have_text(re.compile("the text has .* 512"))
    expect(said(page, "none")).to_have_text(re.compile("Mara lives in"))  # the others still answer
    page.locator("#form summary").click()
    page.fill("#max-tokens", "100000")
    page.keyboard.press("Control+Enter")
    for condition in ("direct", "none"):
        expect(said(page, condition)).to_have_text("max_tokens is 100000; at most 512 is taken")
    page.fill("#max-tokens", "32")
    page.fill("#source", "Mara lives in Rome.")
    run(page)
    expect(page.locator(".problem:visible")).to_have_count(0)


def test_a_service_that_asks_for_a_key_gets_it_and_the_tab_alone_keeps_it(open_page: Open, service: str) -> None:
    page = open_page(key=False)
    field = page.get_by_label("API key")
    expect(page.locator("#key-why")).to_have_text(re.compile("the request bears no key"))
    expect(field).to_be_focused()
    for key, why in (("wrong", "the key is not known to this service"), ("schlüssel…", "did not reach")):
        field.fill(key)
        field.press("Enter")
        expect(page.locator("#key-why")).to_contain_text(why)
        expect(field).to_be_focused()
    field.fill(KEY)
    field.press("Enter")
    expect(page.locator("#source")).to_have_value(re.compile("Mara"))
    expect(page.locator("#key-form")).to_be_hidden()
    run(page)
    expect(said(page, "bridge")).to_have_text("Mara lives in Rome.")
    page.reload()
    expect(page.locator("#source")).not_to_have_value("")
    run(page)
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.evaluate("sessionStorage.setItem('latentwire-key', 'revoked')")
    page.keyboard.press("Control+Enter")
    expect(said(page, "bridge")).to_have_text("the key is not known to this service")
    expect(field).to_be_focused()
    field.fill(KEY)
    field.press("Enter")
    expect(page.locator("#source")).to_be_focused()
    page.get_by_role("button", name="Forget the key").click()
    expect(field).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


def test_markup_in_a_text_an_answer_or_an_error_is_shown_and_not_obeyed(open_page: Open) -> None:
    page = open_page()
    page.fill("#source", HOSTILE)
    page.fill("#question", HOSTILE)
    run(page)
    expect(page.locator("[data-condition=direct] .reads")).to_have_text(f"{HOSTILE}\nQuestion: {HOSTILE}\nAnswer:")

    def hostile(route: Route) -> None:  # no model of ours says such a thing, another one may
        if route.request.post_data_json["condition"] == "none":
            route.fulfill(status=422, json={"error": {"message": HOSTILE}})
            return
        done = {
            "outputs": [{"text": HOSTILE, "token_count": 1, "finish_reason": "stop"}],
            "usage": {"soft_tokens": 1, "prompt_tokens": 1},
        }
        events = f"event: token\ndata: {json.dumps({'index': 0, 'text': HOSTILE})}\n\n: keep-alive\n\n"
        route.fulfill(content_type="text/event-stream", body=f"{events}event: done\ndata: {json.dumps(done)}\n\n")

    page.route("**/generate", hostile)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(HOSTILE)
    for condition in ("bridge", "direct", "none"):
        expect(said(page, condition)).to_have_text(HOSTILE)
    assert page.locator("main img").count() == 0 and page.title() == "LatentWire"


def test_a_stream_that_breaks_off_or_fails_is_no_answer(open_page: Open) -> None:
    page = open_page()
    token = 'event: token\ndata: {"index": 0, "text": "Mara"}\n\n'
    failed = 'event: error\ndata: {"error": {"message": "no answer within 1 s"}}\n\n'

    def broken(route: Route) -> None:
        body = token + (failed if route.request.post_data_json["condition"] == "none" else "")
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/generate", broken)
    page.keyboard.press("Control+Enter")
    expect(said(page, "bridge")).to_have_text("The stream ended before the answer did.")
    expect(said(page, "none")).to_have_text("no answer within 1 s")


def test_files_are_sent_with_their_types_and_asked_for_again_only_when_they_changed(service: str) -> None:
    types = {"": "text/html", "page/page.css": "text/css", "page/icon.svg": "image/svg+xml"}
    types |= dict.fromkeys((f"page/{path.name}" for path in FOLDER.glob("*.js")), "javascript")
    with httpx.Client(base_url=service, trust_env=False) as client:
        for path, kind in types.items():
            first = client.get(f"/{path}")
            assert first.status_code == 200 and kind in first.headers["content-type"]
            assert first.headers["cache-control"] == "no-cache" and first.headers["x-content-type-options"] == "nosniff"
            assert first.headers["content-security-policy"].startswith("default-src 'self'; ")
            again = client.get(f"/{path}", headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(f"/{path}").status_code == 200
        for path in ("page/", "page/nothing.js", "page/%2e%2e/app.py"):
            assert client.get(f"/{path}").status_code == 404


def take_picture(file: Path = PICTURE) -> None:
    """The page after a run, for the guide."""
    with running_service(file.parent) as service, opened_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(service)
        expect(page.locator("#source")).not_to_have_value("")
        for _ in range(2):  # the first run warms up
            page.locator("#run").click()
            expect(page.locator("#status")).to_contain_text("Done in")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.evaluate("document.getElementById('documents').remove()")  # they have a picture of their own
        page.screenshot(path=file, full_page=True)
    (file.parent / "log").unlink()
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def test_the_picture_in_the_guide_is_wide_and_light() -> None:
    data = PICTURE.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20]) == (1280,), RENEW
    assert len(data) < 200_000, RENEW
