"""The report in a real headless Chromium: it opens fast, does what it says, and runs no text as code."""

import shutil
import time

import pytest
from report_folders import HOSTILE, HOSTILE_NAME, arguments, write_example

from alignment.visualization import make_report

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver") or shutil.which("chromium.chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
MOST_SECONDS = 4.0
PUBLISHED = ["Alpaca-7B", "Beaver-V1", "Beaver-V2", "Beaver-V3", "ES-100", "ES-500"]

# Where a point of the scatter lies in the window.
PLACE = """
const [cost, reward] = arguments;
const view = [...Bokeh.index.roots].find((one) => one.model.type === "Figure");
const box = view.canvas_view.el.getBoundingClientRect();
return [box.x + view.frame.x_scale.compute(cost), box.y + view.frame.y_scale.compute(reward)];
"""

# How many of the two texts, prompt and answer, are shown in the drawer to the letter.
SHOWN = r"""
const shown = [...document.querySelectorAll("#detail .plain")].map((one) => one.textContent.replace(/\ud83d/g, ""));
return [...arguments].filter((text) => shown.includes(text)).length;
"""

X_RANGE = """
const { model } = [...Bokeh.index.roots].find((one) => one.model.type === "Figure");
return [model.x_range.start, model.x_range.end];
"""

AXIS_COLOUR = """
const { model } = [...Bokeh.index.roots].find((one) => one.model.type === "Figure");
return model.below[0].axis_label_text_color;
"""

SET_VALUE = """
const [id, value, event] = arguments;
const control = document.getElementById(id);
control.value = value;
control.dispatchEvent(new Event(event));
"""

DRAWN = "document.querySelectorAll('#curves .bk-Figure').length === 4"  # one of five has no values

MATRIX = """
const cells = [...document.querySelectorAll(".matrix button")].map((one) => [one.dataset.cell, one.textContent]);
return cells.filter(([, count]) => count !== "0");
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e '.[dev]')")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make_report.main(arguments(write_example(folder)))
    return folder / "report.html"


def wait_until(browser, condition, *values, seconds=20.0):
    """Waits until the JavaScript expression is true and returns it."""
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {condition}", *values)):
        assert time.monotonic() < deadline, f"{condition}; console: {browser.get_log('browser')}"
        time.sleep(0.02)
    return value


def open_page(browser, path):
    """Opens a report; returns the seconds from the navigation to the picture and all texts being there."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(path.as_uri())
    return int(wait_until(browser, "document.documentElement.dataset.ready")) / 1000


def script(browser, code, *values):
    return browser.execute_script(code, *values)


def click_point(browser, cost, reward):
    from selenium.webdriver import ActionChains

    script(browser, "document.getElementById('scatter').scrollIntoView({block: 'center'})")
    x, y = script(browser, PLACE, cost, reward)
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.click().perform()
    wait_until(browser, "!document.getElementById('detail').hidden")


