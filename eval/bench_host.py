"""The model that is measured, and its measurements: time of prefill and decoding, peak memory, a population's cost."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from namm_transfer.adapters import adapt
from namm_transfer.errors import ConfigError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.workers import build_policy
from namm_transfer.evolution.hosts import load_host
from namm_transfer.evolution.text import load_documents
from namm_transfer.memory import MemoryCache
from namm_transfer.network import NUM_PARAMETERS
from namm_transfer.policies import NAMMPolicy, Policy, policy

__all__ = ["BenchHost", "LargestTensor", "peak"]

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""


class LargestTensor(TorchDispatchMode):
    """Watches every operation inside it, and remembers the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.shape, self.operation = 0, [0], ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Storage, not shape: an expanded view of a row allocates no matrix.
            if (
                isinstance(leaf, torch.Tensor)
                and (held := leaf.untyped_storage().nbytes() // leaf.element_size()) > self.elements
            ):
                self.elements, self.shape, self.operation = held, list(leaf.shape), str(func)
        return result


class BenchHost:
    """A causal LM, its prompt, and the policies of a configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.device = config["executor"]["device"]
        longest = max(*config["lengths"], config["peak_length"], config["population_length"]) + config["decode"] + 1
        if config["host"]:
            host = load_host(config["host"], getattr(torch, config["dtype"]))
            self.model: PreTrainedModel = host.model.to(self.device)
            text = "\n\n".join(document.text for document in load_documents("heldout"))
            ids = host.tokenizer(text, return_tensors="pt").input_ids[0]
            if len(ids) < longest:
                raise ConfigError(f"the held-out essays are {len(ids)} tokens long; the bench needs {longest}")
            self.prompt: Tensor = ids[None, :longest].to(self.device)
        else:
            shape = LlamaConfig(**SHAPE, num_hidden_layers=config["layers"], max_position_embeddings=longest)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config["seed"])
                self.model = LlamaForCausalLM(shape).to(self.device, getattr(torch, config["dtype"])).eval()
            generator = torch.Generator().manual_seed(config["seed"])
            self.prompt = torch.randint(0, shape.vocab_size, (1, longest), generator=generator).to(self.device)
        self.policies = {name: build_policy(settings) for name, settings in config["policies"].items()}

    def time(self, column: str, length: int, decode: int | None = None) -> dict[str, float]:
        """Seconds of the prefill and of a decoded token; the fraction kept and the bytes held after the prefill."""
        return self._run(self.policies.get(column), self.prompt[:, :length], decode or self.config["decode"])

    def population(self, column: str, length: int, count: int) -> dict[str, float]:
        """Seconds of the prefill of ``count`` rows: unmodified, under one NAMM, or under a NAMM for each row."""
        chosen: Policy | None = None
        if column != "sdpa":
            (namm, *_) = (p.namm for p in self.policies.values() if isinstance(p, NAMMPolicy))
            noise = torch.randn(count, NUM_PARAMETERS, generator=torch.Generator().manual_seed(self.config["seed"]))
            vectors = namm.vector + 0.01 * noise if column == "population" else None
            chosen = policy("namm", namm=namm, budget=0.5, vectors=vectors)
        return self._run(chosen, self.prompt[:, :length].expand(count, -1), 0, interval=128)

    @torch.inference_mode()
    def _run(self, chosen: Policy | None, prompt: Tensor, decode: int, interval: int | None = None) -> dict[str, float]:
        def steps(cache: Any) -> tuple[float, float]:
            self._wait()
            start = time.perf_counter()
            token = self.model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            self._wait()
            middle = time.perf_counter()
            for _ in range(decode):
                token = self.model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            self._wait()
            return middle - start, (time.perf_counter() - middle) / max(decode, 1)

        if chosen is None:
            plain: Any = DynamicCache()
            prefill, step = steps(plain)
            size = sum(x.keys.nbytes + x.values.nbytes for x in plain.layers)
            return {"prefill": prefill, "decode": step, "kept": 1.0, "bytes": size}
        interval = interval or self.config["update_interval"]
        with adapt(self.model, chosen, update_interval=interval):
            cache = MemoryCache(chosen, update_interval=interval)
            prefill, step = steps(cache)
            held = cache.stats()
        return {"prefill": prefill, "decode": step, "kept": held.kept_fraction, "bytes": held.bytes["total"]}

    def _wait(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()


def peak(config: dict[str, Any], column: str, length: int) -> dict[str, Any]:
    """Peak memory of a prefill in a process of its own: the peak of one column must not hide another's.

    Returns:
        growth: bytes, of the process's resident memory (of the device's allocated memory on a GPU) over what it was
        before; largest: the shape of the largest tensor that an operation returned.
    """
    # glibc keeps much of what is freed, by chance; larger blocks are to go back at once, so that what lives is measured
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (config, column, length))


def _peak(config: dict[str, Any], column: str, length: int) -> dict[str, Any]:
    use_executor(config["executor"])
    host = BenchHost(config)
    host.time(column, min(1024, length), 1)  # kernels and their workspaces are loaded before the measurement
    on_gpu = torch.device(host.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the model
        before = _resident("VmRSS")
    host.time(column, length, 1)
    after = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
    with LargestTensor() as largest:
        host.time(column, length, 1)
    return {"growth": max(0, after - before), "largest": largest.shape}


def _resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
