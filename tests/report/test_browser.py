"""The page in real, headless Chromium: hostile texts, keys, tables, several runs; `make test-browser` installs it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import MadeRun
from support.made_studies import MadeStudy

from sppo_lightning.report.command import page_of
from sppo_lightning.report.page import render
from sppo_lightning.report.run_data import read_run
from sppo_lightning.report.study_folder import read_study
from sppo_lightning.report.text_chunks import packed

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make test-browser"),
    pytest.mark.xdist_group("browser"),
]
LONG = "long" * 250_000  # a megabyte in one line
ATTACKS = [
    "<script>attacked=1</script>",
    "</script><script>attacked=1</script><!--",
    "<img src=x onerror=attacked=1>",
    "<svg/onload=attacked=1><animate onbegin=attacked=1 attributeName=x>",
    "<style>*{display:none!important}</style><p style='position:fixed;inset:0'>",
    "<a href='javascript:attacked=1'>here</a> javascript:attacked=1",
    "<iframe srcdoc='<script>parent.attacked=1</script>'></iframe>",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css><img src=http://127.0.0.1:9/a.png>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href=http://127.0.0.1:9/>",
    "{{title}} ${attacked=1} {{constructor.constructor('attacked=1')()}} &lt;b&gt; &#60;i&#62;",
    "safe\u202egnp.exe\u202c \u2066isolated\u2069 zero\u200bwidth\ufeff",
    "nul\x00 escape\x1b[31m bell\x07 end",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page and all that it did that a report must not do."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.trouble: list[str] = []
        page.on("console", lambda message: self.trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        page.on("popup", lambda popup: self.trouble.append("popup"))
        page.on("request", self._request)
        self.requests: list[str] = []

    def _request(self, request: Any) -> None:
        self.requests.append(request.url)

    def goto(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """A page that must not have done anything wrong when the test ends."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    found = Opened(context.new_page())
    yield found
    assert found.trouble == []
    assert [url for url in found.requests if not url.startswith("file:")] == []
    assert found.page.evaluate("typeof attacked") == "undefined"
    context.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeRun, MadeRun]:
    root = tmp_path_factory.mktemp("runs")
    return MadeRun(root / "one", prompts=400, shard=100).write(), MadeRun(
        root / "two", prompts=400, shard=100, lift=0.25
    ).write()


