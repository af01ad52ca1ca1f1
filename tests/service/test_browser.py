"""The page at `/` in a real headless Chromium, around stand-in recommenders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from service.api import create_api
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models
from tests.service.test_api import StandIn
from tests.service.test_client import listening

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH: apt-get install chromium-driver"
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1200,900",
]  # fmt: skip


class Backwards(StandIn):
    """Another model: ranks by the distance to the first item."""

    def recommend(self, histories: Any, *others: Any, **more: Any) -> Any:
        return super().recommend([list(reversed(history)) for history in histories], *others, **more)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    models = Models(ServingConfig(), Metrics())
    models.replace({"near": StandIn(), "far": Backwards()})  # type: ignore[dict-item]
    with listening(create_api(models)) as url:
        yield url


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SE_OFFLINE", "true")  # both programs are named: nothing is to be fetched
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does with the page, and sees there."""

    def __init__(self, chromium: webdriver.Chrome, url: str) -> None:
        self.chromium = chromium
        chromium.get(url)
        self.until(lambda: self.at("tool").is_displayed())

    def at(self, name: str) -> Any:
        return self.chromium.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return list(self.chromium.find_elements(By.CSS_SELECTOR, selector))

    def until(self, holds: Callable[[], Any]) -> None:
        redrawn = [StaleElementReferenceException]  # between finding an element and reading it
        WebDriverWait(self.chromium, 60, 0.05, redrawn).until(lambda _: holds())

    def type(self, *keys: str) -> None:
        """With the keyboard, wherever the focus is."""
        self.chromium.switch_to.active_element.send_keys(*keys)

    def tab_to(self, name: str) -> None:
        """Press the tabulator until the focus is there."""
        for _ in range(40):
            if self.focused() == name:
                return
            self.type(Keys.TAB)
        raise AssertionError(f"{name} cannot be reached")

    def focused(self) -> str:
        """Its id, or its text where it has none."""
        element = self.chromium.switch_to.active_element
        return str(element.get_attribute("id") or element.text)

    def search(self, words: str) -> None:
        self.at("words").clear()
        self.at("words").send_keys(words)
        self.until(lambda: any(words in hit.text for hit in self.all("#hits button")))

    def pick(self, title: str) -> None:
        self.search(title)
        hit = f"//*[@id='hits']//button[starts-with(normalize-space(), '{title}')]"
        self.until(lambda: self.chromium.find_element(By.XPATH, hit).click() is None)

    def recommend(self) -> list[tuple[str, list[list[str]]]]:
        """Press the button; each list's name and rows."""
        self.all("#request button.main")[0].click()
        return self.lists()

    def lists(self) -> list[tuple[str, list[list[str]]]]:
        self.until(lambda: "items" in self.at("outcome").text)
        found = []
        for section in self.all("#lists section"):
            rows = section.find_elements(By.CSS_SELECTOR, "tbody tr")
            cells = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
            found.append((section.find_element(By.TAG_NAME, "h2").text, cells))
        return found

    def curl(self) -> dict[str, Any]:
        """The request that the curl command holds."""
        text = self.at("curl").text
        body: dict[str, Any] = json.loads(text[text.index("-d '") + 4 : text.rindex("'")])
        return body


@pytest.fixture
def page(chromium: webdriver.Chrome, url: str) -> Iterator[Page]:
    """The page, afresh; afterwards nothing may have gone wrong in the browser, and nobody else been asked."""
    for kind in ("browser", "performance"):  # what came before
        chromium.get_log(kind)
    yield Page(chromium, url)
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert any(each.startswith(f"{url}/v1/") for each in asked)
    own = (f"{url}/", "data:", "chrome:", "chrome-untrusted:")  # the last two are the browser's first, empty tab
    assert {each for each in asked if not each.startswith(own)} == set()


def test_from_a_search_to_a_list(page: Page, url: str) -> None:
    page.pick("Trail Tent 3")
    page.pick("Trail Tent 10")
    assert [line.text.rstrip("× \n") for line in page.all("#picked li")] == ["Trail Tent 3", "Trail Tent 10"]
    page.at("k").clear()
    page.at("k").send_keys("3")
    assert page.curl() == {"history": ["B03", "B10"], "k": 3, "model": "near"}
    assert f"curl '{url}/v1/recommendations'" in page.at("curl").text
    [(name, rows)] = page.recommend()
    assert name == "near"
    assert rows == [
        ["1", "Trail Tent 9\nB09", "-1.000"],
        ["2", "Trail Tent 11\nB11", "-1.000"],
        ["3", "Trail Tent 8\nB08", "-2.000"],
    ]


def test_a_filter(page: Page) -> None:
    page.pick("Trail Tent 10")
    page.at("filters").find_element(By.TAG_NAME, "summary").click()
    label = next(each for each in page.all("#columns label") if each.text == "kind")
    page.at(label.get_attribute("for")).send_keys("stove")
    assert page.curl()["where"] == {"kind": ["stove"]}
    [(_, rows)] = page.recommend()
    assert [title for _, title, _ in rows] == ["Gas Stove\nB29"]
    assert "fewer items" in page.all("#lists caption")[0].text


def test_two_models_side_by_side(page: Page) -> None:
    page.pick("Trail Tent 3")
    page.pick("Trail Tent 10")
    page.at("k").clear()
    page.at("k").send_keys("2")
    page.at("other").find_element(By.CSS_SELECTOR, "option[value=far]").click()
    near, far = page.recommend()
    assert [name for name, _ in (near, far)] == ["near", "far"]
    assert [row[1] for row in near[1]] == ["Trail Tent 9\nB09 · only here", "Trail Tent 11\nB11 · only here"]
    assert [row[1] for row in far[1]] == ["Trail Tent 2\nB02 · only here", "Trail Tent 4\nB04 · only here"]
    left, right = (section.rect for section in page.all("#lists section"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_with_the_keyboard_alone(page: Page) -> None:
    page.tab_to("words")
    page.type("gas")
    page.until(lambda: len(page.all("#hits button")) == 1)
    page.type(Keys.TAB)
    assert page.focused().startswith("Gas Stove")
    page.type(Keys.ENTER)
    assert page.focused() == "words", "for the next one"
    assert len(page.all("#picked li")) == 1
    page.tab_to("k")
    page.type(Keys.ENTER)
    assert len(page.lists()[0][1]) == 10
    page.tab_to("curl")
    page.tab_to("copy")
    page.type(Keys.ENTER)
    page.until(lambda: page.at("copied").text)


def test_a_narrow_window(page: Page) -> None:
    page.chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.pick("Trail Tent 3")
        page.at("other").find_element(By.CSS_SELECTOR, "option[value=far]").click()
        assert len(page.recommend()) == 2
        width = page.chromium.execute_script("return document.documentElement.scrollWidth")
        assert width <= 400, "nothing is to be scrolled sideways"
        assert all(button.rect["x"] + button.rect["width"] <= 400 for button in page.all("button"))
    finally:
        page.chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_interface_is_described_without_third_parties(page: Page, url: str) -> None:
    page.pick("Trail Tent 3")
    page.chromium.get(f"{url}/docs")
    page.until(lambda: "/v1/recommendations" in page.chromium.find_element(By.ID, "swagger-ui").text)
    assert "Recommend the next items for one history" in page.chromium.find_element(By.ID, "swagger-ui").text
