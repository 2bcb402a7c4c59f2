"""Switches autocast off where half precision is not exact enough.

The prompt encoders and SAM-Med3D's position terms compute under it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Context manager that disables autocast on `device`; "meta", which has no data, has none."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