@pytest.fixture(scope="module")
def one(runs: tuple[MadeRun, MadeRun]) -> Path:
    run, _ = runs
    categories = {f"p{number}": f"kind {number % 3}" for number in range(400)}
    run.folder.report.write_bytes(page_of([read_run(run.root)], categories=categories))
    return run.folder.report


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attacks in prompts and responses, names of the run, of settings and of reward parts, and in reasons."""
    texts = [*ATTACKS, LONG]

    def text(name: str) -> str:
        return f"{name}: {texts[int(re.sub(r'[^0-9]', '', name)) % len(texts)]}"

    run = MadeRun(
        tmp_path_factory.mktemp("hostile") / "<img src=x onerror=attacked=1>",
        prompts=2 * len(texts),
        held_out=len(texts),
        text=text,
        response=lambda prompt, iteration, sample: f"{iteration}.{sample} {prompt.partition(': ')[2]}",
        config={ATTACKS[0]: ATTACKS[2], "seed_everything": 1},
    ).write()
    manifest = run.folder.iteration(1).read_manifest()
    assert manifest is not None
    manifest["dropped"][ATTACKS[2]] = 1
    run.folder.iteration(1).write_manifest(manifest)
    with run.folder.metrics.open() as file:
        content = file.read().replace("train/loss", f"train/{ATTACKS[3]}", 1)
    run.folder.metrics.write_text(content)
    path = run.root.parent / "report.html"
    path.write_bytes(page_of([read_run(run.root)], categories={"p1": ATTACKS[0], "p2": ATTACKS[10]}))
    return path


def as_shown(text: str) -> str:
    """A text as a person reads it, its commands by their numbers."""
    return re.sub(
        "[\u202e\u202c\u2066\u2069\u200b\ufeff\x00\x1b\x07]", lambda found: f"U+{ord(found[0]):04X}", text
    )


# ------------------------------------------------------------ hostile texts


def test_attacks_are_shown_as_they_are_written(opened: Opened, hostile: Path) -> None:
    """Every prompt with its responses is opened; each text stands there literally."""
    page = opened.goto(hostile)
    page.locator("#prompts select").first.select_option("0")
    page.locator("#prompts .body .row").first.click()
    for number, attack in enumerate(ATTACKS):
        page.locator("dialog h2", has_text=re.compile(rf"^p{number}(?!\d)")).wait_for()
        page.locator("dialog article").first.wait_for()
        shown = page.locator("dialog .text").all_text_contents()
        assert shown[0] == as_shown(f"p{number}: {attack}")
        assert as_shown(f"0.0 {attack}") in shown
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.locator("#answers .body .row").first.click()
    for number, attack in enumerate(ATTACKS):
        page.locator("dialog h2", has_text=re.compile(rf"^e{number}(?!\d)")).wait_for()
        page.locator("dialog .sides").wait_for()
        shown = page.locator("dialog .text").all_text_contents()
        assert shown == [as_shown(f"{start}{attack}") for start in (f"held out {number}: ", "0.0 ", "2.0 ")]
        page.keyboard.press("ArrowRight")


def test_names_of_the_folder_settings_and_reasons_are_text(opened: Opened, hostile: Path) -> None:
    page = opened.goto(hostile)
    assert opened.text("h1") == "<img src=x onerror=attacked=1>"
    assert page.title() == "<img src=x onerror=attacked=1>"
    page.locator("#settings summary").click()
    page.locator("#training summary").click()
    assert ATTACKS[0] in opened.text("#settings")
    assert ATTACKS[2].replace("_", " ") in page.locator("#difficulty-0").inner_text()
    assert ATTACKS[3] in page.locator("#training").inner_text()
    assert page.locator("#report img, #report iframe, #report a[href^=javascript]").count() == 0


def test_characters_that_reorder_text_are_isolated_and_named(opened: Opened, hostile: Path) -> None:
    page = opened.goto(hostile)
    page.locator("#prompts input").fill("gnp.exe")
    page.locator("#prompts .body .row").first.click()
    page.locator("dialog article").first.wait_for()
    assert "U+202E" in page.locator("dialog .text .control").all_text_contents()
    style = "node => [getComputedStyle(node).unicodeBidi, node.dir]"
    assert page.locator("dialog .text").first.evaluate(style) == ["isolate", "auto"]
    row = page.locator("#prompts .body .row:visible .wide").first
    assert "\u2039U+202E\u203a" in row.text_content()


def test_a_long_line_is_clipped_until_asked_for(opened: Opened, hostile: Path) -> None:
    page = opened.goto(hostile)
    page.locator("#prompts input").fill("longlonglong")
    page.locator("#prompts .body .row").first.click()
    page.locator("dialog article .more").first.wait_for()
    block = page.locator("dialog article .text").first
    assert len(block.text_content()) < 5000
    button = page.locator("dialog article .more").first
    assert button.inner_text() == "Show all 1,000,004 characters"
    button.click()
    assert len(block.text_content()) == 1_000_004
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= innerWidth")


def test_half_a_surrogate_pair_is_shown(opened: Opened, one: Path, tmp_path: Path) -> None:
    """No file of a run holds one, but JSON may."""
    content = one.read_text()
    blocks = dict(re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', content))
    summary = unpacked(blocks["summary"])
    summary["runs"][0]["settings"]["\ud83d"] = "\udc00 half"
    changed = tmp_path / "surrogates.html"
    changed.write_bytes(render({**blocks, "summary": packed(summary)}, title="a \ud800"))
    page = opened.goto(changed)
    page.locator("#settings summary").click()
    assert "\u2039U+D83D\u203a" in opened.text("#settings")
    assert "\u2039U+DC00\u203a half" in opened.text("#settings")


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_policy_stops_what_would_get_past_the_page(
    browser: Any, one: Path, server: tuple[str, list[str]]
) -> None:
    """As if a text had become HTML: no script, style, image or address of it has an effect."""
    address, asked = server
    context = browser.new_context()
    page = context.new_page()
    page.goto(one.as_uri())
    page.wait_for_selector("html[data-ready]")
    refused = page.evaluate(
        """async (address) => {
            const node = document.createElement("script");
            const image = document.createElement("img");
            const style = document.createElement("style");
            style.append("body { display: none }");
            image.src = `${address}/image`;
            document.body.append(style, image);
            const tries = [
                () => (document.body.innerHTML = "<b>html</b>"),
                () => (node.text = "attacked = 1"),
                () => document.write("<script>attacked = 1<" + "/script>"),
                () => fetch(`${address}/fetched`, { mode: "no-cors" }),
            ];
            const refused = [];
            for (const one of tries) {
                try { await one(); } catch (error) { refused.push(error.name); }
            }
            return [...refused, getComputedStyle(document.body).display];
        }""",
        address,
    )
    assert refused == ["TypeError", "TypeError", "TypeError", "TypeError", "block"]
    context.request.get(f"{address}/outside-the-page")
    assert asked == ["/outside-the-page"]
    context.close()


def test_no_script_or_style_but_the_pages_own_has_an_effect(browser: Any, one: Path, tmp_path: Path) -> None:
    """As if a text had got into the file as it is: the policy knows scripts and styles by their content."""
    leaked = (
        "<script>attacked = 1</script><img src=x onerror='attacked = 1'><style>body { display: none }</style>"
        "<p id=leaked style='display: none'>text</p>"
    )
    changed = tmp_path / "leaked.html"
    changed.write_text(one.read_text().replace("<noscript>", f"{leaked}<noscript>", 1))
    page = browser.new_page()
    page.goto(changed.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("typeof attacked") == "undefined"
    assert page.locator("#leaked").is_visible()
    page.close()


# ------------------------------------------------------------ what people do


def test_the_table_sorts_searches_and_filters(opened: Opened, one: Path) -> None:
    page = opened.goto(one)
    first = page.locator("#prompts .body .row:visible")
    assert opened.text("#prompts .count") == "800 rows"
    assert page.locator("#prompts .body .row").count() < 60
    page.locator("#prompts button", has_text="reward").click()
    rewards = [
        float(text) for text in page.locator("#prompts .row:visible > :nth-child(6)").all_text_contents()[1:]
    ]
    assert rewards == sorted(rewards, reverse=True)
    assert page.locator("#prompts [aria-sort=descending]").count() == 1
    page.locator("#prompts input").fill("P17 say")
    page.locator("#prompts .count", has_text="22 of 800 rows").wait_for()  # p17, p170 to p179, twice
    for label, value in (("iteration", "1"), ("category", "kind 2"), ("gain", "1")):
        page.locator("#prompts label", has_text=label).locator("select").select_option(value)
    assert opened.text("#prompts .count") == "5 of 800 rows"  # 17, 170, 173, 176, 179
    assert first.first.locator(".wide").inner_text().startswith("say p17")
    page.locator("#prompts label", has_text="outcome").locator("select").select_option(label="tied rewards")
    assert opened.text("#prompts .count") == "1 of 800 rows"
    page.locator("#prompts input").fill("no such prompt")
    page.locator("#prompts .nothing", has_text="No prompt matches.").wait_for()


def test_a_row_far_down_is_drawn_when_it_is_scrolled_to(opened: Opened, one: Path) -> None:
    page = opened.goto(one)
    page.locator("#prompts .view").evaluate("node => (node.scrollTop = 700 * 36)")
    page.locator("#prompts .row[aria-rowindex='702']").wait_for()
    assert page.locator("#prompts .row[aria-rowindex='2']:visible").count() == 0


def test_keys_alone_open_a_prompt(opened: Opened, one: Path) -> None:
    page = opened.goto(one)
    page.locator("#prompts .body .row").first.focus()
    for key in ("ArrowDown", "ArrowDown", "End", "Home", "PageDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    page.locator("dialog article").first.wait_for()
    shown = opened.text("dialog h2")
    page.keyboard.press("ArrowRight")
    page.locator("dialog h2", has_not_text=re.compile(rf"^{shown}$")).wait_for()
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
    assert page.evaluate("document.activeElement.getAttribute('role')") == "row"


def test_responses_have_rewards_and_marks(opened: Opened, one: Path) -> None:
    """Prompt 2 has a pair: the last response chosen, the first rejected, which the signs say without colour."""
    page = opened.goto(one)
    page.locator("#prompts input").fill("say p2")
    page.locator("#prompts .count", has_text="222 of").wait_for()
    page.locator("#prompts .body .row", has_text=re.compile(r"say p2(?!\d)")).first.click()
    page.locator("dialog article").first.wait_for()
    best = page.locator("dialog article").first.inner_text()
    assert best.splitlines()[0] == (
        "▲ chosenreward 0.135 · style 0.250 · 8 tokens · cut by the length limit · "
        "reference log-prob \u22128.0 nat (\u22121.00 per token)"
    )
    assert page.locator("dialog article .mark.rejected").first.inner_text() == "▼ rejected"
    page.locator("dialog details summary").first.click()
    assert page.locator("dialog details del").first.inner_text() == "0"
    assert page.locator("dialog details ins").first.inner_text() == "3"


def test_held_out_answers_stand_side_by_side(opened: Opened, one: Path) -> None:
    page = opened.goto(one)
    page.locator("#answers .body .row").first.click()
    page.locator("dialog .sides").wait_for()
    assert page.locator("dialog h4").all_inner_texts() == ["initial policy", "after 2 iterations"]
    assert page.locator("dialog ins").all_inner_texts() == ["2"]
    page.locator("dialog select").nth(1).select_option(label="after 1 iteration")
    page.locator("dialog h4", has_text="after 1 iteration").wait_for()
    assert page.locator("dialog ins").all_inner_texts() == ["1"]


def test_two_runs(opened: Opened, runs: tuple[MadeRun, MadeRun], tmp_path: Path) -> None:
    path = tmp_path / "two.html"
    path.write_bytes(page_of([read_run(run.root) for run in runs]))
    page = opened.goto(path)
    assert "+0.250 ± 0.000" in opened.text("#runs")
    dashes = page.locator("#held-out .legend line").evaluate_all(
        "nodes => nodes.map((node) => node.getAttribute('stroke-dasharray'))"
    )
    assert len(set(dashes)) == 2
    page.locator("#answers .body .row").first.click()
    page.locator("dialog .sides").wait_for()
    assert page.locator("dialog h4").all_inner_texts() == [
        "one, after 2 iterations",
        "two, after 2 iterations",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_print(browser: Any, one: Path, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 700}, color_scheme=scheme, device_scale_factor=2
    )
    found = Opened(context.new_page())
    page = found.goto(one)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert len(page.pdf(format="A4")) > 50_000
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert found.trouble == []
    context.close()


# ------------------------------------------------------------ what can be wrong with the file or the browser


@pytest.fixture
def status(browser: Any) -> Iterator[Callable[..., str]]:
    context = browser.new_context()

    def read(path: Path, script: str = "") -> str:
        page = context.new_page()
        if script:
            page.add_init_script(script)
        page.goto(path.as_uri())
        page.locator(".trouble").wait_for()
        return str(page.locator(".trouble").inner_text())

    yield read
    context.close()


def test_an_old_browser_is_told_what_is_missing(status: Callable[..., str], one: Path) -> None:
    assert "cannot open compressed data" in status(one, "delete globalThis.DecompressionStream")


def test_a_damaged_file_says_so(status: Callable[..., str], one: Path, tmp_path: Path) -> None:
    content = one.read_text()
    damaged = tmp_path / "damaged.html"
    damaged.write_text(re.sub(r'(id="prompts">.{40}).{400}', r"\1", content))
    assert "its data is damaged, or the file is cut short" in status(damaged)


def test_texts_that_are_cut_off_are_missed_when_they_are_opened(
    browser: Any, one: Path, tmp_path: Path
) -> None:
    content = one.read_text()
    cut = tmp_path / "cut.html"
    cut.write_text(content[: content.index('id="b0"')])
    page = Opened(browser.new_page()).goto(cut)
    page.locator("#prompts .body .row").first.click()
    page.locator("dialog .trouble", has_text="it may be cut short").wait_for()
    page.close()


def test_what_is_missing_is_said(opened: Opened, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").write()
    run.folder.gate.write_text("{}")
    shutil.rmtree(run.folder.iteration(0).shards.folder)
    run.folder.iteration(0).mark_pruned()
    run.folder.report.write_bytes(page_of([read_run(run.root)], max_megabytes=0.01))
    page = opened.goto(run.folder.report)
    page.locator(".missing summary").click()
    text = opened.text(".missing")
    assert "gate.json: damaged" in text
    assert "iterations/000/rollouts: deleted to save space" in text
    assert "responses of iteration 1 are left out" in text
    page.locator("#prompts .body .row").first.click()
    page.locator("dialog", has_text="Its responses are not in this report.").wait_for()


def test_an_empty_run(opened: Opened, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.root.mkdir()
    run.folder.config.write_text("data: {iterations: 3}\n")
    run.folder.report.write_bytes(page_of([read_run(run.root)]))
    opened.goto(run.folder.report)
    assert "not finished: 0 of 3 iterations" in opened.text("header")
    assert "metrics.csv: not there" in opened.text(".missing")


# ------------------------------------------------------------ studies

REORDERED = ATTACKS[10].rstrip("\ufeff")  # the last one is a space to a browser


@pytest.fixture(scope="module")
def hostile_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose question, claim, limit, titles and failure are attacks; one run of six has not ended."""
    made = MadeStudy(
        tmp_path_factory.mktemp("studies") / ATTACKS[2].replace("/", "|"),
        arms={"one": ATTACKS[0], "two": REORDERED, "three": ATTACKS[4]},
        failed={"base/seed-2/one": ATTACKS[1]},
        waiting=("base/seed-2/three",),
        text=ATTACKS[3],
    ).write()
    path = made.root.parent / "report.html"
    study = read_study(made.root)
    path.write_bytes(page_of([read_run(root) for root in study.shown], study))
    return path


