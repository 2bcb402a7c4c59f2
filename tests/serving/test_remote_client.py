"""The server as a process, driven with nnInteractive's own client."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest
from nnInteractive.inference.remote.remote_session import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)
from nnInteractive.inference.remote.serialization import pack_array

from dataset.scans.read import read_header
from tests.conftest import ROOT
from tests.helpers.command import environment
from tests.helpers.serving import Running, flags_of, random_weights, server
from tests.helpers.volume_layouts import SHAPE, SPACING, blob, stored_as

KEY = "secret"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def running(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key and two places."""
    folder = tmp_path_factory.mktemp("server")
    flags = [*flags_of(weights), "--serve_key", KEY, "--max_sessions", "2"]
    with server(folder, *flags) as found:
        yield found
    assert "Traceback" not in found.printed.read_text()


@pytest.fixture(scope="module")
def lps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A scan stored as LPS, and the array that a viewer holds of it: slices, rows, columns."""
    image, _, affine = blob(SHAPE, SPACING)
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(stored_as(image, affine, "LPS"), path)
    return path, np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)


@pytest.fixture
def client(running: Running, lps) -> Iterator[nnInteractiveRemoteInferenceSession]:
    """A client with the scan opened."""
    with nnInteractiveRemoteInferenceSession(running.url, api_key=KEY) as session:
        spacing = read_header(lps[0]).spacing[::-1]
        session.set_image(lps[1][None].astype(np.float32), {"spacing": list(spacing)})
        session.set_target_buffer(np.zeros(lps[1].shape, dtype=np.uint8))
        yield session


def predicted(path: Path, weights: Path, folder: Path, prompts: dict) -> np.ndarray:
    """The label map that --predict writes, in the viewer's order."""
    file = folder / "prompts.json"
    file.write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, str(ROOT / "u-sam.py"), "--predict", str(path), "--prompts",
               str(file), "--output_dir", str(folder / "out"), *flags_of(weights)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400)
    assert done.returncode == 0, done.stderr
    return np.asarray(nib.load(folder / "out" / "scan_seg.nii.gz").dataobj).transpose(2, 1, 0)


def test_clicks_of_the_client_give_the_label_map_of_predict(
    client, lps, weights: Path, tmp_path: Path
) -> None:
    path, array = lps
    points = [((12, 16, 20), True), ((14, 10, 26), True), ((5, 5, 5), False)]
    for place, inside in points:
        client.add_point_interaction(place, inside)
    voxels = [[*place[::-1], int(inside)] for place, inside in points]
    content = {"objects": [{"points": voxels, "centre": voxels[0][:3]}]}
    label = predicted(path, weights, tmp_path, content)
    assert label.any()
    assert client.target_buffer.shape == array.shape
    assert np.array_equal(client.target_buffer, label)


def test_every_interaction_answers_and_undo_goes_back(client) -> None:
    empty = client.target_buffer.copy()
    assert client.supports_undo
    assert client.supported_interactions == dict.fromkeys(
        ("points", "bbox2d", "bbox3d", "scribble", "lasso"), True
    )
    states = [empty]
    client.add_point_interaction([12, 16, 20], True)
    states.append(client.target_buffer.copy())
    client.add_bbox_interaction([[8, 9], [6, 20], [10, 30]], True)
    states.append(client.target_buffer.copy())
    scribble = np.zeros(empty.shape, dtype=np.uint8)
    scribble[12, 14, 15:25] = 1
    client.add_scribble_interaction(scribble, False)
    states.append(client.target_buffer.copy())
    lasso = np.ones((1, 8, 8), dtype=np.uint8)
    client.add_lasso_interaction(lasso, True, interaction_bbox=[[10, 11], [6, 14], [8, 16]])
    states.append(client.target_buffer.copy())
    assert states[1].any()
    for earlier in states[-2::-1]:
        assert client.undo()
        assert np.array_equal(client.target_buffer, earlier)
    assert not client.undo()


def test_a_mask_to_start_from_is_kept_until_a_click(client) -> None:
    start = np.zeros(client.target_buffer.shape, dtype=np.uint8)
    start[8:16, 8:20, 10:26] = 1
    client.add_initial_seg_interaction(start)
    assert np.array_equal(client.target_buffer, start)
    client.add_point_interaction([12, 16, 20], True)
    client.undo()
    assert np.array_equal(client.target_buffer, start)
    client.reset_interactions()
    assert not client.target_buffer.any()
    client.add_initial_seg_interaction(start, run_prediction=True)
    assert client._predict() is None  # nothing was queued
    client.add_point_interaction([12, 16, 20], True, run_prediction=False)
    client.set_do_autozoom(False)
    client._predict()


