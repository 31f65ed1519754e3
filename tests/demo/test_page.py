"""The page in a real browser: every tab and control, two visitors, a narrow dark screen, the keyboard."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_diffusion.plots.grids import image_grid
from tests.support.browser import NARROW, Visit

pytestmark = pytest.mark.slow
SECONDS = 30_000
"""How long, in milliseconds, the page may take on a busy machine."""


class ReadyVisit(Visit):
    """A visit that begins when the controls have been set for the pipeline."""

    def __init__(self, browser: Any, address: str, **options: Any):
        super().__init__(browser, address, **options)
        self.page.set_default_timeout(SECONDS)
        self.page.get_by_label("d", exact=True).first.wait_for(timeout=2 * SECONDS)

    def open(self, tab: str) -> Any:
        """Open a tab; the page."""
        self.page.get_by_role("tab", name=tab).click()
        return self.page

    def picture(self, selector: str) -> np.ndarray:
        """The pixels of a picture that the page shows."""
        address = self.page.locator(selector).get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_generate(visit: ReadyVisit) -> None:
    page = visit.open("Generate")
    page.get_by_label("f", exact=True).first.check()
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="ddim").click()
    page.get_by_label("number input for Steps").first.fill("4")
    page.get_by_label("number input for Images of each").fill("3")
    page.get_by_label("Seed").first.fill("7")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#generated .gif").wait_for()
    assert "Step 4 of 4" in page.locator("#generated .caption").inner_text()
    # The lines of Python draw the same pixels.
    code = page.locator(".cm-content").inner_text()
    found: dict[str, Any] = {}
    exec(code, found)
    images = torch.stack([torch.tensor(np.asarray(image)) for image in found["images"]])[:, None] / 255
    assert len(images) == 6
    assert "build_sampler('ddim', " in code
    wanted = np.asarray(image_grid(images, 3))
    np.testing.assert_allclose(visit.picture("#generated .clean"), wanted, atol=1)
    # The steps before, by the keyboard.
    last = visit.picture("#generated .noisy")
    page.locator("#generated .place").press("ArrowLeft")
    assert "Step 3 of 4" in page.locator("#generated .caption").inner_text()
    assert (visit.picture("#generated .noisy") != last).any()
    for kind, suffix in (("png", "PNG"), ("gif", "GIF")):
        with page.expect_download() as download:
            page.locator(f"#generated .{kind}").click()
        assert download.value.suggested_filename == f"d-f-seed7.{kind}"
        with Image.open(download.value.path()) as picture:
            assert picture.format == suffix


def test_a_student_says_what_it_has_learned_and_errors_are_kind(visit: ReadyVisit) -> None:
    page, draw = visit.page, visit.page.get_by_role("button", name="Sample", exact=True)
    page.get_by_label("d", exact=True).first.uncheck()
    draw.click()
    page.get_by_text("choose one class or more").wait_for()
    page.get_by_label("Pipeline").click()
    page.get_by_role("option", name="student").click()
    page.get_by_text("This student was distilled at the scales 1.9, 1, 2.8.").first.wait_for()
    page.get_by_label("d", exact=True).first.check()
    draw.click()
    page.get_by_text("Step 1 of 1").wait_for()
    page.get_by_label("number input for Guidance scale").first.fill("2")
    draw.click()
    page.get_by_text("guidance_scale must be one of [1.9, 1.0, 2.8]").wait_for()


def test_steer(visit: ReadyVisit) -> None:
    page = visit.open("Steer")
    drawn = []
    for change in (False, True):
        page.get_by_role("button", name="From the start").click()
        page.get_by_label("number input for Steps").nth(1).fill("4")
        page.locator('input[type="radio"][value="d"]').check()
        for step in range(1, 5):
            if change and step == 3:
                page.locator('input[type="radio"][value="i"]').check()
            page.get_by_role("button", name="One step").click()
            page.get_by_text(f"Step {step} of 4").wait_for()
        drawn.append(visit.picture("#steered .clean"))
        page.locator("#steered .gif").wait_for()
    assert "; i, guidance" in page.locator("#steered .caption").inner_text()
    assert (drawn[0] != drawn[1]).any()
    page.get_by_role("button", name="From the start").click()
    page.get_by_role("button", name="Play").click()
    page.get_by_text("Step 2 of 4").wait_for()
    page.get_by_role("button", name="Pause").click()


def test_compare(visit: ReadyVisit) -> None:
    page = visit.open("Compare")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#compared figure").nth(3).wait_for()
    titles = page.locator("#compared figcaption").all_inner_texts()
    assert [title.partition(",")[0] for title in titles[::2]] == ["teacher: dpmpp", "teacher: ddim"]
    assert all("network evaluations and" in title for title in titles)


def test_explore(visit: ReadyVisit, tmp_path: Path) -> None:
    page = visit.open("Explore")
    page.get_by_role("button", name="Walk").click()
    page.locator("#between figure img").wait_for()
    assert page.locator("#between figcaption").inner_text().startswith("From d (seed 0) to i (seed 1)")
    redraw = page.get_by_role("button", name="Draw again")
    redraw.click()
    page.get_by_text("draw a picture first, or choose a file").wait_for()
    canvas = page.locator("#sketchpad canvas")
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    for key in ("Shift+ArrowDown", "Shift+ArrowLeft"):  # a stroke by the keyboard
        for _ in range(5):
            page.keyboard.press(key)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 60, steps=4)
    page.mouse.up()
    redraw.click()
    page.locator("#inverted figure img").nth(3).wait_for()
    first = visit.picture("#inverted figure:nth-child(1) img")
    assert first.max() > 50  # strokes of 22 pixels in 280, on 8
    Image.new("L", (50, 40), 255).save(tmp_path / "white.png")
    page.locator("#sketchpad .file").set_input_files(tmp_path / "white.png")
    page.get_by_role("button", name="Swap black and white").click()
    redraw.click()
    page.wait_for_function(
        "before => document.querySelector('#inverted img').src !== before",
        arg=page.locator("#inverted img").first.get_attribute("src"),
    )


def test_narrow_dark_and_closed_in_mid_run(browser: Any, address: str) -> None:
    visit = ReadyVisit(browser, address, **NARROW)
    page = visit.page
    for tab in ("Steer", "Compare", "Explore", "Generate"):
        shown = page.get_by_role("tab", name=tab)
        if not shown.is_visible():  # in the menu of those that do not fit
            page.locator(".overflow-menu > button").click()
            shown = page.locator(".overflow-dropdown button", has_text=tab)
        shown.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.strip("rgb()").split(","))) < 60
    page.get_by_label("number input for Steps").first.fill("100")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text(re.compile(r"Step \d+ of 100")).wait_for()
    visit.close()
    after = [ReadyVisit(browser, address) for _ in range(2)]  # the next visitors are not kept waiting
    for each in after:
        each.page.get_by_role("button", name="Sample", exact=True).click()
    for each in after:
        each.page.locator("#generated .gif").wait_for()
        each.close()
