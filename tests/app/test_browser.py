"""The app in Debian's Chromium: a click, its map, a contrast, a box, a cancel, a killed worker."""

from __future__ import annotations

import os
import re
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.app import listen, server_of
from esegeta_monai.cli.main import main
from tests.app.running import HOSTILE, started, wait_for
from tests.output.report.test_browser import CHROMIUM, FLAGS

pytest.importorskip("starlette", reason="the extra app is not installed: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="the extra app is not installed: pip install starlette uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]
AXIAL = 'canvas.big[data-plane="0"]'


class Served:
    """The app on a socket, and a browser that has opened it."""

    def __init__(self, app: Any, page: Any, port: int) -> None:
        self.app, self.page, self.port = app, page, port
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url)))

    @property
    def views(self) -> int:
        return int(self.page.get_attribute("#a-viewer", "data-count") or 0)

    def jobs(self) -> list[Any]:
        return [job for job in self.app.worker.jobs.values() if not job.hidden]

    def wait_for_view(self, number: int) -> None:
        script = f"""() => {{ const box = document.getElementById("a-viewer"), d = box.firstElementChild?.dataset;
            return Number(box.dataset.count) >= {number} && d.ready === "yes" && (d.pending ?? "0") === "0"; }}"""
        self.page.wait_for_function(script, timeout=300_000)

    def click_voxel(self, across: float, down: float) -> None:
        """Click at a share of the axial picture, and wait for the classes of that voxel."""
        self.page.locator(AXIAL).scroll_into_view_if_needed()
        box = self.page.locator(AXIAL).bounding_box()
        self.page.eval_on_selector("#a-place", "(p) => { p.textContent = ''; }")
        self.page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
        self.page.wait_for_function("() => document.getElementById('a-place').textContent !== ''", timeout=300_000)

    def finish(self, button: str = "#a-explain") -> dict[str, Any]:
        """Press a button that starts a job, start it also if it takes long, and return its result."""
        before = set(self.app.worker.jobs)
        self.page.click(button)

        def new() -> list[Any]:
            if self.page.is_visible("#a-start"):
                self.page.click("#a-start")
            self.page.wait_for_timeout(50)
            return [j for n, j in self.app.worker.jobs.items() if n not in before and not j.hidden]

        wait_for(new)
        (job,) = new()
        self.page.wait_for_selector(f'[data-job="{job.id}"]:not([data-state="waiting"]):not([data-state="running"])')
        assert job.state == "done", job.error
        return job.result


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
    with started(tmp_path_factory.mktemp("app")) as app, playwright.sync_playwright() as driver:
        listening = listen(0)
        port = listening.getsockname()[1]
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(300_000)
        served = Served(app, page, port)
        page.goto(f"http://127.0.0.1:{port}/start?token={app.session.token}")
        served.wait_for_view(1)
        yield served
        browser.close()
        server.should_exit = True
        thread.join(20)
    patch.undo()


def test_a_click_gives_the_map_of_the_command_line(served: Served, tmp_path: Path) -> None:
    page = served.page
    page.select_option("#a-case", label="a")
    served.wait_for_view(2)
    served.click_voxel(0.6, 0.45)
    assert page.locator("#a-scores li").count() == 3
    views = served.views
    result = served.finish()
    served.wait_for_view(views + 1)
    (entry,) = result["results"]
    assert page.inner_text("#focus-title").startswith("InputXGradient")
    (place,) = re.findall(r"world=(\[.*?\])", result["command"])
    shown = page.inner_text("#a-place").split(" · ")[1].removesuffix(" mm")
    assert [float(v) for v in shown.split(", ")] == [float(v) for v in place.strip("[]").split(", ")]
    words = shlex.split(result["command"])
    assert page.locator("li[data-job] pre").first.text_content() == result["command"]
    words[words.index("--output") + 1] = str(tmp_path / "out")
    assert main([*words[1:], "--quiet"]) == 0
    ours, of_command = (np.asarray(nib.load(f / entry["map"]).dataobj) for f in (served.app.output, tmp_path / "out"))
    assert np.array_equal(ours, of_command)
    assert np.abs(ours).max() > 0


