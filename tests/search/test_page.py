"""The page as a person uses it: in a browser, at two widths, in both colour schemes."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_fast.search.answers import Answers
from m3i_fast.search.pictures import Pictures
from m3i_fast.search.server import SearchServer
from tests.shared.chromium import (
    SCHEMES,
    WIDTHS,
    capture,
    emulate,
    no_complaints,
    open_browser,
    requested_by,
    skip_reason,
    wait,
)
from tests.shared.pipelines.data import encode_image, smooth_picture

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
]

HITS = "return document.querySelectorAll('#hits li').length"
IDLE = "return !document.querySelector('[aria-busy]')"
# Gives the page a file as a drop or a paste does: arguments are event, name, content in base64.
GIVE = """
const [event, name, content] = arguments;
const bytes = typeof content === "number" ? new Uint8Array(content)
  : Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name));
const kind = event === "drop" ? DragEvent : ClipboardEvent;
const given = event === "drop" ? { dataTransfer: data } : { clipboardData: data };
document.body.dispatchEvent(new kind(event, { bubbles: true, cancelable: true, ...given }));
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def open_page(driver: Any, server: SearchServer, width: int = 1280, scheme: str = "light") -> None:
    emulate(driver, width, scheme)
    driver.get_log("browser"), driver.get_log("performance")  # forget the last page
    driver.get(server.url)
    wait(driver, "return document.documentElement.dataset.scheme !== undefined")


