"""The page in a real browser: it draws what the pipeline draws, each control works, and nothing leaves the machine."""

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist_diffusion.cli import main
from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.demo.studio.build import write_studio
from mnist_diffusion.demo.studio.plans import sampler_plan
from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.conftest import make_pipeline
from tests.support.browser import CHROMIUM, NARROW, Visit


@pytest.fixture(scope="module")
def address(pipelines: dict[str, MNISTDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served from loopback."""
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("needs Debian's chromium, and npm, which fetches ONNX Runtime for the web")
    folder = tmp_path_factory.mktemp("studio")
    write_studio(pipelines, folder, title="Ten <b>letters</b>")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class ReadyVisit(Visit):
    """A visit that begins when the first picture is drawn."""

    def __init__(self, browser: Any, address: str, **options: Any):
        super().__init__(browser, address, **options)
        self.page.wait_for_selector("#status", state="hidden")

    def after(self, act: Any) -> str:
        """The picture once it has been drawn again because of an act."""
        before = self.page.evaluate("document.documentElement.dataset.drawn")
        act()
        self.page.wait_for_function("before => document.documentElement.dataset.drawn !== before", arg=before)
        return self.picture()

    def picture(self) -> str:
        return str(self.page.evaluate("document.getElementById('picture').toDataURL()"))


DRAW = """async ([file, noise, label, scale, steps]) => {
  const { bytesOf, denoise, noiseOf, settings } = await import("/studio.js");
  const model = settings.models.find((each) => each.file === file);
  const now = () => ({ shares: [[[label, 1]]], scale });
  let last;
  for await (last of denoise(model, [Float32Array.from(noise)], steps, now, noiseOf(0)));
  return Array.from(bytesOf(last.samples[0]));
}"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale", "steps"), [("teacher", 2.5, 8), ("teacher", 0.0, 3), ("student", 2.8, 1)])
def test_the_same_noise_gives_the_pixels_of_the_pipeline(
    visit: ReadyVisit, pipelines: dict[str, MNISTDiffusionPipeline], name: str, scale: float, steps: int
) -> None:
    file = f"{list(pipelines).index(name)}.onnx"
    asked: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}
    for label in (3, 7):
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(label))
        drawn = visit.page.evaluate(DRAW, [file, noise.flatten().tolist(), label, scale, steps])
        wanted = pipelines[name]([label], latents=noise, **asked).images
        apart = np.abs(np.array(drawn) - np.round(255 * wanted.flatten()))
        assert (apart <= 1).mean() >= 0.999


@pytest.mark.slow
def test_every_control(visit: ReadyVisit) -> None:
    page = visit.page
    assert page.title() == "Ten <b>letters</b>"
    first = visit.picture()
    assert visit.after(lambda: page.get_by_role("button", name="Sample again").click()) == first
    pictures = [first]

    def changes(act: Any) -> None:
        pictures.append(visit.after(act))
        assert pictures[-1] != pictures[-2]

    changes(lambda: page.get_by_role("button", name="d", exact=True).click())
    changes(lambda: page.get_by_role("button", name="Next").click())
    changes(lambda: page.locator("#seed").fill("77"))
    changes(lambda: page.locator("#scale").press("ArrowRight"))  # by the keyboard
    changes(lambda: page.locator("#walk").fill("0.5"))
    changes(lambda: page.locator("#mix").fill("0.5"))
    changes(lambda: page.locator("#other").select_option("5"))
    changes(lambda: page.locator("#count").press("ArrowRight"))
    changes(lambda: page.get_by_role("button", name="teacher").click())
    assert page.locator("#steps canvas").count() == 10
    page.get_by_role("button", name="After step 3").click()
    assert visit.picture() != pictures[-1]
    page.wait_for_function("document.querySelectorAll('#all canvas').length === 10")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    assert download.value.suggested_filename == "d-77.png"


@pytest.mark.slow
def test_a_slow_drawing_is_steered(visit: ReadyVisit) -> None:
    page = visit.page
    alone = visit.after(lambda: page.get_by_role("button", name="teacher").click())
    page.locator("#slow").check()
    page.locator("#count").fill("2")  # four steps, half a second apart
    page.wait_for_timeout(600)
    steered = visit.after(lambda: page.get_by_role("button", name="h", exact=True).click())
    other = visit.after(lambda: page.get_by_role("button", name="Sample again").click())
    assert len({alone, steered, other}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("visit", [NARROW], indirect=True)
def test_narrow_dark_and_without_motion(visit: ReadyVisit) -> None:
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(255, 255, 255)"
    before = visit.after(lambda: page.get_by_role("button", name="teacher").click())
    page.locator("#slow").check()
    page.get_by_role("button", name="Sample again").click()
    page.wait_for_timeout(700)
    assert visit.picture() == before  # only the end is shown


@pytest.mark.slow
def test_an_error_is_said(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.route("**/0.onnx", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Something went wrong')")
    page.close()


@pytest.mark.parametrize(
    ("name", "message"), [("unipc", "does not combine the last two predictions"), ("euler", "not of unit variance")]
)
def test_samplers_that_are_no_sums_are_refused(name: str, message: str) -> None:
    pipeline = make_pipeline(diffusion=DiffusionConfig(beta_schedule="linear"))
    pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
    with pytest.raises(UserError, match=message):
        sampler_plan(pipeline, 4)


def test_a_sampler_that_adds_noise_at_some_levels_only() -> None:
    sampling = SamplingSettings(scheduler="dpmpp-sde", noise_interval=(0.3, 0.8))
    plan = sampler_plan(make_pipeline(sampling=sampling), 10)
    assert [step["t"] for step in plan if step["d"]] == [799, 699, 599, 499, 399]


def test_what_cannot_be_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="alone is unconditional"):
        write_studio({"alone": make_pipeline(conditional=False)}, tmp_path / "out", title="")
    other = make_pipeline()
    other.register_to_config(id2label={"0": "zero"})
    with pytest.raises(UserError, match="two draws other images or classes than one"):
        write_studio({"one": make_pipeline(), "two": other}, tmp_path / "out", title="")
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    asked = ["studio", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--runtime", str(tmp_path)]
    assert main(asked) == 2
    assert "has no ort.wasm.min.mjs, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
