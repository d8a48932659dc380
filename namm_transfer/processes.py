"""Worker processes: how they begin, and that they do not outlive what started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Mapping
from multiprocessing.context import BaseContext

__all__ = ["begin", "worker_context"]


_IMPORTED = ("torch", "transformers.modeling_utils")
"""What takes seconds to import. Nothing of ours: the server does not look for modules where its parent does, and in a
checkout it would find the folder `namm_transfer` there instead of the installed package."""


def worker_context() -> BaseContext:
    """Where worker processes are begun.

    They are forked from a server that has imported what all of them need, and done nothing else. On systems that cannot
    fork each begins from nothing.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def begin(environment: Mapping[str, str]) -> None:
    """Called in a worker before anything else.

    It ends as soon as its parent is gone, or it would wait for work for ever.

    Args:
        environment: of the parent; the server's is what the parent's was when its first worker began.
    """
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