def assert_own(driver: Any, server: SearchServer, where: str) -> None:
    """Nothing was asked of another server, and the console has nothing to say."""
    others = [
        url for url in requested_by(driver) if not url.startswith((server.url, "data:", "blob:"))
    ]
    assert not others, f"{where}: requests {others}"
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not messages, f"{where}: the console says {messages}"


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def texts(driver: Any, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


def search_words(driver: Any, words: str) -> None:
    find(driver, "#words").clear()
    find(driver, "#words").send_keys(words)
    find(driver, "button[type=submit]").click()
    wait(driver, IDLE)


def search_file(driver: Any, file: Path) -> None:
    find(driver, "#file").send_keys(str(file))
    wait(driver, f"{IDLE} && !document.getElementById('query').hidden")


def rows(driver: Any) -> list[int]:
    """The rows of the pictures on the page, in order."""
    sources = [
        element.get_attribute("src")
        for element in driver.find_elements("css selector", "#hits .thumb img")
    ]
    return [int(source.rpartition("/")[2].partition("?")[0]) for source in sources]


@pytest.fixture
def picture(pictures: Pictures, tmp_path: Path) -> Path:
    file = tmp_path / "mine.png"
    file.write_bytes(pictures.read(3))
    return file


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_reads_well(
    driver: Any, server: SearchServer, picture: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """Empty, with words, with a picture, with a patch and with an error: no text is pale or cut."""
    where = f"{width} px, {scheme}"
    open_page(driver, server, width, scheme)
    no_complaints(driver, f"empty at {where}")
    search_words(driver, "a red heart")
    assert driver.execute_script(HITS) == 24
    no_complaints(driver, f"words at {where}")
    search_file(driver, picture)
    no_complaints(driver, f"a picture at {where}")
    find(driver, "#seen").click()
    wait(driver, "return document.querySelectorAll('.thumb canvas').length === 24")
    no_complaints(driver, f"a patch at {where}")
    assert_own(driver, server, where)  # of an error Chromium itself writes to the console
    driver.execute_script(GIVE, "drop", "x" * 300 + ".png", "AAAA")
    wait(driver, "return !document.getElementById('error').hidden")
    no_complaints(driver, f"an error at {where}")
    capture(driver, tmp_path / "page.png", width)
    paper = np.asarray(Image.open(tmp_path / "page.png").convert("L"))[2, 2]
    assert (paper < 60) == (scheme == "dark")


def test_words_find_what_the_server_finds(
    driver: Any, server: SearchServer, answers: Answers
) -> None:
    open_page(driver, server)
    assert find(driver, "#found").is_displayed() is False
    search_words(driver, "a red heart")
    expected = answers.search({"words": "a red heart"})
    assert rows(driver) == [result["row"] for result in expected["results"]]
    shown = texts(driver, "#hits li b")
    assert shown == [f"{result['similarity']:.3f}" for result in expected["results"]]
    captions = [c for result in expected["results"] for c in result["captions"]]
    assert texts(driver, "#hits .caption q") == captions and captions
    labels = [result["label"] for result in expected["results"] if result["label"]]
    assert texts(driver, "#hits .category") == labels and labels
    assert f"The 24 nearest of {expected['searched']} pictures" in find(driver, "#told").text
    assert not find(driver, "#query").is_displayed()
    find(driver, "#more").click()
    wait(driver, "return document.querySelectorAll('#hits li').length === 48")


@pytest.mark.parametrize("event", ["file", "drop", "paste"])
def test_a_picture_is_searched_however_it_is_given(
    driver: Any, server: SearchServer, answers: Answers, picture: Path, event: str
) -> None:
    open_page(driver, server)
    if event == "file":
        search_file(driver, picture)
    else:
        content = base64.b64encode(picture.read_bytes()).decode()
        driver.execute_script(GIVE, event, "mine.png", content)
        wait(driver, f"{IDLE} && !document.getElementById('query').hidden")
    added = answers.add_picture(picture.read_bytes())["query"]
    expected = answers.search({"query": added["id"]})["results"]
    assert rows(driver) == [result["row"] for result in expected]
    assert find(driver, "#seen img").get_attribute("src") == added["picture"]
    names = [guess["name"] for guess in added["guesses"]]
    assert texts(driver, "#guesses .name") == names and len(names) == 5


def test_a_found_picture_is_searched_by_a_click(
    driver: Any, server: SearchServer, answers: Answers
) -> None:
    open_page(driver, server)
    search_words(driver, "a red heart")
    first = rows(driver)[0]
    find(driver, "#hits .thumb").click()
    wait(driver, f"{IDLE} && !document.getElementById('query').hidden")
    expected = answers.search({"row": first})["results"]
    assert rows(driver) == [result["row"] for result in expected] and first not in rows(driver)


def test_a_class_is_a_filter_of_whatever_is_asked(
    driver: Any, server: SearchServer, answers: Answers, picture: Path
) -> None:
    from selenium.webdriver.support.ui import Select

    open_page(driver, server)
    search_file(driver, picture)
    classes = answers.about()["classes"]
    few, many = (choose(classes, key=lambda c: c["pictures"]) for choose in (min, max))
    for chosen in (few, many):
        Select(find(driver, "#class")).select_by_value(str(chosen["id"]))
        wait(
            driver, f"{IDLE} && document.getElementById('told').textContent.includes('this class')"
        )
        wait(driver, f"{HITS} === {min(24, chosen['pictures'])}")
        assert set(texts(driver, "#hits .category")) == {chosen["name"]}
    search_words(driver, "a tree")
    assert set(texts(driver, "#hits .category")) == {many["name"]}
    Select(find(driver, "#class")).select_by_value("")
    wait(driver, f"{HITS} === 24")
    wait(driver, "return !document.getElementById('told').textContent.includes('this class')")


# ---- Patches -------------------------------------------------------------------------------------


def click_cell(driver: Any, cell: int, grid: int) -> None:
    from selenium.webdriver import ActionChains

    seen = find(driver, "#seen")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", seen)
    side = seen.rect["width"] / grid
    x, y = ((place + 0.5) * side - seen.rect["width"] / 2 for place in (cell % grid, cell // grid))
    ActionChains(driver).move_to_element_with_offset(seen, int(x), int(y)).click().perform()


def frames(driver: Any, grid: int) -> list[int]:
    """The cell that is framed in each result."""
    script = """return [...document.querySelectorAll('.thumb .cell')]
        .map((e) => [parseFloat(e.style.top), parseFloat(e.style.left)])"""
    places = driver.execute_script(script)
    return [round(top * grid / 100) * grid + round(left * grid / 100) for top, left in places]


def heats(driver: Any) -> list[list[int]]:
    """How warm each cell is drawn in each result: its red."""
    script = """return [...document.querySelectorAll('.thumb canvas')].map((canvas) =>
        [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]
          .filter((_, i) => i % 4 === 0))"""
    return list(driver.execute_script(script))


def expected_patches(answers: Answers, picture: Path, cell: int, of: list[int]) -> Any:
    query = answers.add_picture(picture.read_bytes())["query"]["id"]
    return np.array(answers.patches({"query": query, "cell": cell, "rows": of})["similarity"])


def test_a_clicked_patch_is_shown_where_it_is_found(
    driver: Any, server: SearchServer, answers: Answers, picture: Path
) -> None:
    grid = answers.about()["grid"]
    open_page(driver, server)
    search_file(driver, picture)
    for cell in (grid + 1, grid * grid - 2):
        click_cell(driver, cell, grid)
        wait(
            driver,
            f"""{IDLE} && document.getElementById('patch-told').textContent
            .startsWith('Patch in row {cell // grid + 1}, column {cell % grid + 1} of {grid}')""",
        )
        values = expected_patches(answers, picture, cell, rows(driver))
        assert frames(driver, grid) == values.argmax(1).tolist()
        heat = np.array(heats(driver))
        assert heat.shape == values.shape
        is_cold = values <= np.median(values)
        assert np.ptp(heat[is_cold]) <= 3 and heat[values == values.max()].min() > 250
        warm = values[~is_cold].argsort()
        assert (np.diff(heat[~is_cold][warm].astype(int)) >= -2).all()  # warmer where more alike
        assert texts(driver, ".of-patch") == [f"{best:.2f}" for best in values.max(1)]
    find(driver, "#clear").click()
    assert driver.execute_script("return document.querySelectorAll('.thumb canvas').length") == 0
    assert not find(driver, "#patch").is_displayed()


def test_a_patch_is_chosen_by_keys(
    driver: Any, server: SearchServer, answers: Answers, picture: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    grid = answers.about()["grid"]
    open_page(driver, server)
    search_file(driver, picture)
    driver.execute_script("document.getElementById('seen').focus()")
    seen = find(driver, "#seen")
    for _ in range(grid):
        seen.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    seen.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER)
    wait(driver, "return document.querySelectorAll('.thumb canvas').length === 24")
    assert "Patch in row 2, column 2 of" in find(driver, "#patch-told").text
    values = expected_patches(answers, picture, grid + 1, rows(driver))
    assert frames(driver, grid) == values.argmax(1).tolist()
    seen.send_keys(Keys.ESCAPE)
    wait(driver, "return document.querySelectorAll('.thumb canvas').length === 0")


# What the server answers at the address `holds` is held back, and at `broken` it is an error.
HOLD = """
const real = window.fetch;
window.held = {};
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (window.broken === path) throw new Error("broken");
  if (window.holds === path) await new Promise((resolve) => { window.held[path] = resolve; });
  return answer;
};
"""


def test_a_patch_that_is_not_answered_is_told_and_drops_no_search(
    driver: Any, server: SearchServer, answers: Answers, picture: Path
) -> None:
    grid = answers.about()["grid"]
    open_page(driver, server)
    search_file(driver, picture)
    driver.execute_script(HOLD + "window.broken = 'patches'")
    click_cell(driver, 1, grid)
    wait(driver, f"{IDLE} && !document.getElementById('error').hidden")
    assert find(driver, "#patch-told").text == "This patch was not looked for."
    driver.execute_script("window.broken = null; window.holds = 'search'")
    before = rows(driver)
    find(driver, "#words").send_keys("a red heart")
    find(driver, "button[type=submit]").click()
    wait(driver, "return 'search' in window.held")
    click_cell(driver, 2, grid)
    wait(driver, "return document.querySelectorAll('.thumb canvas').length === 24")
    assert rows(driver) == before
    driver.execute_script("window.held.search()")
    wait(driver, IDLE)
    expected = answers.search({"words": "a red heart"})["results"]
    assert rows(driver) == [result["row"] for result in expected]


def test_a_patch_that_is_cleared_is_not_drawn_later(
    driver: Any, server: SearchServer, answers: Answers, picture: Path
) -> None:
    open_page(driver, server)
    search_file(driver, picture)
    driver.execute_script(HOLD + "window.holds = 'patches'")
    click_cell(driver, 1, answers.about()["grid"])
    wait(driver, "return 'patches' in window.held")
    find(driver, "#clear").click()
    driver.execute_script("window.held.patches()")
    wait(driver, IDLE)
    assert not driver.execute_script("return document.querySelectorAll('.thumb canvas').length")


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("PHN2Zy8+", "mine.png: not a picture: begins with"),
        (33 << 20, "mine.png: expected at most 32 MiB, got 33.0 MiB."),
        ("bomb", "expected a picture of at most 89,478,485 pixels, got 30000 x 30000"),
    ],
)
def test_what_is_wrong_is_told_in_the_page(
    driver: Any, server: SearchServer, content: Any, message: str
) -> None:
    if content == "bomb":
        png = bytearray(encode_image(smooth_picture(0, 8, 8)))
        png[16:24] = (30_000).to_bytes(4, "big") * 2
        content = base64.b64encode(png).decode()
    open_page(driver, server)
    search_words(driver, "a red heart")
    driver.execute_script(GIVE, "drop", "mine.png", content)
    wait(driver, "return !document.getElementById('error').hidden")
    assert message in find(driver, "#error").text
    assert driver.execute_script(HITS) == 24  # what was found before stays
    search_words(driver, "a green tree")
    assert not find(driver, "#error").is_displayed()


def test_a_server_that_does_not_answer_is_told(driver: Any, server: SearchServer) -> None:
    open_page(driver, server)
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**network, "offline": True})
    try:
        search_words(driver, "a red heart")
        assert "Is m3i-fast search still running?" in find(driver, "#error").text
    finally:
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**network, "offline": False})
    search_words(driver, "a red heart")
    assert not find(driver, "#error").is_displayed() and driver.execute_script(HITS) == 24
    find(driver, "#words").clear()
    find(driver, "button[type=submit]").click()
    assert find(driver, "#error").text == "Type some words, or give a picture."


