"""Worker processes: how they begin, and that they do not outlive what started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.context import BaseContext

__all__ = ["end_with_parent", "worker_context"]


def worker_context(module: str) -> BaseContext:
    """Where processes are begun that work with a module.

    They are forked from a server that has imported it, and done nothing else: the import takes seconds, and is shared
    by all of them. On systems that cannot fork each begins from nothing.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def end_with_parent() -> None:
    """Called in a worker: end it as soon as its parent is gone, or it would wait for work for ever."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
