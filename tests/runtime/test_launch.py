"""How processes are found and placed: srun, torchrun, devices and what cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.toy import CPU
from usam.runtime import processes


def test_a_slurm_job_of_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    assert processes.start("cpu") == CPU
    assert not dist.is_initialized()
    assert (processes.rank(), processes.world_size()) == (0, 1)


def test_world_size_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"--world_size 4 .* srun and --dist_url"):
        processes.start("cpu", num_processes=4)


def test_world_size_and_dist_url_join_what_srun_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    asked = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **how: asked.update(how))
    url = f"file://{tmp_path}/meet"
    assert processes.start("cpu", num_processes=2, dist_url=url) == CPU
    assert (asked["rank"], asked["world_size"], asked["init_method"]) == (1, 2, url)


def test_one_gpu_for_all_processes_of_a_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="--device cuda:0 would put all processes of a machine on one"
    ):
        processes.start("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "cuda:one", "cuda:-1", "cpu:0", ""])
def test_devices_by_another_name_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="wanted auto, cuda, cuda:N, mps or cpu"):
        processes.select_device(name, 0)


def test_auto_takes_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert processes.select_device("auto", 0) == CPU
    with pytest.raises(ValueError, match="no CUDA GPU; use --device cpu"):
        processes.select_device("cuda", 0)
    with pytest.raises(ValueError, match="this machine has none"):
        processes.select_device("mps", 0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.select_device("cuda", 0) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="process 1 wants GPU 1, but there are 1"):
        processes.select_device("cuda", 1)
