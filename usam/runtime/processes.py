"""The processes of a run and the device of each: start, communication, checks that all agree.

Every function also works in a run of one process, without a process group.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset.text import counted, printable

TIMEOUT = timedelta(minutes=30)  # packing a data set on rank 0 is the longest wait
LAUNCH = "or launch with: torchrun --nproc_per_node=N u-sam.py ..."


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints, writes files and downloads."""
    return rank() == 0


def say(text: str) -> None:
    """Print on the main process, with control characters escaped."""
    if is_main():
        print(printable(text, keep="\n\t"), flush=True)


def start(
    device: str, *, num_processes: int | None = None, dist_url: str = "env://"
) -> torch.device:
    """Join the other processes, if there are any, and return the device of this one.

    torchrun and `torch.distributed.launch --use_env` are recognised by the variables they set;
    otherwise it is one process unless `num_processes` is larger. Then srun numbers the processes,
    and `dist_url` is where they meet (tcp://host:port or file:///path).
    Raises ValueError for a missing device and for launches that cannot work, among them several
    processes of srun or mpirun without `num_processes`, which would all do the same work.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        number, num_processes = _environment("RANK"), _environment("WORLD_SIZE")
        local_rank = _environment("LOCAL_RANK", 0)
        dist_url = "env://"
    elif num_processes is not None and num_processes > 1:
        if "SLURM_PROCID" not in os.environ or dist_url == "env://":
            raise ValueError(
                f"--world_size {num_processes} without torchrun needs srun and --dist_url "
                f"tcp://HOST:PORT; {LAUNCH}"
            )
        number = _environment("SLURM_PROCID")
        local_rank = _environment("SLURM_LOCALID", 0)
    else:
        if num_processes is None and (launched := launched_processes()) > 1:
            raise ValueError(
                f"this launch has {counted(launched, 'process', 'processes')}, but no --world_size:"
                f" give --world_size {launched} --dist_url tcp://HOST:PORT, {LAUNCH}; separate "
                "runs need --world_size 1 and an --output_dir each"
            )
        return select_device(device, 0)
    if not 0 <= number < num_processes:
        raise ValueError(f"process number {number} is too high for --world_size {num_processes}")
    if num_processes > 1 and device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} would put all processes of a machine on one GPU; --device cuda "
            "gives each its own"
        )
    chosen = select_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            init_method=dist_url,
            rank=number,
            world_size=num_processes,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"process {number} could not join the others ({cause})") from error
    return chosen


def launched_processes() -> int:
    """How many processes srun or mpirun started of this program, as far as they say.

    A script under plain sbatch is one process, whatever --ntasks the job has: it has no step.
    """
    if "SLURM_PROCID" in os.environ:
        tasks = _environment("SLURM_STEP_NUM_TASKS", 0) or _environment("SLURM_NTASKS", 1)
        in_step = any(
            name in os.environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID")
        )
        return tasks if in_step or _environment("SLURM_PROCID") > 0 else 1
    return max(_environment(name, 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def _environment(name: str, default: int | None = None) -> int:
    """An environment variable as a whole number; ValueError if it is not one."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"environment variable {name}: {text[:40]!r} is not a whole number")
    return int(text)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`; "auto" prefers CUDA, then Apple's MPS, then the CPU.

    Raises ValueError for another name, for CUDA or MPS where it is missing, and for too few GPUs.
    """
    if not re.fullmatch(r"auto|cuda(:\d{1,6})?|mps|cpu", name, re.ASCII):
        raise ValueError(f"--device {name[:40]}: expected auto, cuda, cuda:N, mps or cpu")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA GPU; use --device cpu")
        index = int(name.partition(":")[2] or local_rank)
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine needs GPU {index}, but PyTorch finds "
                f"{counted(torch.cuda.device_count(), 'GPU')}; start fewer processes per machine"
            )
        return torch.device("cuda", index)
    if name == "mps" and not has_mps:
        raise ValueError("--device mps: not available on this machine; use --device cpu")
    return torch.device(name)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body on rank 0, then on the others: for packing data and downloading weights."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and world_size() > 1:
        dist.barrier()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over the processes; itself in a run of one process.

    Every trained parameter has a gradient in every step, so unused ones need not be searched for.
    BatchNorm statistics stay with their process until `broadcast_buffers`, as in the published
    code.
    """
    if world_size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Every process would print them: one of 1x1 convolutions, one of an argument's new name.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="`?broadcast_buffers`? is deprecated")
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, on all of them."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """`tensor` of every process (world_size, *shape), on all of them, in the order of ranks."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def gather_texts(text: str) -> list[str]:
    """`text` of every process, in the order of ranks, on all of them; sent as bytes."""
    own = torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
    sizes = gather(torch.tensor(len(own))).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = own
    received = gather(padded)
    return [
        part[:size].numpy().tobytes().decode("utf-8", "surrogateescape")
        for part, size in zip(received, sizes, strict=True)
    ]


def from_main(ask: Callable[[], int]) -> int:
    """The number that `ask` returns on the main process, sent to all others."""
    answer = torch.tensor(ask() if is_main() else 0)
    if dist.is_initialized():
        dist.broadcast(answer, src=0)
    return int(answer)


def check_same(text: str, what: str) -> None:
    """Raise ValueError on every process unless all of them have the same `text`."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    numbers = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    if any(not torch.equal(other, numbers) for other in gather(numbers)):
        raise ValueError(f"{what} differ between processes; do all of them see the same files?")


@torch.no_grad()
def check_same_weights(model: nn.Module, epoch: int) -> None:
    """Raise ValueError on every process unless all have the same weights, to the last bit."""
    if world_size() == 1:
        return
    found = gather(torch.stack([fingerprint(tensor) for tensor in model.state_dict().values()]))
    if any(not torch.equal(other, found[0]) for other in found):
        raise ValueError(f"weights differ between processes after epoch {epoch}: this is a bug")


def fingerprint(tensor: Tensor) -> Tensor:
    """A checksum of a tensor's bits: an int64 scalar on its device."""
    bits = tensor.contiguous().view(-1).view(torch.uint8)
    if tensor.element_size() % 4 == 0:
        bits = bits.view(torch.int32)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd: each bit counts
    return (bits * places).sum()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's BatchNorm statistics, so that all evaluate and save the same."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
