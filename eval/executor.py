"""Where a command runs: its device and its threads, checked before hours go into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from namm_transfer.errors import ConfigError

__all__ = ["check_device", "use_executor"]


def check_device(device: Any) -> None:
    """Try a device.

    Raises:
        ConfigError: it is no device, or not one of this machine.
    """
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # builds of torch differ in what they raise
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device is {device!r}; expected one of this machine, such as 'cpu' ({fault})") from error


def use_executor(executor: Mapping[str, Any]) -> None:
    """Check the settings `device` and `threads` (None: what torch chooses), and let torch have the threads.

    Raises:
        ConfigError: no such device, or threads is neither None nor an integer of at least 1.
    """
    check_device(executor.get("device", "cpu"))
    threads = executor.get("threads")
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads is {threads!r}; expected an integer of at least 1, or null")
    torch.set_num_threads(threads)
