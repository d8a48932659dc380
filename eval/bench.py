"""What a policy costs: time of prefill and decoding beside plain attention, and the peak memory of a long prompt."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from namm_transfer.adapters import adapt
from namm_transfer.errors import ConfigError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.provenance import provenance
from namm_transfer.eval.runner import build_policy
from namm_transfer.files import write_atomically
from namm_transfer.layer import check_interval
from namm_transfer.memory import MemoryCache

__all__ = ["LargestTensor", "bench"]

PLAIN = "sdpa"
"""The column of the unmodified model."""


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


def bench(config: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Measure every policy of `config`, columns taking turns so that a busy moment hits them alike.

    Returns:
        provenance, settings, and by column: median seconds, ratios to plain attention, peak bytes.

    Raises:
        ConfigError: a setting is out of range, or a policy cannot be built.
    """
    _check(config)
    use_executor(config["executor"])
    policies = {column: build_policy(settings).describe() for column, settings in config["policies"].items()}
    columns = [PLAIN, *config["policies"]]
    model = _model(config, config["length"] + config["decode"])
    times: dict[str, list[tuple[float, float]]] = {column: [] for column in columns}
    turns = [(repeat, column) for repeat in range(config["repeats"] + 1) for column in columns]
    for repeat, column in track(turns, "time", console=console):
        measured = _time(model, config, column)
        if repeat:  # the first round only warms up
            times[column].append(measured)
    medians = {c: [statistics.median(values) for values in zip(*runs, strict=True)] for c, runs in times.items()}
    figures: dict[str, dict[str, Any]] = {
        column: {
            "prefill_seconds": prefill,
            "prefill_ratio": prefill / medians[PLAIN][0],
            "decode_seconds_per_token": decode,
            "decode_ratio": decode / medians[PLAIN][1],
        }
        for column, (prefill, decode) in medians.items()
    }
    if config["peak_length"]:
        spawn = multiprocessing.get_context("spawn")
        for column in track(columns, "peak memory", console=console):
            with spawn.Pool(1) as pool:  # a fresh process: the peak of one column must not hide another's
                figures[column] |= pool.apply(_peak, (dict(config), column))
    settings = {key: value for key, value in config.items() if key != "out"} | {"policies": policies}
    result = {"provenance": provenance({}, config["seed"]), "settings": settings, "figures": figures}
    if config["out"]:
        Path(config["out"]).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config["out"]), json.dumps(result, indent=2) + "\n")
    console.print(_table(figures, config))
    return result


def _check(config: Mapping[str, Any]) -> None:
    counts = ["layers", "length", "decode", "repeats", *(["peak_length"] if config["peak_length"] is not None else [])]
    for key, least in (*((count, 1) for count in counts), ("seed", 0)):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key} is {value!r}; expected an integer of at least {least}")
    check_interval(config["update_interval"])
    dtype = getattr(torch, str(config["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {config['dtype']!r}; expected a type of weights, such as 'bfloat16'")
    for column, settings in config["policies"].items():
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"policies.{column} is {settings!r}; expected settings (to leave it out: ~policies.{column})"
            )


def _model(config: Mapping[str, Any], positions: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape; time and memory do not depend on the values of the weights."""
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=config["layers"],
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model = LlamaForCausalLM(shape)
    return model.to(config["executor"]["device"], getattr(torch, config["dtype"])).eval()


def _prompt(config: Mapping[str, Any], length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(config["seed"])
    return torch.randint(0, 49152, (1, length), generator=generator).to(config["executor"]["device"])


@torch.inference_mode()
def _run(
    model: LlamaForCausalLM, config: Mapping[str, Any], column: str, length: int, decode: int
) -> tuple[float, float]:
    """Seconds of the prefill, and seconds per decoded token."""
    prompt = _prompt(config, length)

    def steps(cache: Any) -> tuple[float, float]:
        start = time.perf_counter()
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        middle = time.perf_counter()
        for _ in range(decode):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        token.cpu()
        return middle - start, (time.perf_counter() - middle) / max(decode, 1)

    if column == PLAIN:
        return steps(DynamicCache())
    chosen = build_policy(config["policies"][column])
    with adapt(model, chosen, update_interval=config["update_interval"]):
        return steps(MemoryCache(chosen, update_interval=config["update_interval"]))


def _time(model: LlamaForCausalLM, config: Mapping[str, Any], column: str) -> tuple[float, float]:
    return _run(model, config, column, config["length"], config["decode"])


def _peak(config: dict[str, Any], column: str) -> dict[str, Any]:
    """Growth of the process's resident memory during a long prefill, and the largest tensor in it."""
    use_executor(config["executor"])
    length = config["peak_length"]
    model = _model(config, length + 1)
    _run(model, config, column, 1024, 0)  # kernels and their workspaces are loaded before the measurement
    before = _resident_bytes()
    _run(model, config, column, length, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with LargestTensor() as largest:
        _run(model, config, column, length, 0)
    return {
        "peak_growth_bytes": max(0, peak - before),
        "largest_tensor": largest.shape,
        "largest_tensor_elements": largest.elements,
        "largest_tensor_from": largest.operation,
        "query_key_matrix_elements": length * length,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _table(figures: dict[str, dict[str, Any]], config: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{config['length']} tokens, {config['decode']} decoded, {config['layers']} layers, {config['dtype']}"
    )
    heads = ["policy", "prefill", "× sdpa", "decode a token", "× sdpa"]
    heads += [f"peak at {config['peak_length']}", "largest tensor"] if config["peak_length"] else []
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left")
    for column, f in figures.items():
        cells = [f"{f['prefill_seconds']:.3f} s", f"{f['prefill_ratio']:.2f}"]
        cells += [f"{f['decode_seconds_per_token'] * 1e3:.1f} ms", f"{f['decode_ratio']:.2f}"]
        if config["peak_length"]:
            cells += [f"{f['peak_growth_bytes'] / 2**20:.0f} MiB", f"{f['largest_tensor_elements']:,}"]
        table.add_row(column, *cells)
    return table