def cards(browser):
    return script(browser, "return [...document.querySelectorAll('#detail .card')].map((card) => card.textContent)")


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def assert_nothing_ran(browser):
    assert script(browser, "return window.hacked") is None
    assert script(browser, "return document.querySelectorAll('main img, #detail img, main iframe').length") == 0
    assert errors(browser) == []
    assert script(browser, "return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_hostile_texts_are_shown_and_do_nothing(browser, example):
    open_page(browser, example)
    assert script(browser, "return document.querySelector('thead').textContent") == "first" + HOSTILE_NAME
    for name in ("prompts-button", "unsafe-button"):
        script(browser, "document.getElementById(arguments[0]).click()", name)
    for number, text in enumerate(HOSTILE):
        script(browser, "document.querySelectorAll('#list .rows button')[arguments[0]].click()", number)
        sent = text.replace(
            "\ud83d", ""
        )  # half a character cannot be sent; the page's own is taken out of the comparison
        shown = script(browser, SHOWN, sent, f"answer {number} of first {sent}")
        assert shown == 2, text
    click_point(browser, 1.0, 1.0)  # the tooltip shows the model's name
    click_point(browser, -3.0, 2.0)
    script(browser, "document.querySelectorAll('#disagreements .rows button')[0].click()")
    script(browser, "document.querySelector('#detail > div > details').open = true")
    wait_until(
        browser, "document.querySelector('#detail > div > details').textContent.includes(arguments[0])", HOSTILE[1]
    )
    script(browser, "document.querySelectorAll('#provenance details').forEach((one) => (one.open = true))")
    assert HOSTILE[0] in script(browser, "return document.getElementById('provenance').textContent")
    assert_nothing_ran(browser)


def test_the_policy_holds_back_what_would_slip_through(browser, example):
    open_page(browser, example)
    attack = "const box = document.createElement('div'); box.innerHTML = arguments[0]; document.body.append(box);"
    script(browser, attack, '<img src="data:," onerror="window.hacked = 1">')
    script(
        browser,
        "const one = document.createElement('script'); one.text = 'window.hacked = 1'; document.body.append(one)",
    )
    time.sleep(0.3)
    assert script(browser, "return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in errors(browser))


def test_harmful_texts_stay_folded_until_they_are_asked_for(browser, example):
    open_page(browser, example)

    def visible(text):
        return script(browser, "return document.body.innerText.includes(arguments[0])", text)

    assert not visible("question number 6")
    click_point(browser, 1.0, 1.0)  # unsafe
    assert not visible("answer 0 of first")
    assert len(cards(browser)) == 2 and visible(f"answer 0 of {HOSTILE_NAME}")  # safe, side by side
    script(browser, "document.querySelector('#detail .card.chosen summary').click()")
    wait_until(browser, "document.body.innerText.includes('answer 0 of first')")
    script(browser, "document.getElementById('prompts-button').click()")
    assert visible("question number 6")


def test_filters_and_search(browser, example):
    open_page(browser, example)
    count = "return document.getElementById('count').textContent"
    assert script(browser, count) == "14 of 14 answers, 1 of them without a score and not in the picture"
    names = script(browser, "return [...document.getElementById('category').options].map((one) => one.textContent)")
    script(browser, SET_VALUE, "category", str(names.index("Violence") - 1), "change")
    assert script(browser, count).startswith("2 of 14")
    script(browser, SET_VALUE, "category", "-1", "change")
    browser.find_element("id", "search").send_keys("ANSWER 6 OF FIRST")
    wait_until(browser, "document.getElementById('count').textContent.startsWith('1 of 14')")
    script(browser, SET_VALUE, "search", "", "input")
    wait_until(browser, "document.getElementById('count').textContent.startsWith('14 of 14')")
    script(
        browser, "document.querySelectorAll('#filters .quadrants input').forEach((one, k) => k !== 2 && one.click())"
    )
    assert script(browser, count).startswith(
        "4 of 14"
    )  # unsafe and helpful: three of the first model, one of the second
    script(browser, "document.querySelector('#filters .models input').click()")
    assert script(browser, count).startswith("1 of 14")
    script(browser, SET_VALUE, "fewest", "1000", "input")
    assert script(browser, count).startswith("0 of 14")
    assert errors(browser) == []


def test_movers(browser, example):
    open_page(browser, example)
    assert dict(script(browser, MATRIX)) == {"SHSH": "1", "SUSH": "2", "UHSH": "2", "UHUH": "1"}
    assert "4 of 6 prompts" in script(browser, "return document.querySelector('#movers [role=status]').textContent")
    script(browser, "document.querySelector('[data-cell=UHSH]').click()")
    assert script(browser, "return document.querySelectorAll('#movers .rows li').length") == 2
    script(browser, "document.querySelector('#movers .rows button').click()")
    assert len(cards(browser)) == 2
    assert errors(browser) == []


def test_keyboard_alone(browser, example):
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, example)
    press = lambda *keys: ActionChains(browser).send_keys(*keys).perform()  # noqa: E731
    whole = script(browser, X_RANGE)
    script(browser, "document.getElementById('scatter').focus()")
    press("+", Keys.ARROW_RIGHT)
    assert script(browser, X_RANGE)[1] - script(browser, X_RANGE)[0] < whole[1] - whole[0]
    press("0")
    assert script(browser, X_RANGE) == whole
    script(browser, "document.querySelector('#list .rows button').focus()")
    press(Keys.ARROW_DOWN, Keys.ENTER)
    assert "Prompt 2" in script(browser, "return document.querySelector('#detail strong').textContent")
    press(Keys.ARROW_RIGHT)
    assert "Prompt 3" in script(browser, "return document.querySelector('#detail strong').textContent")
    press(Keys.ESCAPE)
    assert script(browser, "return document.getElementById('detail').hidden")
    assert script(browser, "return document.activeElement.closest('#list') !== null")
    assert errors(browser) == []


def test_dark_and_light_and_curves(browser, example):
    open_page(browser, example)
    script(browser, "document.getElementById('curves').scrollIntoView()")
    wait_until(browser, DRAWN)
    assert "no values" in script(browser, "return document.getElementById('curve-safe_ratio').textContent")
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = script(browser, ground)
    script(browser, "document.getElementById('theme-button').click()")
    assert script(browser, ground) != light
    assert script(browser, AXIS_COLOUR) == "#e7eaee"
    script(browser, SET_VALUE, "curve-axis", "samples", "change")
    wait_until(browser, DRAWN)
    assert errors(browser) == []


def test_published_models_open_quickly_and_a_point_can_be_clicked(browser, goldens, tmp_path):
    path = tmp_path / "report.html"
    elo = goldens / "elo"
    judged = ["--ratings", str(elo / "gpt_elo_ratings.json"), "--judgments", str(elo / "gpt_judgments.jsonl")]
    make_report.main(["--data-dir", str(goldens / "quadrants"), "--models", *PUBLISHED, *judged, "--output", str(path)])
    seconds = [open_page(browser, path) for _ in range(3)]
    print(f"opened in {', '.join(f'{one:.2f}' for one in seconds)} s, {path.stat().st_size / 1e6:.1f} MB")
    assert min(seconds) < MOST_SECONDS  # the least: other work on the machine only adds to it
    assert "18,216 of 18,216" in script(browser, "return document.getElementById('count').textContent")
    points = script(browser, "return JSON.parse(document.getElementById('report-data').textContent).points")
    assert "Alpaca-7B = 1000" in script(browser, "return document.querySelector('#ratings .body').textContent")
    lonely = max(range(3036), key=lambda i: points["cost"][i])
    click_point(browser, points["cost"][lonely], points["reward"][lonely])
    assert len(cards(browser)) in (5, 6)
    assert any(f"R {points['reward'][lonely]:.2f}".replace("-", "−") in one for one in cards(browser))
    assert_nothing_ran(browser)
