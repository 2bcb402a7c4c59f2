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

TIMEOUT = timedelta(minutes=30)  # packing a data set on rank 0 is the longest wait


def rank() -> int:
    """This process's number among all of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, writes files and downloads."""
    return rank() == 0


def say(text: str) -> None:
    """Print on the main process."""
    if is_main():
        print(text, flush=True)


def start(device: str, *, num_processes: int = 1, dist_url: str = "env://") -> torch.device:
    """The device this process computes on, after it joined the others where there are any.

    torchrun and `torch.distributed.launch --use_env` are recognised by the variables they set.
    Anything else is one process unless `num_processes` asks for more; then `dist_url` is where the
    processes meet (tcp://host:port or file:///path) and srun gives each its rank.
    Raises ValueError for a device that is not there or a launch that cannot work.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        number, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        dist_url = "env://"
    elif num_processes > 1:
        if "SLURM_PROCID" not in os.environ or dist_url == "env://":
            raise ValueError(
                f"--world_size {num_processes} without torchrun needs srun and --dist_url "
                "tcp://HOST:PORT; or launch with: torchrun --nproc_per_node=N u-sam.py ..."
            )
        number = int(os.environ["SLURM_PROCID"])
        local_rank = int(os.environ.get("SLURM_LOCALID", 0))
    else:
        return select_device(device, 0)
    if num_processes > 1 and device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} would put all processes of a machine on one GPU; --device cuda "
            "gives each its own"
        )
    chosen = select_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        init_method=dist_url,
        rank=number,
        world_size=num_processes,
        timeout=TIMEOUT,
    )
    return chosen


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`; "auto" prefers CUDA, then Apple's MPS, then the CPU.

    Raises ValueError if CUDA or MPS is asked for and absent, there are too few GPUs, or for
    another name.
    """
    if not re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", name):
        raise ValueError(f"--device {name}: wanted auto, cuda, cuda:N, mps or cpu")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu")
        index = int(name.partition(":")[2] or local_rank)
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} wants GPU {index}, but there are "
                f"{torch.cuda.device_count()}; start fewer processes a machine"
            )
        return torch.device("cuda", index)
    if name == "mps" and not has_mps:
        raise ValueError("--device mps: this machine has none; use --device cpu")
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
    """`model` with gradients averaged over the processes; itself where there is one.

    Every trained parameter has a gradient in every step, so none is searched for. BatchNorm
    statistics stay with their process until `broadcast_buffers`, as in the published code.
    """
    if world_size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Said by every process: of one 1x1 convolution, and of an argument's name in newer torch.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="`?broadcast_buffers`? is deprecated")
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, on all of them; itself where there is one."""
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
    """`text` of every process, in order of rank, on all of them; sent as bytes."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = gather(torch.tensor(len(own))).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = own
    received = gather(padded)
    return [
        part[:size].numpy().tobytes().decode() for part, size in zip(received, sizes, strict=True)
    ]


def from_main(ask: Callable[[], int]) -> int:
    """What `ask` gives on the main process, on all of them; the others do not ask."""
    answer = torch.tensor(ask() if is_main() else 0)
    if dist.is_initialized():
        dist.broadcast(answer, src=0)
    return int(answer)


def check_same(text: str, what: str) -> None:
    """Raise ValueError on every process unless all of them have the same `text`."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    numbers = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    if any(not torch.equal(other, numbers) for other in gather(numbers)):
        raise ValueError(f"{what} are not the same on all processes; do all see the same files?")


@torch.no_grad()
def check_same_weights(model: nn.Module, epoch: int) -> None:
    """Raise ValueError on every process unless all have the same weights, to the last bit."""
    if world_size() == 1:
        return
    found = gather(torch.stack([fingerprint(tensor) for tensor in model.state_dict().values()]))
    if any(not torch.equal(other, found[0]) for other in found):
        raise ValueError(f"weights differ between processes after epoch {epoch}: this is a defect")


def fingerprint(tensor: Tensor) -> Tensor:
    """A number (int64 scalar, on the tensor's device) that tells apart tensors of other bits."""
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