def test_why_not_that_class(served: Served) -> None:
    predicted = int(served.page.input_value("#a-class"))
    other = 2 if predicted != 2 else 1
    served.page.select_option("#a-against", value=str(other))
    views = served.views
    result = served.finish()
    served.wait_for_view(views + 1)
    assert f"others={other}" in result["command"]
    assert result["results"][0]["status"] == "ok"
    assert "against" in served.page.inner_text("#focus-title")
    served.page.select_option("#a-against", value="")


def test_a_drawn_box_changes_the_score(served: Served) -> None:
    page = served.page
    page.click("#a-draw")
    page.locator(AXIAL).scroll_into_view_if_needed()
    box = page.locator(AXIAL).bounding_box()
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.2 * box["width"], y + 0.2 * box["height"], steps=3)
    page.mouse.up()
    low, high = ([int(page.input_value(f"#a-{side}-{axis}")) for axis in "xyz"] for side in ("low", "high"))
    assert [h - l + 1 for l, h in zip(low, high)][2] == 5  # noqa: E741
    assert all(h > l for l, h in zip(low, high))  # noqa: E741
    assert page.locator(".box-drawn").count() >= 1
    views = served.views
    result = served.finish("#a-occlude")
    served.wait_for_view(views + 1)
    assert page.inner_text("#a-change").startswith("Score ")
    assert result["box"]["after"] - result["box"]["before"] == pytest.approx(result["box"]["change"])
    assert result["box"]["change"] != 0


def test_two_maps_share_the_cross_hair(served: Served) -> None:
    page = served.page
    assert page.locator("#second option").count() > 2
    page.select_option("#second", value="-1")  # an earlier question may have shown a second map
    page.wait_for_selector("#second-box", state="hidden")
    page.select_option("#second", index=1)
    page.wait_for_selector("#second-box canvas[data-state='drawn']")
    page.focus(AXIAL)
    page.keyboard.press("ArrowUp")
    page.wait_for_function(
        """(axial) => {
            const [one, two] = [axial, "canvas[data-second='0']"].map((s) => document.querySelector(s).dataset.slice);
            return one === two && document.querySelector("#a-viewer").firstElementChild.dataset.pending === "0"; }""",
        arg=AXIAL,
    )
    first, second = (page.locator(s).bounding_box() for s in (AXIAL, "canvas[data-second='0']"))
    assert second["x"] >= first["x"] + first["width"], "side by side"
    assert abs(second["width"] - first["width"]) < 3
    assert "second map" in page.inner_text("#readout")
    slice_of = page.get_attribute(AXIAL, "data-slice")
    page.locator("canvas[data-second='0']").hover()
    page.mouse.wheel(0, 100)  # the first follows the second
    page.wait_for_selector(f"{AXIAL}:not([data-slice='{slice_of}'])")
    page.select_option("#second", value="-1")
    page.wait_for_selector("#second-box", state="hidden")


def test_a_new_map_takes_the_first_place_and_the_comparison_stays(served: Served) -> None:
    page, views = served.page, served.views
    page.select_option("#second", index=2)
    page.wait_for_selector("#second-box canvas[data-state='drawn']")
    compared = page.inner_text("#pair-second")
    page.select_option("#a-method", value="VanillaBackprop")
    served.finish()
    served.wait_for_view(views + 1)
    page.wait_for_selector("#second-box canvas[data-state='drawn']")
    assert page.inner_text("#focus-title").startswith("VanillaBackprop")
    assert page.inner_text("#pair-second") == compared
    assert page.locator("#second option:checked").inner_text() in (compared, compared.replace(", ", " · "))
    page.select_option("#second", value="-1")
    page.wait_for_selector("#second-box", state="hidden")
    page.select_option("#a-method", value="InputXGradient")


