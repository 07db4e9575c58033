"""A report in Debian's Chromium, opened from disk with the network cut."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from esegeta_monai.files.pictures.picture import INTENDED_USE
from esegeta_monai.output.report.page import report_path, write_report
from tests.output.report.finished import evaluated, explained, one_map
from tests.output.report.viewer import data_of

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOSTILE = "<img src onerror>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case with a failed method, an empty target, tables and curves; and one with a hostile name."""
    out = explained(tmp_path_factory.mktemp("browser"), ("sub-01", HOSTILE))
    evaluated(out, "sub-01")
    write_report(out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Reader:
    """A page, what it asked for, and what went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))
        self.page.goto(path.as_uri())

    def ready(self) -> Any:
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)
        self.wait_for_drawing()
        return self.page

    def wait_for_drawing(self) -> None:
        """Wait two frames, after which pending drawing is done."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def pixels(self, selector: str) -> np.ndarray:
        """RGBA of a canvas."""
        self.wait_for_drawing()
        uri = self.page.eval_on_selector(selector, "(canvas) => canvas.toDataURL()")
        return np.rint(255 * imread(io.BytesIO(base64.b64decode(uri.split(",")[1])))).astype(np.uint8)


@pytest.fixture
def reader(browser: Any, folder: Path) -> Iterator[Reader]:
    reader = Reader(browser, report_path(folder, "sub-01"))
    reader.ready()
    yield reader
    asked = [url for url in reader.requests if not url.startswith(("data:", "blob:"))]
    assert asked == [report_path(folder, "sub-01").as_uri()], "nothing but the page itself"
    assert reader.errors == []
    reader.context.close()


AXIAL = 'canvas.big[data-plane="0"]'


def test_it_opens_and_asks_for_nothing(reader: Reader) -> None:
    assert reader.page.get_attribute("html", "data-ready") == "yes"
    assert reader.page.locator(".use").first.inner_text() == INTENDED_USE
    assert reader.page.locator(".use").first.is_visible()
    assert reader.page.locator("canvas.small-map").count() == 3
    letters = reader.page.locator("figure.plane").first.locator(".lettered > span").all_inner_texts()
    assert letters == ["R", "L", "A", "P"]
    assert reader.pixels(AXIAL)[..., :3].std() > 5, "something is drawn"


def test_slices_by_slider_keys_and_wheel(reader: Reader) -> None:
    page = reader.page
    slider = page.locator("#slice")
    start, last = int(slider.input_value()), int(slider.get_attribute("max"))
    slider.focus()
    page.keyboard.press("ArrowRight")
    reader.wait_for_drawing()
    assert page.get_attribute(AXIAL, "data-slice") == str(start + 1)
    before = reader.pixels(AXIAL)
    page.focus(AXIAL)
    for key, expected in (("Home", 0), ("PageUp", 5), ("ArrowUp", 6), ("ArrowDown", 5), ("End", last)):
        page.keyboard.press(key)
        reader.wait_for_drawing()
        assert page.get_attribute(AXIAL, "data-slice") == str(expected), key
    assert slider.input_value() == str(last)
    assert page.locator("#slice-text").inner_text().startswith(f"{last + 1} of {last + 1}, z = ")
    assert not np.array_equal(before, reader.pixels(AXIAL))
    page.hover(AXIAL)
    page.mouse.wheel(0, 100)
    page.wait_for_selector(f'{AXIAL}[data-slice="{last - 1}"]')


def test_all_pictures_of_the_table_follow(reader: Reader) -> None:
    page = reader.page
    page.locator("button.cell").nth(1).click()
    page.keyboard.press("Home")
    reader.wait_for_drawing()
    assert page.eval_on_selector_all("canvas.small-map", "(all) => all.map((c) => c.dataset.slice)") == ["0"] * 3
    assert page.locator("#focus-title").inner_text() == "InputXGradient · MultiClassMask-grey matter"
    page.get_by_text("sagittal", exact=True).first.click()
    reader.wait_for_drawing()
    assert page.locator("button.cell .lettered .l").first.inner_text() == "A"


def test_threshold_signs_and_views(reader: Reader, folder: Path) -> None:
    """The viewer shows the values of the NIfTI file: voxels above the threshold, of the sign asked for."""
    page = reader.page
    data = data_of(report_path(folder, "sub-01"))
    entry = data["maps"][1]
    page.locator("button.cell").nth(1).click()
    page.locator('input[name="look"][value="map"]').check(force=True)
    page.uncheck("#outline")
    values = np.asarray(
        nib.load(folder / "sub-01/sub-01_MultiClassMask-grey-matter_InputXGradient_attr.nii.gz").dataobj
    )
    index = int(page.get_attribute(AXIAL, "data-slice"))
    through = round((np.linalg.inv(np.diag([2, 2, 2, 1.0])) @ np.array(data["affine"]) @ [0, 0, index, 1])[2])
    part = np.rint(values[:, :, through] / entry["limit"] * data["levels"]) / data["levels"]

    def share() -> float:
        canvas = reader.pixels("canvas.small-map >> nth=1")
        return float((canvas[..., :3].sum(-1) > 0).mean())

    def expected(shown: np.ndarray) -> float:
        size = data["size"][0] * data["size"][1]
        return float(shown.sum() / size)

    assert share() == pytest.approx(expected(part != 0), abs=0.02)
    page.locator("#threshold").fill("30")
    above = expected(np.abs(part) >= 0.3)
    assert 0 < above < 0.9
    assert share() == pytest.approx(above, abs=0.02)
    assert page.locator("#threshold-text").inner_text() == "30 %"
    page.locator('input[name="sign"][value="positive"]').check(force=True)
    assert share() == pytest.approx(expected(part >= 0.3), abs=0.02)
    page.locator('input[name="sign"][value="negative"]').check(force=True)
    assert share() == pytest.approx(expected(part <= -0.3), abs=0.02)
    page.locator('input[name="sign"][value="absolute"]').check(force=True)
    assert share() == pytest.approx(above, abs=0.02)
    page.locator('input[name="look"][value="masked"]').check(force=True)
    masked = reader.pixels("canvas.small-map >> nth=1")
    assert (masked[..., 0] == masked[..., 1]).all(), "the scan in grey"
    page.locator('input[name="look"][value="scan"]').check(force=True)
    assert not np.array_equal(masked, reader.pixels("canvas.small-map >> nth=1"))


@pytest.mark.parametrize("how", ["montage", "mip"])
def test_montage_and_projection(reader: Reader, how: str) -> None:
    before = reader.pixels(AXIAL)
    reader.page.locator(f'input[name="show"][value="{how}"]').check(force=True)
    after = reader.pixels(AXIAL)
    assert before.shape != after.shape or not np.array_equal(before, after)
    assert after[..., :3].std() > 5
    label = reader.page.get_attribute(AXIAL, "aria-label")
    assert {"montage": "axial montage", "mip": "axial maximum-intensity projection"}[how] in label


def test_a_shared_raw_scale_palettes_and_opacity(reader: Reader, folder: Path) -> None:
    page = reader.page
    limits = [m["limit"] for m in data_of(report_path(folder, "sub-01"))["maps"]]
    weakest = int(np.argmin(limits))
    before = reader.pixels(f"canvas.small-map >> nth={weakest}")
    page.select_option("#scale", "all")
    after = reader.pixels(f"canvas.small-map >> nth={weakest}")
    assert not np.array_equal(before, after), "weaker beside a stronger map"
    high = page.locator("[data-bar] .ends > span:last-child").first.inner_text()
    assert float(high) == pytest.approx(max(limits), rel=0.01)
    page.select_option("#palette", "1")
    assert not np.array_equal(after, reader.pixels(f"canvas.small-map >> nth={weakest}"))
    page.locator("#opacity").fill("0")
    page.uncheck("#outline")
    grey = reader.pixels(f"canvas.small-map >> nth={weakest}")
    assert (grey[..., 0] == grey[..., 2]).all(), "the scan alone"


def test_a_point_is_clicked_and_read(reader: Reader, folder: Path) -> None:
    reader.page.locator(AXIAL).scroll_into_view_if_needed()
    box = reader.page.locator(AXIAL).bounding_box()
    reader.page.mouse.click(box["x"] + box["width"] * 0.22, box["y"] + box["height"] * 0.33)
    reader.wait_for_drawing()
    text = reader.page.locator("#readout").inner_text()
    right, anterior = (float(v) for v in re.match(r"RAS (-?[\d.]+), (-?[\d.]+)", text).groups())
    data = data_of(report_path(folder, "sub-01"))
    affine, size = np.array(data["affine"]), data["size"]
    # radiological: a fifth from the left is a fifth from the patient's right
    assert right == pytest.approx((affine @ [size[0] - 1 - int(0.22 * size[0]), 0, 0, 1])[0], abs=0.1)
    assert anterior == pytest.approx((affine @ [0, size[1] - 1 - int(0.33 * size[1]), 0, 1])[1], abs=0.1)
    assert "target per voxel" in text or "intensity" in text


def test_failures_and_empty_targets_are_reported_in_their_place(reader: Reader) -> None:
    page = reader.page
    assert page.locator(".absent.failed").count() == 1
    assert "global average pooling" in page.locator(".absent.failed").inner_text()
    assert page.locator(".absent.empty_target").count() >= 4
    page.get_by_text("Traceback", exact=True).click()
    assert "pooled_cam.py, line" in page.locator("pre").inner_text()


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_at_both_widths_in_both_schemes(browser: Any, folder: Path, width: int, scheme: str) -> None:
    for path in (report_path(folder, "sub-01"), folder / "index.html"):
        reader = Reader(browser, path, width, color_scheme=scheme)
        page = reader.ready() if "report" in path.name else reader.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
        small = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() && e.innerText?.trim()
                 && !e.children.length && parseFloat(getComputedStyle(e).fontSize) < 11
                 && !e.closest(".lettered, svg")).map((e) => e.outerHTML)"""
        )
        assert small == []
        poor = page.evaluate(CONTRAST)
        assert poor == [], "contrast of at least 4.5"
        assert reader.errors == []
        reader.context.close()


CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const words = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && !e.closest("svg, canvas, option, select") && words(e))
    .map((e) => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 120)];
    })
    .filter(([ratio]) => ratio < 4.5);
}"""


