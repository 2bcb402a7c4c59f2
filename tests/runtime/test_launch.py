"""How processes are found and placed: srun, torchrun, devices and what cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.toy import CPU
from usam.runtime import processes


def set_launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set the variables of a launcher, and remove those of all others."""
    for name in [*os.environ]:
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith(
            ("SLURM_", "OMPI_", "PMI_")
        ):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},  # a script of sbatch
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},  # the shell of salloc
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"},  # srun -n 1
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {},
    ],
)
def test_a_launch_of_one_process_is_one_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_launch(monkeypatch, **variables)
    assert processes.start("cpu") == CPU
    assert not dist.is_initialized()
    assert (processes.rank(), processes.world_size()) == (0, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
    ],
)
def test_several_processes_without_world_size_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_launch(monkeypatch, **variables)
    with pytest.raises(ValueError, match=r"has 2 processes, but no --world_size: .*torchrun"):
        processes.start("cpu")
    assert processes.start("cpu", num_processes=1) == CPU  # separate runs, as asked for


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: 'x' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 50}, "WORLD_SIZE: '9999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process number 2 is too high for --world_size 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "process number 0 is too high for --world_size 0"),
        ({"SLURM_PROCID": "-1", "SLURM_NTASKS": "2"}, "SLURM_PROCID: '-1' is not"),
    ],
)
def test_a_launcher_s_odd_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    set_launch(monkeypatch, **variables)
    with pytest.raises(ValueError, match=expected):
        processes.start("cpu")


def test_processes_that_cannot_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launch(monkeypatch, SLURM_PROCID="0")
    for url in ("nowhere", "gopher://a:1", "tcp://no-port"):
        with pytest.raises(ValueError, match="process 0 could not join the others"):
            processes.start("cpu", num_processes=2, dist_url=url)


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
    with pytest.raises(ValueError, match="expected auto, cuda, cuda:N, mps or cpu"):
        processes.select_device(name, 0)


def test_auto_takes_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert processes.select_device("auto", 0) == CPU
    with pytest.raises(ValueError, match="no CUDA GPU; use --device cpu"):
        processes.select_device("cuda", 0)
    with pytest.raises(ValueError, match="not available on this machine"):
        processes.select_device("mps", 0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.select_device("cuda", 0) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="process 1 .* needs GPU 1, but PyTorch finds 1 GPU;"):
        processes.select_device("cuda", 1)
