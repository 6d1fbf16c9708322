"""The page of `resnet-fast serve` in a real browser: an image is chosen, dropped or pasted, and its labels are seen."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from resnet_fast import models
from resnet_fast.inference import Classifier, load
from tests.inference.server import in_thread, ten_classes

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
pytest.importorskip("uvicorn", reason="the server is the extra 'serve'")
BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")

GIVE = """([selector, kind, bytes, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const init = { bubbles: true, cancelable: true };
  const event = kind === "paste" ? new ClipboardEvent(kind, { ...init, clipboardData: data })
                                 : new DragEvent(kind, { ...init, dataTransfer: data });
  document.querySelector(selector).dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return load(weights=str(ten_classes(tmp_path_factory.mktemp("page"))), optimize=False)


@pytest.fixture(scope="module")
def address(classifier: Classifier) -> Iterator[str]:
    with in_thread(classifier, max_pixels=1_000_000) as running:
        yield f"http://127.0.0.1:{running.port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield running
        running.close()


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    """The page, with a list `faults` of what went wrong on it and `foreign` of requests that left the server."""
    context = browser.new_context(viewport={"width": 920, "height": 560})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    opened.faults, opened.foreign = [], []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.on("console", lambda line: opened.faults.append(line.text) if line.type == "error" else None)
    own = (address, "blob:")
    opened.on("request", lambda each: None if each.url.startswith(own) else opened.foreign.append(each.url))
    opened.goto(address)
    yield opened
    context.close()
    assert opened.foreign == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    coarse = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.frombytes("RGB", (6, 6), coarse.numpy().tobytes()).resize((320, 200)).save(path)
    return path


def expected(classifier: Classifier, photo: Path) -> list[tuple[str, str]]:
    rows = classifier.top(classifier([models.read_image(photo)]), 5)[0]
    return [(row.label, f"{100 * row.probability:.1f} %") for row in rows]


def rows(page: Any) -> list[tuple[str, str]]:
    page.wait_for_selector('#answer[aria-busy="false"] #labels:not([hidden]) li')
    found = page.locator("#labels li")
    return [tuple(found.nth(index).inner_text().split("\n")[:2]) for index in range(found.count())]


def test_a_chosen_image_shows_its_labels(page: Any, classifier: Classifier, photo: Path) -> None:
    assert "Drop an image here" in page.inner_text("#drop")
    page.wait_for_function(
        "document.querySelector('#model').textContent.includes('resnet18, ten.safetensors, 10 classes')"
    )
    page.set_input_files("#file", photo)
    wanted = expected(classifier, photo)
    assert rows(page) == wanted
    widths = page.eval_on_selector_all("#labels .bar div", "bars => bars.map(bar => bar.style.width)")
    assert [round(float(width.rstrip("%")), 1) for width in widths] == [float(share[:-2]) for _, share in wanted]
    playwright.expect(page.locator("#preview")).to_have_js_property("naturalWidth", 320)
    assert page.is_visible("#preview") and not page.is_visible("#invitation")
    assert "ms on the server" in page.inner_text("#time")
    assert page.faults == []


@pytest.mark.parametrize(("selector", "kind"), [("#drop", "drop"), ("body", "drop"), ("body", "paste")])
def test_an_image_is_dropped_or_pasted(
    page: Any, classifier: Classifier, photo: Path, selector: str, kind: str
) -> None:
    page.evaluate(GIVE, [selector, kind, list(photo.read_bytes()), "photo.png"])
    assert rows(page) == expected(classifier, photo)
    assert page.faults == []


def test_errors_are_shown_and_forgotten(page: Any, classifier: Classifier, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_selector("#error:not([hidden])")
    assert "not an image of the formats" in page.inner_text("#error") and page.is_visible("#invitation")
    large = io.BytesIO()
    Image.new("RGB", (1001, 1000)).save(large, "PNG")
    (tmp_path / "large.png").write_bytes(large.getvalue())
    page.set_input_files("#file", tmp_path / "large.png")
    playwright.expect(page.locator("#error")).to_have_text("the image has more than 1,000,000 pixels")
    page.set_input_files("#file", photo)
    assert rows(page) == expected(classifier, photo) and not page.is_visible("#error")
    page.route("**/predict*", lambda route: route.abort())
    page.set_input_files("#file", photo)
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "The server does not answer."


def test_keyboard_and_small_screens(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"
    page.set_viewport_size({"width": 320, "height": 600})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_dark_and_light_have_contrast(page: Any) -> None:
    """Texts have at least the 4.5 to 1 of WCAG AA against the ground that they stand on."""
    contrast = """([text, ground]) => {
      const light = (selector, property) => {
        const parts = getComputedStyle(document.querySelector(selector))[property].match(/[\\d.]+/g).slice(0, 3);
        const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = parts.map((part) => linear(part / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
      };
      const pair = [light(text, "color"), light(ground, "backgroundColor")].sort((a, b) => b - a);
      return pair[0] / pair[1];
    }"""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for text, ground in (
            ("h1", "body"),
            ("#model", "body"),
            ("#note", "#answer"),
            ("#error", "#answer"),
            ("a", "body"),
        ):
            assert page.evaluate(contrast, [text, ground]) >= 4.5, (scheme, text)
