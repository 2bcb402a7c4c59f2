"""Nothing of a file runs, nothing leaves the machine, no patient's name comes out of it."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dataset import SliceStore, VolumeStore
from dataset.prepare.sources import find_source
from dataset.verify.command import main as verify
from tests.conftest import ROOT
from tests.helpers import layouts
from tests.helpers.layouts import slice_store
from tests.stress.hostile.stores import make_slices, make_volumes
from tests.stress.injector import in_a_child, wait_for
from tests.stress.runs import tiny_run
from usam.training import checkpoint
from usam.weights.checkpoint_parts import FORMAT
from usam.weights.torch_files import check_content, read_file

SOURCES = sorted(
    path for pattern in ("*.py", "usam/**/*.py", "dataset/**/*.py") for path in ROOT.glob(pattern)
)
NAME = "DOE^JANE"
NETWORK = {"urllib", "http", "socket", "requests", "ftplib", "smtplib", "ssl", "xmlrpc", "aiohttp"}
CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "imp"}
OBJECTS = {  # collectives that pickle
    *("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_object_list", "recv_object_list"),
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(path: Path) -> set[str]:
    """First parts of every module that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def is_given(call: ast.Call, name: str, value: object) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


# ------------------------------------------------------------------ what the source may do


def test_only_the_download_and_the_click_server_know_the_network() -> None:
    assert len(SOURCES) > 40
    found = {path.name for path in SOURCES if imports(path) & NETWORK}
    assert found == {"sam.py", "http_server.py"}


def test_nothing_is_unpickled_evaluated_or_run() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            where = f"{path.name}:{call.lineno}: {ast.unparse(call)[:80]}"
            assert name not in ("eval", "exec", "os.system", "os.popen", "__import__"), where
            assert name.rpartition(".")[2] not in OBJECTS, where
            assert not is_given(call, "shell", True), where
            if name == "torch.load":
                assert is_given(call, "weights_only", True), where
            if name in ("np.load", "numpy.load"):
                assert is_given(call, "allow_pickle", False), where
    used = {path.name: imports(path) & CODE for path in SOURCES}
    assert {name for name, found in used.items() if found} == {"torch_files.py"}


def test_pickle_is_imported_for_its_error_only() -> None:
    text = (ROOT / "usam" / "weights" / "torch_files.py").read_text(encoding="utf-8")
    used = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    }
    assert used == {"UnpicklingError"}


def test_torch_files_are_read_in_one_place() -> None:
    found = [path.name for path in SOURCES for name, _ in calls(path) if name == "torch.load"]
    assert found == ["torch_files.py"]


# ------------------------------------------------------------------ checkpoints


def whole_checkpoint(path: Path, num_weights: int = 300_000) -> dict:
    state = {
        "format": FORMAT, "model": {"weight": torch.arange(float(num_weights))},
        "args": {}, "data": {}, "rng": checkpoint.random_state(),
    }  # fmt: skip
    checkpoint.save(path, state)
    return state


def test_a_checkpoint_cut_at_every_64_kib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    whole_checkpoint(path)
    content = path.read_bytes()
    assert read_file(path)["format"] == FORMAT
    places = range(0, len(content), 1 << 16)
    assert len(places) > 15
    for length in places:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"last\.pth is damaged"):
            read_file(path)


def test_no_flipped_bit_of_a_weight_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    state = whole_checkpoint(path, 40)
    content = bytearray(path.read_bytes())
    start = content.index(state["model"]["weight"].numpy().tobytes())
    for place in range(8 * 160):
        content[start + place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Bad CRC-32"):
            read_file(path)
        content[start + place // 8] ^= 1 << place % 8
    assert torch.load(path, weights_only=True)["model"]["weight"].shape == (40,)  # torch sees none


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(1).expand(2**30)},
        {"a": [torch.zeros(2, device="meta")]},
        {"a": torch.zeros(3, 3).to_sparse()},
    ],
)
def test_tensors_that_are_not_plain_memory_are_refused(content: dict) -> None:
    with pytest.raises(ValueError, match="tensor"):
        check_content(content, most_bytes=1 << 26)


def test_a_list_that_holds_itself_is_refused_or_passed_but_never_hangs() -> None:
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested over"):
        check_content(deep, most_bytes=1)
    ring: list = []
    ring.append(ring)
    check_content(ring, most_bytes=1)


# ------------------------------------------------------------------ patients and the network


def named_scan(path: Path) -> Path:
    """A scan whose header has the patient's name wherever text fits, also in an extension."""
    image, _ = layouts.scan(1, 3)
    scan = nib.Nifti1Image(image, layouts.AFFINE)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        scan.header[field] = NAME.encode()
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(scan, path)
    assert NAME.encode() in unpacked(path)
    return path


def unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.endswith(".gz") else content


def write_checkpoint(path: Path) -> Path:
    """A checkpoint of the tiny network, as training leaves it."""
    torch.manual_seed(0)
    data = {
        "classes": ["background", "organ", "tumour"], "img_size": 16, "window": [-160, 240],
        "orientation": "LPS", "spacing": None, "clahe": True, "crop": 0.0, "prompt_mode": 0,
        "colors": ["#000000", "#00ff00", "#ff0000"],
    }  # fmt: skip
    flags = {"model": "u-sam", "sam_model": "vit_tiny", "img_size": 16, "prompt_mode": 0}
    checkpoint.save(path, {
        "format": FORMAT, "model": tiny_run.TinyNet(3).state_dict(), "args": flags,
        "data": data, "progress": {"epoch": 1, "step": 0, "samples": 1},
        "best": {"epoch": 0, "mean_dice": 0.5},
    })  # fmt: skip
    return path