def test_everything_can_be_reached_by_keyboard(reader: Reader) -> None:
    page = reader.page
    page.focus("body")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(() => { const e = document.activeElement; return e.id || e.name || e.className || e.tagName; })()"
            )
        )
    wanted = {"theme", "plane", "show", "sign", "look", "slice", "threshold", "opacity", "palette", "scale", "outline"}
    assert wanted | {"big", "cell"} <= reached


def test_the_theme_button(reader: Reader) -> None:
    colours = set()
    for _ in range(2):
        reader.page.click("#theme")
        colours.add(reader.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_a_hostile_case_name_is_only_text(browser: Any, folder: Path) -> None:
    reader = Reader(browser, folder / "index.html")
    assert reader.page.locator("main img").count() == 2, "thumbnails"
    reader.page.get_by_text(HOSTILE, exact=True).click()
    page = reader.ready()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("main img").count() == 0
    assert page.title() == f"{HOSTILE}: explanation report"
    assert reader.errors == []
    reader.context.close()


def test_hostile_names_of_everything(browser: Any, tmp_path: Path) -> None:
    evil = '</script><script>document.title = "taken"</script><img src="x" onerror="document.title = \'taken\'">'
    entry = {"case": evil, "target": evil, "method": evil, "status": "failed", "reason": evil, "traceback": evil}
    (tmp_path / "run.json").write_text(json.dumps({"results": [entry], "bundle": evil, "versions": {evil: evil}}))
    (path,) = write_report(tmp_path).cases.values()
    for file in (path, tmp_path / "index.html"):
        reader = Reader(browser, file)
        assert reader.page.title() != "taken"
        assert reader.page.locator("img").count() == 0
        assert [url for url in reader.requests if not url.startswith("data:")] == [file.as_uri()]
        assert reader.errors == []
        reader.context.close()


@pytest.mark.parametrize("width", [1280, 800])
def test_a_long_name_leaves_the_other_columns_of_the_index_in_sight(browser: Any, tmp_path: Path, width: int) -> None:
    entry = {"case": "a" * 150, "target": None, "method": None, "status": "failed", "reason": "no scan"}
    (tmp_path / "run.json").write_text(json.dumps({"results": [entry]}))
    reader = Reader(browser, write_report(tmp_path).index, width)
    try:
        wide, seen = reader.page.evaluate(
            "() => { const s = document.querySelector('section.scroll'); return [s.scrollWidth, s.clientWidth]; }"
        )
    finally:
        reader.context.close()
    assert wide <= seen


def test_in_two_dimensions(browser: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(40, 60, 1)).astype(np.float32)
    one_map(tmp_path, values, np.eye(4))
    reader = Reader(browser, write_report(tmp_path).cases["a"])
    page = reader.ready()
    assert page.locator("canvas.big").count() == 1
    assert not page.locator("#slice").is_visible()
    assert page.locator(".lettered > span").count() == 0
    assert reader.pixels("canvas.big")[..., :3].std() > 5
    assert reader.errors == []
    reader.context.close()


@pytest.mark.slow
def test_3d(browser: Any, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="NiiVue comes with nilearn")
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    path = write_report(out, view_3d=True).cases["sub-01"]
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", *FLAGS[2:]]
    with_gl = browser.browser_type.launch(executable_path=CHROMIUM, args=flags)
    try:
        reader = Reader(with_gl, path)
        reader.ready().click("#load-3d")
        reader.page.wait_for_selector("html[data-three]", timeout=60_000)
        assert reader.page.get_attribute("html", "data-three") == "yes", reader.page.inner_text("#load-3d")
        asked = [url for url in reader.requests if not url.startswith(("data:", "blob:"))]
        assert asked == [path.as_uri()]
    finally:
        with_gl.close()
