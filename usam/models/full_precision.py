"""Where computing in half precision is not exact enough: autocast switched off.

The prompt encoders and SAM-Med3D's position terms compute under it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast on `device`; on "meta", which has shapes only, there is none."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