def test_bad_voxels_and_masks_are_one_line(client) -> None:
    before = client.target_buffer.copy()
    for call, message in (
        (lambda: client.add_point_interaction([99, 0, 0], True), "outside the scan"),
        (lambda: client.add_bbox_interaction([[3, 3], [0, 5], [0, 5]], True), "no voxel"),
        (lambda: client.add_scribble_interaction(np.zeros((2, 2, 2), np.uint8), True), "expected"),
        (lambda: client.add_initial_seg_interaction(np.zeros(before.shape, "complex64")),
         "dtype"),
        (lambda: client.set_target_buffer(np.zeros((3, 3, 3), np.uint8)), "buffer of"),
        (lambda: client.set_image(np.zeros((2, 9, 9, 9), np.int16), {"spacing": [1, 1, 1]}),
         "channels"),
        (lambda: client.set_image(np.zeros((1, 9, 9, 9), np.int16)), "spacing"),
        (lambda: client.set_image(np.zeros((1, 1, 9, 9), np.int16), {"spacing": [1, 1, 1]}),
         "single slice"),
    ):  # fmt: skip
        with pytest.raises(httpx.HTTPStatusError) as caught:
            call()
        assert caught.value.response.status_code == 400
        detail = caught.value.response.json()["detail"]
        assert message in detail
        assert "\n" not in detail


def test_wrong_keys_full_servers_and_ended_leases(running: Running, client) -> None:
    for key in ("", "wrong"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert httpx.post(f"{running.url}/claim", headers=headers).status_code == 401
    with pytest.raises(httpx.HTTPStatusError):
        nnInteractiveRemoteInferenceSession(running.url, api_key="wrong")
    with nnInteractiveRemoteInferenceSession(running.url, api_key=KEY) as second:
        with pytest.raises(ServerAtCapacityError, match="all 2 sessions of this server"):
            nnInteractiveRemoteInferenceSession(running.url, api_key=KEY)
        second._http.post("/release")
        with pytest.raises(SessionExpiredError, match="connect again"):
            second.add_point_interaction([1, 1, 1], True)
        second._http.post("/release")  # as often as one likes
    assert client.heartbeat() > 500
    assert client.lease_status()["idle_timeout_seconds"] == 600


def test_pages_of_other_sites_cannot_ask(running: Running) -> None:
    for headers in (
        {"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ):  # fmt: skip
        answer = httpx.post(f"{running.url}/claim", headers=headers)
        assert answer.status_code == 403, headers
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.options(f"{running.url}/claim").status_code == 501


PATHS = (
    "set_image", "set_target_buffer", "set_do_autozoom", "reset_interactions",
    "add_point_interaction", "add_bbox_interaction", "add_scribble_interaction",
    "add_lasso_interaction", "add_initial_seg_interaction", "predict", "undo", "nowhere",
)  # fmt: skip


def test_a_thousand_random_requests(running: Running, client, lps) -> None:
    generator = random.Random(11)
    shape = lps[1].shape
    http = httpx.Client(base_url=running.url, timeout=60, headers=dict(client._http.headers))
    numbers = [0, 1, 5, 12, 25, -1, 10**9, 1.5, 1e300, None, "x", True, [], {}]

    def coordinates() -> list:
        if generator.random() < 0.7:
            return [generator.randrange(size) for size in shape]
        return [generator.choice(numbers) for _ in range(generator.randrange(5))]

    def body() -> bytes:
        array = np.zeros(generator.choice([shape, (1, 4, 4), (2,), (1, *shape)]), np.uint8)
        array.flat[generator.randrange(array.size)] = 1
        whole = pack_array(array)
        if generator.random() < 0.3:
            return whole[: generator.randrange(len(whole))]
        return whole

    counts: dict[int, int] = {}
    for _ in range(1000):
        path = generator.choice(PATHS)
        low = [generator.randrange(size) for size in shape]
        content = {
            "coordinates": coordinates(), "include_interaction": generator.choice([True, True, 1]),
            "run_prediction": generator.random() < 0.5,
            "bbox_coords": [[a, a + generator.randrange(4)] for a in low],
            "interaction_bbox": generator.choice([None, [[a, a + 1] for a in low], "x"]),
            "shape": list(shape), "dtype": generator.choice(["uint8", "float32", "O"]),
            "do_autozoom": generator.choice([True, False, None]),
            "image_properties": {"spacing": generator.choice([[2, 1.5, 1.2], [0, 1, 1], "x"])},
        }  # fmt: skip
        if "scribble" in path or "lasso" in path or "seg" in path or path == "set_image":
            headers = {"X-Meta": json.dumps(content)} if generator.random() < 0.9 else {}
            answer = http.post(f"/{path}", content=body(), headers=headers)
        else:
            text = json.dumps(content)
            cut = generator.randrange(len(text)) if generator.random() < 0.1 else None
            answer = http.post(f"/{path}", content=text[:cut])
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (path, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()) == {"detail"}
        elif meta := answer.headers.get("X-Meta"):
            client._apply_prediction_response(answer)  # its own reading of shape and box
            assert set(json.loads(meta)) == {"ran_prediction", "bbox", "dtype", "shape"}
    http.close()
    assert counts[200] > 200 and counts[400] > 200
    assert "error" not in running.printed.read_text()
    assert "axes taken as LPS (--orientation)" in running.printed.read_text()


def test_addresses_in_use_or_without_a_key_are_one_line(running: Running, weights: Path) -> None:
    port = running.url.rpartition(":")[2]
    for address, message in (
        (port, f"127.0.0.1:{port}: in use; choose another with --serve"),
        (f"0.0.0.0:{port}", "others can reach this address; give a key with --serve_key"),
    ):
        command = [sys.executable, str(ROOT / "u-sam.py"), "--serve", address, *flags_of(weights)]
        variables = {k: v for k, v in environment().items() if k != "NN_INTERACTIVE_API_KEY"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=400)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
