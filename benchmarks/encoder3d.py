"""SAM-Med3D's image encoder against the package medim's, the published computation, in float32.

    python -m benchmarks.encoder3d [--quick] [--device cuda] [--threads N] [--rounds N]

Prints a table for the README. Times come from one process in the order A B B A; peak memory above
the built network from one process for each. Wanted on 2 cores: 10x the speed, 1/4 the memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    UNMEASURED,
    PeakMemory,
    device_parser,
    machine,
    paired_seconds,
    set_up,
    spread,
)
from usam.models.sam_med3d import build_sam_med3d

SIDE = 128
GIB = 2**30


def build_encoder(name: str, blocks: int) -> nn.Module:
    """The image encoder of "ours" or "medim", its first blocks only where fewer than 12."""
    if name == "ours":
        encoder = build_sam_med3d("vit_b_ori").image_encoder
    else:
        import medim

        encoder = medim.create_model("SAM-Med3D", pretrained=False).image_encoder
    encoder.blocks = encoder.blocks[:blocks]
    return encoder.eval()


def same_weights(ours: nn.Module, peer: nn.Module) -> None:
    """Give both the same weights, positions included (they start at zero)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    peer.load_state_dict(ours.state_dict(), strict=True)


def volume_of(device: torch.device) -> Tensor:
    return torch.randn(1, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(
        device
    )


@torch.no_grad()
def compare_times(options: argparse.Namespace) -> tuple[list[tuple[float, float]], float]:
    """Seconds (ours, medim) pair by pair, and the largest difference of the two embeddings."""
    device = torch.device(options.device)
    encoders = [build_encoder(name, options.blocks) for name in ("ours", "medim")]
    same_weights(*encoders)
    ours, peer = (encoder.to(device) for encoder in encoders)
    volume = volume_of(device)
    difference = (ours(volume) - peer(volume)).abs().max().item()
    pairs = paired_seconds(
        lambda: ours(volume), lambda: peer(volume), rounds=options.rounds, device=device
    )
    return pairs, difference


@torch.no_grad()
def peak_memory(name: str, options: argparse.Namespace) -> int:
    """Bytes one forward pass takes above the built network, in this process."""
    device = torch.device(options.device)
    encoder, volume = build_encoder(name, options.blocks).to(device), volume_of(device)
    with PeakMemory(device) as peak:
        encoder(volume)
    return peak.bytes


def peak_memory_elsewhere(name: str, options: argparse.Namespace) -> int:
    """`peak_memory` in a process of its own, so that nothing freed before is used again."""
    command = [sys.executable, "-m", "benchmarks.encoder3d", "--memory_of", name]
    for flag in ("device", "threads", "blocks"):
        command += [f"--{flag}", str(getattr(options, flag))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = device_parser(__doc__)
    parser.add_argument("--blocks", type=int, default=12, help="run only the first N blocks")
    parser.add_argument("--memory_of", choices=["ours", "medim"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.rounds = 3, 1
    return options


def main() -> None:
    options = arguments()
    set_up(options)
    if options.unmeasured:
        print_table(dict.fromkeys(("ours", "medim"), (UNMEASURED, UNMEASURED)))
        return
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    memory = {name: peak_memory_elsewhere(name, options) for name in ("ours", "medim")}
    pairs, difference = compare_times(options)
    times = [list(column) for column in zip(*pairs, strict=True)]
    ratios = [theirs / ours for ours, theirs in pairs]
    print(f"{SIDE}^3, batch 1, float32, {options.blocks} of 12 blocks; {len(pairs)} pairs")
    print(machine(torch.device(options.device)))
    print(f"largest difference of the embeddings: {difference:.1e}\n")
    measured = {
        name: (spread(column), f"{memory[name] / GIB:.3f}")
        for name, column in zip(("ours", "medim"), times, strict=True)
    }
    print_table(measured)
    part = memory["ours"] / memory["medim"]
    print(f"\nmedim / ours: {spread(ratios, 1)} in time; memory ours / medim: {part:.3f}")


def print_table(measured: dict[str, tuple[str, str]]) -> None:
    """The two encoders' times and memory."""
    print("| encoder | seconds, median (range) | peak memory above the network, GiB |")
    print("| --- | --- | --- |")
    for name, (took, memory) in measured.items():
        print(f"| {name} | {took} | {memory} |")


if __name__ == "__main__":
    main()
