"""The page at `/`: that browsers may run it, that it asks nobody else, and that its parts fit together."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.service.test_api import URL, StandIn, refused, serving


class Page(HTMLParser):
    """The elements of a page, and the texts of those that hold code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.code: dict[str, str] = {}
        self._within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.code[self._within] = self.code.get(self._within, "") + data

    def all(self, attribute: str) -> list[str]:
        return [found for _, attributes in self.elements if (found := attributes.get(attribute)) is not None]


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving({"stand-in": StandIn()}) as client:
        yield client


@pytest.fixture
def html(client: TestClient) -> str:
    return client.get("/").text


def test_the_policy_lets_this_page_run_and_nothing_else(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    page = Page(response.text)
    for tag in ("script", "style"):
        digest = b64encode(hashlib.sha256(page.code[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
        assert [own for own, _ in page.elements].count(tag) == 1
    inline = {name for _, attributes in page.elements for name in attributes if name == "style" or name[:2] == "on"}
    assert not inline, "the policy blocks these"


def test_the_page_asks_nobody_else_and_writes_no_markup(html: str) -> None:
    assert not re.search(r"https?:|//\w", html.replace("// ", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", html)
    assert all(not link.startswith("/") for name in ("href", "src", "action") for link in Page(html).all(name))


def test_every_field_has_its_label_and_every_id_exists(html: str) -> None:
    page = Page(html)
    ids, code = page.all("id"), page.code["script"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'at\("([\w-]+)"\)', code)) <= set(ids)
    assert {*page.all("for"), *page.all("aria-labelledby")} <= set(ids)
    fields = [attributes for tag, attributes in page.elements if tag in ("input", "select", "textarea")]
    for field in fields:
        assert field["id"] in page.all("for") or field.get("type") == "checkbox"  # those stand inside their labels
    assert set(re.findall(r"#([a-z]+) ", page.code["style"])) <= set(ids)
    assert "status" in page.all("role")
    assert "alert" in page.all("role")


def test_the_page_is_open_and_what_it_asks_is_not(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a-secret")
    with serving({"a": StandIn()}, token_file=str(tmp_path / "tokens")) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "secret" not in page.text
        for path in ("/v1/models", "/v1/items/search?q=tent", "/playground.html"):
            refused(client.get(path), 401)
        refused(client.post("/"), 405)
        refused(client.post(URL, json={"history": ["B01"]}), 401)


def test_the_page_is_no_part_of_the_interface(client: TestClient) -> None:
    assert "/" not in client.get("/openapi.json").json()["paths"]


def test_the_page_is_packaged() -> None:
    assert 'service = ["playground.html"]' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
