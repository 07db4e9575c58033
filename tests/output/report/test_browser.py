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
from tests.output.report.finished import evaluated, explained, one_map, sign
from tests.output.report.viewer import data_of

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOSTILE = "<img src onerror>"
GREY = "grey matter (all predicted voxels)"

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
        """Wait two frames, and until nothing is left to be drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_function("() => (document.documentElement.dataset.pending ?? '0') === '0'")

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
    assert page.locator("#focus-title").inner_text() == f"InputXGradient · {GREY}"
    page.locator('input[name="plane"][value="2"]').dispatch_event("click")
    reader.wait_for_drawing()
    assert page.locator("button.cell .lettered .l").first.inner_text() == "A"


def test_threshold_signs_and_views(reader: Reader, folder: Path) -> None:
    """The viewer shows the values of the NIfTI file: voxels above the threshold, of the sign asked for."""
    page = reader.page
    data = data_of(report_path(folder, "sub-01"))
    entry = data["maps"][1]
    page.locator("button.cell").nth(1).click()
    page.locator('input[name="look"][value="map"]').dispatch_event("click")
    page.uncheck("#outline")
    values = np.asarray(
        nib.load(folder / "sub-01/sub-01_MultiClassMask-grey-matter_InputXGradient_attr.nii.gz").dataobj
    )
    index = int(page.get_attribute(AXIAL, "data-slice"))
    through = round((np.linalg.inv(np.diag([2, 2, 2, 1.0])) @ np.array(data["affine"]) @ [0, 0, index, 1])[2])
    part = values[:, :, through] / entry["limit"]
    page.locator("#threshold").fill("0")

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
    page.locator('input[name="sign"][value="positive"]').dispatch_event("click")
    assert share() == pytest.approx(expected(part >= 0.3), abs=0.02)
    page.locator('input[name="sign"][value="negative"]').dispatch_event("click")
    assert share() == pytest.approx(expected(part <= -0.3), abs=0.02)
    page.locator('input[name="sign"][value="absolute"]').dispatch_event("click")
    assert share() == pytest.approx(above, abs=0.02)
    page.locator('input[name="look"][value="masked"]').dispatch_event("click")
    masked = reader.pixels("canvas.small-map >> nth=1")
    assert (masked[..., 0] == masked[..., 1]).all(), "the scan in grey"
    page.locator('input[name="look"][value="scan"]').dispatch_event("click")
    assert not np.array_equal(masked, reader.pixels("canvas.small-map >> nth=1"))


@pytest.mark.parametrize("how", ["montage", "mip"])
def test_montage_and_projection(reader: Reader, how: str) -> None:
    before = reader.pixels(AXIAL)
    reader.page.locator(f'input[name="show"][value="{how}"]').dispatch_event("click")
    after = reader.pixels(AXIAL)
    assert before.shape != after.shape or not np.array_equal(before, after)
    assert after[..., :3].std() > 5
    label = reader.page.get_attribute(AXIAL, "aria-label")
    assert {"montage": "axial montage", "mip": "axial maximum-intensity projection"}[how] in label


def test_a_shared_raw_scale_palettes_and_opacity(reader: Reader, folder: Path) -> None:
    page = reader.page
    limits = [m["limit"] for m in data_of(report_path(folder, "sub-01"))["maps"]]
    weakest = int(np.argmin(limits))
    page.locator("#threshold").fill("0")
    before = reader.pixels(f"canvas.small-map >> nth={weakest}")
    page.select_option("#scale", "all")
    after = reader.pixels(f"canvas.small-map >> nth={weakest}")
    assert not np.array_equal(before, after), "weaker beside a stronger map"
    assert float(page.locator("#legend-high").inner_text()) == pytest.approx(max(limits), rel=0.01)
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


@pytest.mark.parametrize("width", [1280, 420])
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
    for _ in range(110):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(() => { const e = document.activeElement; return e.id || e.name || e.className || e.tagName; })()"
            )
        )
    wanted = {"theme", "plane", "show", "sign", "look", "slice", "threshold", "opacity", "palette", "scale", "outline"}
    wanted |= {"scale-min", "scale-max", "log", "preset", "level", "width", "zoom-in", "drag", "to-target"}
    assert wanted | {"big", "cell"} <= reached


def test_the_theme_button(reader: Reader) -> None:
    colours = set()
    for _ in range(2):
        reader.page.click("#theme")
        colours.add(reader.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_a_hostile_case_name_is_only_text(browser: Any, folder: Path) -> None:
    reader = Reader(browser, folder / "index.html")
    assert reader.page.locator("main img").count() == 6, "a thumbnail for each of two cases and three targets"
    reader.page.get_by_text(HOSTILE, exact=True).first.click()
    page = reader.ready()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("main img").count() == 0
    assert page.title() == f"{HOSTILE}: explanation report"
    assert reader.errors == []
    reader.context.close()


def test_hostile_names_of_everything(browser: Any, tmp_path: Path) -> None:
    evil = '</script><script>document.title = "taken"</script><img src="x" onerror="document.title = \'taken\'">'
    entry = {"case": evil, "target": evil, "method": evil, "status": "failed", "reason": evil, "traceback": evil}
    (tmp_path / "run.json").write_text(
        json.dumps({"results": [entry], "bundle": evil, "versions": {evil: evil}}), encoding="utf-8"
    )
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
    (tmp_path / "run.json").write_text(json.dumps({"results": [entry]}), encoding="utf-8")
    reader = Reader(browser, write_report(tmp_path).index, width)
    try:
        wide, seen = reader.page.evaluate(
            "() => { const s = document.querySelector('.cohort .scroll'); return [s.scrollWidth, s.clientWidth]; }"
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


# ---- what a reader sees: one test for each promise -------------------------------------------------------------------


SIZE = (256, 256, 6)


@pytest.fixture(scope="module")
def lesion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of 256 x 256 voxels as a CT, with a lesion of 1 in 1,000 voxels that holds the whole map."""
    out = tmp_path_factory.mktemp("lesion")
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij")
    body = (x - 128) ** 2 + (y - 128) ** 2 < 100**2
    mask = (x - 90) ** 2 + (y - 150) ** 2 + (30 * (z - 3)) ** 2 < 12**2
    scan = np.where(body, 40 + rng.integers(-20, 20, SIZE), -1000).astype(np.int16)
    values = np.where(body, rng.normal(0, 0.01, SIZE), 0).astype(np.float32)
    values[mask] = rng.uniform(0.5, 9, int(mask.sum())).astype(np.float32)
    values[30, 128, 0] = 12.0  # the strongest voxel, on an edge slice
    nil = (1e-9 * values).astype(np.float32)
    cam = np.where(body, 0, 1).astype(np.float32)
    affine = np.diag([0.8, 0.8, 6.0, 1.0])
    (out / "a").mkdir()
    nib.save(nib.Nifti1Image(scan, affine), out / "a/a_scan.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), out / "a/a_lesion_mask.nii.gz")
    for name, target, method, array, more in (
        (
            "cam",
            "Component-lesion",
            "GradCam",
            cam,
            {"signed": False, "produces": "layer map", "layer_spacing": [13.0, 13, 48]},
        ),
        ("ixg", "Component-lesion", "InputXGradient", values, {"signed": True, "additive": True}),
        ("nil", "MultiClassMask-oedema", "InputXGradient", nil, {"signed": True, "additive": True}),
        ("shap", "Component-lesion", "ChannelShapley", np.full(SIZE, 1e-3, np.float32), SHARES),
    ):
        nib.save(nib.Nifti1Image(array, affine), out / f"a/a_{name}_attr.nii.gz")
        record = {"case": "a", "method": method, "method_name": method, "target_name": target, "status": "ok"}
        record |= {
            "map": f"a_{name}_attr.nii.gz",
            "network_affine": affine.tolist(),
            "value": 120.0,
            "target_voxels": 900,
        }
        record |= {"units": "target per voxel", "target": target.split("-")[0], "class": target.split("-")[1], **more}
        record["display"] = {"mask": "a_lesion_mask.nii.gz"}
        (out / f"a/a_{name}_attr.json").write_text(json.dumps(record), encoding="utf-8")
        sign(out / f"a/a_{name}_attr")
    write_report(out)
    return out


SHARES = {
    **{"signed": True, "additive": True, "channel_names": ["CT"]},
    "features": [{"feature": "channel 0", "value": 3.0, "standard_error": 0.1}],
}


@pytest.fixture(scope="module")
def seen(browser: Any, lesion: Path) -> Iterator[Reader]:
    reader = Reader(browser, report_path(lesion, "a"))
    reader.ready()
    yield reader
    assert reader.errors == []
    reader.context.close()


def chosen(reader: Reader, index: int) -> Any:
    """The page after a click on a map of the table."""
    reader.page.locator(f'button.cell[data-map="{index}"]').click()
    reader.wait_for_drawing()
    return reader.page


def place_of(reader: Reader, lesion: Path, method: str, target: str) -> int:
    entries = data_of(report_path(lesion, "a"))["maps"]
    return next(i for i, m in enumerate(entries) if (m["method"], m["target"]) == (method, target))


def test_a_lesion_is_graded_by_default_and_nothing_is_clipped(seen: Reader, lesion: Path) -> None:
    index = place_of(seen, lesion, "InputXGradient", "Component-lesion")
    page = chosen(seen, index)
    share = float(re.match(r"([\d.]+) %", page.locator("#saturated").inner_text())[1])
    values = np.asarray(nib.load(lesion / "a/a_ixg_attr.nii.gz").dataobj)
    mask = np.asarray(nib.load(lesion / "a/a_lesion_mask.nii.gz").dataobj) > 0
    assert 0 < share <= 2
    assert share == pytest.approx(
        100 * (values[mask] > float(page.locator("#scale-max").input_value())).mean(), abs=0.3
    )
    assert (values[mask] > np.percentile(np.abs(values), 99.5)).mean() > 0.5, "by the volume alone it is saturated"
    page.locator("#scale-max").fill("1")
    seen.wait_for_drawing()
    share = float(re.match(r"([\d.]+) %", page.locator("#saturated").inner_text())[1])
    assert share == pytest.approx(100 * (values[mask] > 1).mean(), abs=1)
    assert page.locator("#legend-high").inner_text() == "1"
    page.locator("#scale-max").fill("12")
    page.locator("#scale-min").fill("8")
    page.locator("#threshold").fill("0")
    page.locator('input[name="look"][value="map"]').dispatch_event("click")
    page.uncheck("#outline")
    few = (seen.pixels(AXIAL)[..., :3].sum(-1) > 0).mean()
    page.locator("#scale-min").fill("0")
    page.check("#log")
    assert (seen.pixels(AXIAL)[..., :3].sum(-1) > 0).mean() > 5 * few, "weak voxels show on a logarithmic scale"
    page.uncheck("#log")
    page.locator('input[name="look"][value="overlay"]').dispatch_event("click")
    page.check("#outline")
    page.click("#scale-reset")


def test_outlines_are_drawn_on_256_voxels(seen: Reader, lesion: Path) -> None:
    page = chosen(seen, place_of(seen, lesion, "InputXGradient", "Component-lesion"))
    page.click("#to-target")

    def yellow(selector: str) -> int:
        rgb = seen.pixels(selector)[..., :3].astype(int)
        return int(((rgb[..., 0] > 180) & (rgb[..., 1] > 150) & (rgb[..., 2] < 90)).sum())

    with_outline = yellow(AXIAL), yellow('canvas.small-map[data-map="1"]')
    page.uncheck("#outline")
    without = yellow(AXIAL), yellow('canvas.small-map[data-map="1"]')
    page.check("#outline")
    assert all(drawn > bare + 10 for drawn, bare in zip(with_outline, without))
    swatch = "getComputedStyle(document.querySelector('.outline-swatch')).borderTopColor"
    assert page.evaluate(swatch) == "rgb(255, 224, 0)"
    chosen(seen, place_of(seen, lesion, "GradCam", "Component-lesion"))
    assert page.evaluate(swatch) == "rgb(0, 224, 255)", "the legend has the outline's colour"


def test_the_first_view_is_a_signed_map_at_the_targets_largest_cross_section(browser: Any, lesion: Path) -> None:
    reader = Reader(browser, report_path(lesion, "a"))
    try:
        assert reader.page.locator('canvas.small-map[data-state="loading"]').count() > 0 or reader.page.get_attribute(
            "html", "data-ready"
        )
        page = reader.ready()
        assert page.locator("#focus-title").inner_text().startswith("InputXGradient · lesion")
        assert page.get_attribute(AXIAL, "data-slice") == "3", "not the strongest voxel, on slice 0"
        assert page.locator("#opacity-text").inner_text() == "50 %"
        assert int(page.locator("#threshold").input_value()) >= 5
        top = page.eval_on_selector(AXIAL, "(canvas) => canvas.getBoundingClientRect().top")
        assert top < 900
        assert page.locator('canvas.small-map[data-state="drawn"]').count() == 4
    finally:
        reader.context.close()


def test_each_map_says_what_it_tells(seen: Reader, lesion: Path) -> None:
    texts = {}
    for method in ("InputXGradient", "GradCam"):
        page = chosen(seen, place_of(seen, lesion, method, "Component-lesion"))
        sentence = page.locator(".tells:visible").inner_text()
        texts[method] = sentence, page.locator("#legend").inner_text()
    assert "adds to the score" in texts["InputXGradient"][0]
    assert "raises the score" in texts["InputXGradient"][1]
    assert "raises the score" not in texts["GradCam"][1]
    assert "strong support in this layer" in texts["GradCam"][1]
    cautions = page.locator(".findings.compact:visible").inner_text()
    assert "100 % of the map lies outside the body" in cautions
    assert "one position of the layer covers 13 x 13 x 48 mm" in cautions
    assert "lesion" in page.locator("#grid").inner_text()
    assert "Component-" not in page.locator("#grid").inner_text()
    page = chosen(seen, place_of(seen, lesion, "InputXGradient", "MultiClassMask-oedema"))
    assert "numerically nil" in page.locator(".findings.compact:visible").inner_text().lower()
    assert "added up over the target" in page.locator("th .explained").get_attribute("title")


def test_zoom_pan_windows_bars_and_projection(seen: Reader, lesion: Path) -> None:
    page = chosen(seen, place_of(seen, lesion, "InputXGradient", "Component-lesion"))
    page.locator(AXIAL).scroll_into_view_if_needed()
    whole = seen.pixels(AXIAL)
    page.click("#zoom-in")
    page.click("#zoom-in")
    close = seen.pixels(AXIAL)
    assert page.locator("#zoom-text").inner_text() == "225 %"
    assert not np.array_equal(whole, close)

    def at(across: float = 0, down: float = 0) -> tuple[float, float]:
        page.locator(AXIAL).scroll_into_view_if_needed()
        box = page.locator(AXIAL).bounding_box()
        return box["x"] + box["width"] * 0.5 + across, box["y"] + box["height"] * 0.5 + down

    page.mouse.click(*at())  # a point is found again under the pointer, also in a magnified picture
    seen.wait_for_drawing()
    first = page.locator("#readout").inner_text()
    page.locator('input[name="drag"][value="pan"]').dispatch_event("click")
    page.mouse.move(*at())
    page.mouse.down()
    page.mouse.move(*at(40, 30), steps=3)
    page.mouse.up()
    assert not np.array_equal(close, seen.pixels(AXIAL))
    page.locator('input[name="drag"][value="cross"]').dispatch_event("click")
    page.mouse.click(*at(40, 30))
    seen.wait_for_drawing()
    again = page.locator("#readout").inner_text()
    points = [[float(v) for v in re.match(r"RAS ([-\d.]+), ([-\d.]+)", text).groups()] for text in (first, again)]
    assert np.abs(np.subtract(*points)).max() <= 1.7, "the anatomy has moved with the pointer"
    page.click("#zoom-reset")

    for name, (level, width) in {
        "brain": (40, 80),
        "bone": (400, 1800),
        "lung": (-600, 1500),
        "abdomen": (50, 400),
    }.items():
        page.select_option("#preset", name)
        seen.wait_for_drawing()
        assert (page.locator("#level").input_value(), page.locator("#width").input_value()) == (str(level), str(width))
    page.locator('input[name="look"][value="scan"]').dispatch_event("click")
    page.uncheck("#outline")

    def brightness(level: str) -> float:
        page.locator("#level").fill(level)
        page.locator("#width").fill("100")
        return float(np.median(seen.pixels(AXIAL)[..., 0]))

    assert brightness("5000") <= 5, "every voxel lies below the window"
    assert brightness("-5000") >= 250, "every voxel lies above the window"
    page.select_option("#preset", "percentiles")
    page.check("#outline")
    page.locator('input[name="look"][value="overlay"]').dispatch_event("click")

    assert page.locator("#slice-box").is_visible()
    page.locator('input[name="show"][value="mip"]').dispatch_event("click")
    seen.wait_for_drawing()
    assert not page.locator("#slice-box").is_visible(), "a projection has no slice number"
    page.locator('input[name="show"][value="slice"]').dispatch_event("click")
    page = chosen(seen, place_of(seen, lesion, "ChannelShapley", "Component-lesion"))
    assert page.locator("#bars .bar-of").inner_text().split("\n") == ["channel 0", "3 ± 0.1"]
    assert not page.locator(AXIAL).is_visible()


def test_a_photograph_is_in_colour(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one_map(tmp_path, rng.normal(size=(40, 60, 1, 3)).astype(np.float32), np.eye(4))
    photo = np.zeros((40, 60, 1, 3), np.uint8)
    photo[..., 1] = 255
    nib.save(nib.Nifti1Image(photo, np.eye(4)), tmp_path / "a/a_scan.nii.gz")
    reader = Reader(browser, write_report(tmp_path).cases["a"])
    try:
        reader.ready().locator('input[name="look"][value="scan"]').dispatch_event("click")
        pixels = reader.pixels("canvas.big")[..., :3]
        assert (pixels == [0, 255, 0]).all()
    finally:
        reader.context.close()


def test_the_cohort_table_sorts_filters_and_tells_what_was_not_evaluated(browser: Any, folder: Path) -> None:
    reader = Reader(browser, folder / "index.html")
    page = reader.page

    def rows() -> list[str]:
        return page.locator("#cases tbody tr:visible th").all_inner_texts()

    try:
        assert len(rows()) == 6
        page.click('[data-column="case"]')
        assert rows() == sorted(rows())
        page.click('[data-column="case"]')
        assert rows() == sorted(rows(), reverse=True)
        page.locator("#find").fill("white matter")
        assert len(rows()) == 2
        page.locator("#find").fill("")
        page.select_option("#of-kind", "unmeasured")
        assert set(rows()) == {HOSTILE, "sub-01"}
        assert page.locator("#cases tbody tr:visible .tag", has_text="not evaluated").count() == len(rows())
        page.select_option("#of-kind", "alarm")
        assert "Region alarm" in page.locator("#cases tbody tr:visible").all_inner_texts()[-1] or "sub-01" in rows()
        assert page.locator(f'a[href="{"results.csv"}"]').count() == 1
        assert reader.errors == []
    finally:
        reader.context.close()


def test_on_a4_nothing_is_lost(browser: Any, folder: Path) -> None:
    """At the width of the paper no table is wider than it, with the colour bar, without controls."""
    reader = Reader(browser, report_path(folder, "sub-01"), 718)
    page = reader.ready()
    try:
        page.emulate_media(media="print")
        page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
        reader.wait_for_drawing()
        wide = page.evaluate(
            """() => [...document.querySelectorAll("table, .planes, canvas, pre, svg")]
                 .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > 720)
                 .map((e) => e.outerHTML.slice(0, 90))"""
        )
        assert wide == []
        assert page.locator("#legend-bar").is_visible()
        assert not page.locator("#tools").is_visible()
        assert page.pdf(format="A4")[:4] == b"%PDF"
    finally:
        reader.context.close()