def as_a_process(work: Callable[[], None], log: Path, connections: Path) -> int:
    """The exit code of a forked child that writes every attempt to reach a network to a file."""

    def watch(event: str, arguments: tuple) -> None:
        if event in ("socket.getaddrinfo", "urllib.Request", "socket.sendto") or (
            event == "socket.connect" and not isinstance(arguments[1], str | bytes)  # a local one
        ):
            with connections.open("a", encoding="utf-8") as file:
                file.write(f"{event} {arguments}\n")

    def child() -> None:
        sys.addaudithook(watch)
        work()

    return wait_for(in_a_child(child, log=log))


def predict(scan: Path, folder: Path) -> str:
    """What `--predict` printed; its files are in `folder`, attempts to connect in `connections`."""
    best, log = write_checkpoint(folder.with_suffix(".pth")), folder.with_suffix(".log")
    flags = ["--predict", scan, "--resume", best, "--output_dir", folder, "--overlay",
             "--probabilities", "--device", "cpu", "--amp", "off"]  # fmt: skip
    connections = folder.with_suffix(".connections")
    code = as_a_process(lambda: tiny_run.as_main(flags), log, connections)
    assert code == 0, log.read_text(encoding="utf-8")
    assert not connections.exists(), connections.read_text(encoding="utf-8")
    return log.read_text(encoding="utf-8")


def assert_nameless(folder: Path, output: str, *names: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for name in names:
        assert name not in output
        for path in files:
            assert name not in str(path.relative_to(folder))
            assert name.encode() not in unpacked(path), path.name


def test_no_patients_name_of_a_nifti_file_comes_out(tmp_path: Path) -> None:
    tiny_run.warm_up()
    output = predict(named_scan(tmp_path / "scan.nii.gz"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"scan_seg.nii.gz", "scan_seg.json", "scan_overlay.png"} <= names
    assert_nameless(tmp_path / "out", output, NAME, "DOE", "JANE")
    header = nib.load(tmp_path / "out" / "scan_seg.nii.gz").header
    assert not header.extensions
    assert not any(header[field].item() for field in ("descrip", "aux_file", "db_name"))


def test_no_dicom_tag_of_a_patient_comes_out(tmp_path: Path, shared_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    series = tmp_path / "series"
    series.mkdir()
    secrets = {"PatientName": NAME, "PatientID": "ID777888", "PatientBirthDate": "19610203",
               "InstitutionName": "CLINIC9", "ReferringPhysicianName": "QUACK^Q",
               "AccessionNumber": "ACC4711"}  # fmt: skip
    for file in sorted((shared_data / "dicom").glob("*.dcm")):
        data = pydicom.dcmread(file)
        for tag, value in secrets.items():
            setattr(data, tag, value)
        data.save_as(series / file.name)
    tiny_run.warm_up()
    output = predict(series, tmp_path / "out")
    assert_nameless(tmp_path / "out", output, "DOE", *secrets.values())


def test_errors_and_reports_of_verify_quote_no_header(tmp_path: Path, capsys) -> None:
    root = layouts.word(tmp_path / "word", {"Tr": [1, 2]})
    path = named_scan(root / "imagesTr" / "word_0001.nii.gz")
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])  # truncated, so that it is named in a line
    named_scan(root / "imagesTr" / "word_0002.nii.gz")
    assert verify([str(root), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "word_0001" in said.out
    assert "DOE" not in said.out + said.err


def test_training_and_evaluating_reach_for_no_network(tmp_path: Path) -> None:
    tiny_run.warm_up()
    store = slice_store(tmp_path / "store", train=4, **tiny_run.SMALL)
    connections, log = tmp_path / "connections", tmp_path / "log"
    best, common = tmp_path / "run" / "best.pth", ["--data_root", store, "--num_workers", "1"]
    training = [*tiny_run.FLAGS, *common, "--output_dir", best.parent, "--epochs", "1"]
    evaluation = ["--dataset", "store", "--device", "cpu", *common, "--eval", "--resume", best]
    for words in (training, [*evaluation, "--output_dir", tmp_path / "scores"]):
        code = as_a_process(lambda words=words: tiny_run.as_main(words), log, connections)
        assert code == 0, log.read_text(encoding="utf-8")
    assert not connections.exists(), connections.read_text(encoding="utf-8")


def test_an_attempt_to_connect_would_be_seen(tmp_path: Path) -> None:
    def connect() -> None:
        with contextlib.suppress(OSError), socket.socket() as place:
            place.connect(("127.0.0.1", 9))

    assert as_a_process(connect, tmp_path / "log", tmp_path / "connections") == 0
    assert "127.0.0.1" in (tmp_path / "connections").read_text(encoding="utf-8")


# ------------------------------------------------------------------ names in files


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../b", "a\0b", "..", "C:\\x", "~/x/../.."]
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    for make, kind in ((make_slices, SliceStore), (make_volumes, VolumeStore)):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        make(folder)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        index["cases"][0]["file"] = name
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match="not a plain file name"):
            kind(folder)


def test_a_users_own_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for make, kind in ((make_slices, SliceStore), (make_volumes, VolumeStore)):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        make(folder)
        shutil.move(folder / "cases", tmp_path / "elsewhere" / kind.__name__)
        (folder / "cases").symlink_to(tmp_path / "elsewhere" / kind.__name__)
        (tmp_path / "linked").unlink(missing_ok=True)
        (tmp_path / "linked").symlink_to(folder)
        image = kind(tmp_path / "linked").read(0, *([0] if kind is SliceStore else []))[0]
        assert isinstance(image, np.ndarray)
    layouts.word(tmp_path / "word", {"Tr": [1]})
    (tmp_path / "word-link").symlink_to(tmp_path / "word")
    assert len(find_source("word", tmp_path / "word-link").cases) == 1
