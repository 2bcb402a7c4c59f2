"""The page of --annotate in a headless browser, and what its server refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from dataset.phantom.belly import LIVER, draw_case
from tests.helpers.described import assert_described
from tests.helpers.serving import Running, flags_of, random_weights, server

CHROMIUM = shutil.which("chromium")
KEY = "page-key-of-the-test"
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1400,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def liver(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder of two drawn scans, and a voxel of the first one's liver."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(2):
        image, mask = draw_case("test", number, seed=202307)
        affine = np.diag([1.5, 1.5, 1.5, 1.0])
        nib.save(nib.Nifti1Image(image, affine), folder / f"belly{number}.nii.gz")
        if number == 0:
            voxels = np.argwhere(mask == LIVER)
            middle = voxels.mean(axis=0)
            nearest = voxels[np.abs(voxels - middle).sum(axis=1).argmin()]
    return folder, nearest.tolist()


@pytest.fixture(scope="module")
def running(liver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    weights = random_weights(folder / "tiny.pth")
    flags = [str(liver[0]), *flags_of(weights), "--output_dir", str(folder / "out"),
             "--serve_key", KEY]  # fmt: skip
    with server(folder, *flags, run="--annotate") as found:
        yield found
    assert "Traceback" not in found.printed.read_text()


def test_the_page_is_small_and_loads_nothing_else(running: Running) -> None:
    page, script = httpx.get(running.url), httpx.get(f"{running.url}/page.js")
    assert page.status_code == script.status_code == 200
    assert len(page.content) + len(script.content) < 60_000
    for text in (page.text, script.text):
        assert "http://" not in text and "https://" not in text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_only_scans_of_the_list_are_read_and_only_with_the_key(running: Running) -> None:
    http = httpx.Client(base_url=running.url, timeout=60)
    assert http.get("/api/work").status_code == 401
    http.headers["Authorization"] = f"Bearer {KEY}"
    work = http.get("/api/work").json()
    assert [one["name"] for one in work["scans"]] == ["belly0", "belly1"]
    for name in ("../belly0", "/etc/passwd", "belly0.nii.gz", "", None, 3, ["belly0"]):
        answer = http.post("/api/open", json={"scan": name, "tab": "a-long-tab-name"})
        assert answer.status_code == 400, name
    for path in ("/../u-sam.py", "/%2e%2e/u-sam.py", "/etc/passwd", "//etc/passwd"):
        assert http.get(path).status_code == 404
    assert http.get("/api/work", headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.get("/api/work", headers={"Host": "evil.example"}).status_code == 403


def test_marks_are_checked_and_a_second_tab_is_read_only(running: Running) -> None:
    http = httpx.Client(base_url=running.url, timeout=120)
    http.headers["Authorization"] = f"Bearer {KEY}"
    first, second = ({"scan": "belly1", "tab": f"tab-number-{n}"} for n in (1, 2))
    assert not http.post("/api/open", json=first).json()["read_only"]
    assert http.post("/api/open", json=second).json()["read_only"]
    mark = {"label": 1, "voxel": [40, 40, 40], "inside": True}
    refused = http.post("/api/mark", json={**second, **mark})
    assert (refused.status_code, "read-only" in refused.json()["detail"]) == (409, True)
    assert http.post("/api/open", json={**second, "scan": "belly0"}).status_code == 409
    for change in ({"voxel": [96, 0, 0]}, {"voxel": "x"}, {"label": 7}, {"label": True},
                   {"box": [[1, 2, 3]]}, {"box": 5}):  # fmt: skip
        assert http.post("/api/mark", json={**first, **mark, **change}).status_code == 400
    for query in ("axis=3&k=0", "axis=0&k=96", "axis=-1&k=0", "axis=0", "axis=0&k=1e3"):
        assert http.get(f"/api/slice?scan=belly1&{query}").status_code == 400
    plane = http.get("/api/slice?scan=belly1&axis=2&k=40")
    assert len(plane.content) == 96 * 96 * 2
    reply = http.post("/api/mark", json={**first, **mark}).json()
    assert reply["objects"][0]["points"] == [[40, 40, 40, 1]]
    renamed = {**first, "label": 1, "name": "liver", "color": "#a65628"}
    assert http.post("/api/label", json=renamed).json()["labels"][0]["name"] == "liver"
    for name, color in (("", "#a65628"), ("a\nb", "#a65628"), ("b", "red"), (5, "#a65628")):
        wrong = {**first, "label": 1, "name": name, "color": color}
        assert http.post("/api/label", json=wrong).status_code == 400
    assert http.post("/api/state", json={**first, "state": "skipped"}).status_code == 200
    out = running.printed.parent / "out"
    assert json.loads((out / "annotation.json").read_text())["scans"] == {"belly1": "skipped"}
    assert (out / "labels" / "belly1.nii.gz").exists()
    prompts = json.loads((out / "belly1_prompts.json").read_text())
    assert prompts["objects"][0]["points"] == [[55, 55, 40, 1]]  # RAS on disk, LPS on the page
    assert_described(out, names=("belly0", "belly1"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_user_clicks_undoes_names_and_saves(running: Running, liver, tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(switch)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)

    def wait_for(script: str) -> None:
        WebDriverWait(driver, 180).until(lambda d: d.execute_script(f"return {script}"))

    def voxels() -> int:
        return driver.execute_script("return scan.objects.reduce((n, one) => n + one.voxels, 0)")

    try:
        wait_ready = "scan !== null && scan.scan === 'belly0' && !busy"
        driver.get(f"{running.url}/#key={KEY}")
        for _ in range(60):  # the tab of an earlier test still has its scan
            if driver.execute_script("return !busy && work !== null && scan === null"):
                driver.execute_script("open('belly0')")
            try:
                WebDriverWait(driver, 3).until(lambda d: d.execute_script(f"return {wait_ready}"))
                break
            except Exception:
                continue
        wait_for(wait_ready)
        assert "key" not in driver.current_url
        i, j, k = liver[1]
        place = [95 - i, 95 - j, k]  # RAS on disk, LPS on the page
        driver.execute_script(f"goTo([{place[0]}, {place[1]}, {place[2]}])")
        wait_for("plane('image', 2, view.place[2]) !== null")
        x, y = driver.execute_script(
            "const [x, y] = toCanvas(2, view.place), c = canvases[2];"
            "return [x / c.width * c.clientWidth - c.clientWidth / 2,"
            " y / c.height * c.clientHeight - c.clientHeight / 2]"
        )
        canvas = driver.find_element("css selector", "canvas[data-axis='2']")
        ActionChains(driver).move_to_element_with_offset(
            canvas, round(x), round(y)
        ).click().perform()
        wait_for("!busy && scan.objects.length === 1 && scan.objects[0].marks === 1")
        assert driver.execute_script("return scan.objects[0].points[0].slice(0, 3)") == place
        found = voxels()
        assert found > 0
        wait_for("(plane('label', 2, view.place[2]) || []).some((one) => one === 1)")
        driver.save_screenshot(str(tmp_path / "clicked.png"))
        canvas.send_keys("z")
        wait_for("!busy && scan.objects[0].marks === 0")
        assert voxels() == 0
        canvas.send_keys(Keys.ENTER)
        wait_for("!busy && scan.objects[0].marks === 1")
        assert voxels() == found
        name = driver.find_element("css selector", "#objects input[type=text]")
        name.send_keys(Keys.CONTROL, "a")
        name.send_keys("right lobe", Keys.ENTER)
        wait_for("!busy && work.labels[0].name === 'right lobe'")
        canvas.click()
        wait_for("!busy && scan.objects[0].marks === 2")
        canvas.send_keys("z")
        wait_for("!busy && scan.objects[0].marks === 1")
        canvas.send_keys("s")
        wait_for("document.getElementById('status').textContent.includes('labels/belly0')")
        out = running.printed.parent / "out"
        saved, image = (nib.load(path) for path in (out / "labels" / "belly0.nii.gz",
                                                    liver[0] / "belly0.nii.gz"))  # fmt: skip
        assert np.array_equal(saved.affine, image.affine)
        assert saved.shape == image.shape
        assert np.count_nonzero(np.asarray(saved.dataobj) == 1) == found
        driver.refresh()
        wait_for("scan !== null && scan.scan === 'belly0' && !busy")
        assert voxels() == found
        assert not driver.execute_script("return scan.read_only")
        severe = [one for one in driver.get_log("browser") if one["level"] == "SEVERE"]
        other = [
            one for one in severe if not re.search(r"favicon|/api/open .* 409", one["message"])
        ]
        assert not other
    finally:
        driver.quit()