def test_text_of_data_is_text(
    driver: Any, server: SearchServer, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "<img src=x onerror=document.title='taken'>"
    real = answers.search

    def search(request: Any) -> Any:
        answer = real(request)
        for result in answer["results"]:
            result.update(name=hostile, captions=[hostile, "\u202e"], label=hostile)
            result["guess"]["name"] = hostile
        return answer

    monkeypatch.setattr(answers, "search", search)
    open_page(driver, server)
    search_words(driver, "a red heart")
    assert texts(driver, "#hits .category")[0] == hostile
    assert texts(driver, "#hits q")[0] == hostile
    assert driver.execute_script("return document.querySelectorAll('#hits img').length") == 24
    assert driver.title == "Search your pictures"


def test_a_model_without_captions_has_no_box_for_words(
    driver: Any, answers: Answers, monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    about = answers.about() | {"words": False, "guesses": False, "classes": []}
    monkeypatch.setattr(answers, "about", lambda: about)
    with SearchServer("127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve, args=(answers,))
        thread.start()
        open_page(driver, made)
        assert not driver.find_elements("css selector", "#words, #class, #guesses")
        assert "Searched by pictures alone" in find(driver, "header").text
        search_file(driver, picture)
        assert driver.execute_script(HITS) == 24
        no_complaints(driver, "without words")
        made.shutdown()
        thread.join()