def test_a_study_with_hostile_names(opened: Opened, hostile_study: Path) -> None:
    page = opened.goto(hostile_study)
    assert opened.text("h1") == page.title() == ATTACKS[2]
    assert "study · 3 arms with results · 4 of 6 runs have ended, 1 failed" in opened.text("header")
    assert f"runs/base/seed-2/one: failed: {ATTACKS[1]}" in opened.text(".missing")
    study = page.locator("#study")
    assert study.locator(".arms tbody th").all_text_contents() == [
        *(ATTACKS[0], re.sub("[\u202e\u202c\u2066\u2069\u200b]", named, REORDERED), ATTACKS[4])
    ]
    assert study.locator(".arms svg.strip circle").count() == 3
    assert study.locator(".arms svg.strip .interval").count() == 1  # of the arm with two seeds
    assert study.locator("canvas").count() == 1
    assert study.locator(".claims tbody th").first.text_content().startswith(ATTACKS[3])
    assert "not complete" in study.locator(".claims").inner_text()
    assert "Below: the runs of base/seed-1, one for each arm. Left out: 1 that" in study.inner_text()
    assert page.locator("#runs tbody th").first.text_content() == "one"
    assert page.locator("#report img, #report iframe, #report a[href^=javascript]").count() == 0


def named(found: re.Match[str]) -> str:
    """How a character that reorders text is shown in a cell."""
    return f"\u2039U+{ord(found[0]):04X}\u203a"


def test_a_study_none_of_whose_runs_has_ended(opened: Opened, tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s", seeds=(1,), waiting=("base/seed-1/all", "base/seed-1/easy")).write()
    path = tmp_path / "report.html"
    path.write_bytes(page_of([], read_study(made.root)))
    opened.goto(path)
    assert "2 of 2 runs have not ended" in opened.text(".missing")
    assert "No run has ended yet." in opened.text("#study")