def test_the_network_its_channels_and_what_flows_through_one(served: Served, tmp_path: Path) -> None:
    page = served.page
    page.select_option("#a-method", value="InputXGradient")
    page.click("#a-layers")
    page.wait_for_selector("[data-layer]")
    shown = page.locator("[data-layer]").count()
    page.check("#a-all-layers")
    assert page.locator("[data-layer]").count() > shown
    page.uncheck("#a-all-layers")
    page.locator("[data-layer]", has_text="model.0.conv").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#a-channels[data-order='activation'] .channel canvas")
    assert "Output 4 × 8 × 8 × 8" in page.inner_text("#a-layer-text")
    assert page.locator(".channel").count() == 4
    page.locator('input[name="order"][value="relevance"]').dispatch_event("click")
    page.wait_for_selector("#a-channels[data-order='relevance'] .channel")
    shares = [float(t.split("\n")[-1].removesuffix(" %")) for t in page.locator(".channel").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    page.locator(".channel").first.click()
    for button, text in (("#a-by-channel", "ConceptRelevance"), ("#a-by-unit", "LayerNeuron")):
        views = served.views
        result = served.finish(button)
        served.wait_for_view(views + 1)
        assert text in result["command"]
        words = shlex.split(result["command"])
        words[words.index("--output") + 1] = str(tmp_path / text)
        assert main([*words[1:], "--quiet"]) == 0
        name = result["results"][0]["map"]
        ours, of_command = (np.asarray(nib.load(f / name).dataobj) for f in (served.app.output, tmp_path / text))
        assert np.array_equal(ours, of_command)
        assert np.abs(ours).max() > 0


def start_long_job(served: Served) -> Any:
    page = served.page
    page.select_option("#a-method", value="SmoothGrad")
    page.click("#a-form details summary")
    page.fill('[data-parameter="n_samples"]', "20000")
    page.click("#a-form details summary")
    page.click("#a-explain")
    page.wait_for_function("() => !document.getElementById('a-confirm').hidden", timeout=300_000)
    assert re.match(r"About \d", page.inner_text("#a-costs"))
    page.click("#a-start")
    wait_for(lambda: page.wait_for_timeout(50) or any(j.state == "running" and j.done for j in served.jobs()))
    return next(j for j in served.jobs() if j.state == "running")


def test_a_job_is_cancelled(served: Served) -> None:
    job = start_long_job(served)
    served.page.click(f'[data-job="{job.id}"] button')
    served.page.wait_for_selector(f'[data-job="{job.id}"][data-state="cancelled"]')


def test_it_survives_a_killed_worker(served: Served) -> None:
    job = start_long_job(served)
    os.kill(served.app.worker.pid, signal.SIGKILL)
    served.page.wait_for_selector(f'[data-job="{job.id}"][data-state="failed"]')
    served.page.wait_for_selector("#a-notice:not([hidden])")
    assert "started again" in served.page.inner_text("#a-notice")
    served.page.select_option("#a-method", value="Saliency")
    views = served.views
    assert served.finish()["results"][0]["status"] == "ok"
    served.wait_for_view(views + 1)


def test_the_report_is_written_and_opens(served: Served) -> None:
    served.finish("#a-report")
    with served.page.context.expect_page() as opened:
        served.page.click("#a-pages a")
    report = opened.value
    report.wait_for_selector("html[data-ready='yes']")
    report.close()


def test_hostile_names_are_text_and_nothing_leaves_this_machine(served: Served) -> None:
    page = served.page
    views = served.views
    page.select_option("#a-case", label=HOSTILE)
    served.wait_for_view(views + 1)
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("#a-case option").all_inner_texts()
    assert served.hosts == {f"http://127.0.0.1:{served.port}"}
    assert served.errors == []


def test_no_socket_off_the_loopback(served: Served) -> None:
    inodes: set[str] = set()
    for pid in (os.getpid(), served.app.worker.pid):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
            except OSError:  # closed meanwhile
                continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/net/{name}").read_text(encoding="utf-8").splitlines()[1:]
    ]
    ours = [row[1].split(":")[0] for row in rows if row[9] in inodes]
    assert ours, "the server's own socket"
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert all(address in loopback for address in ours)


@pytest.mark.parametrize("width", [1280, 800])
def test_it_fits_the_window(served: Served, width: int) -> None:
    served.page.set_viewport_size({"width": width, "height": 900})
    served.page.wait_for_timeout(200)
    assert served.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_is_enough(served: Served) -> None:
    page = served.page
    page.focus(AXIAL)
    page.eval_on_selector("#a-place", "(p) => { p.textContent = ''; }")
    page.keyboard.press("ArrowUp")
    page.wait_for_function("() => document.getElementById('a-place').textContent !== ''")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas.big")]
        .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim() || e.title))
        .map((e) => e.id || e.outerHTML)"""
    )
    assert unnamed == []
