"""kvpress beside us: its presses on the same model and prompt, in a process of an environment of its own.

kvpress asks for another release of transformers, so this file is also the script that its environment runs: it
imports nothing of ours, reads one JSON request a line and answers with one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import IO, Any, cast

__all__ = ["PRESSES", "Peer"]

PRESSES = {
    "sdpa": None,
    "SnapKV": "SnapKVPress",
    "ObservedAttention": "ObservedAttentionPress",
    "Knorm": "KnormPress",
    "StreamingLLM": "StreamingLLMPress",
}
"""Our column -> class of kvpress; None: the unmodified model in that environment, their reference."""


class Peer:
    """Asks the script below, run by ``python``, for measurements; only one of us computes at a time.

    Args:
        python: the interpreter of an environment with kvpress.
        config: of the bench; ``kvpress_budget`` is the fraction that the presses keep.
    """

    def __init__(self, python: str, config: Mapping[str, Any]) -> None:
        self.python = python
        self.settings = {key: config[key] for key in ("layers", "dtype", "seed", "decode", "kvpress_budget")}
        self.settings["threads"] = config["executor"]["threads"]
        self.columns = list(PRESSES)
        self._process = _Process(python, self.settings)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.end()

    def time(self, column: str, length: int) -> dict[str, float]:
        """Seconds of the prefill and of a decoded token, the fraction kept, bytes held."""
        return self._process.ask({"column": column, "length": length})

    def peak(self, column: str, length: int) -> dict[str, float]:
        """Growth of the resident memory of a fresh process."""
        process = _Process(self.python, self.settings)
        try:
            process.ask({"column": column, "length": min(length, 1024)})
            before = process.ask({"memory": "now"})["bytes"]
            process.ask({"column": column, "length": length})
            return {"growth": max(0, process.ask({"memory": "peak"})["bytes"] - before)}
        finally:
            process.end()


class _Process:
    """This file as a script, and the pipes to it."""

    def __init__(self, python: str, settings: Mapping[str, Any]) -> None:
        command = [python, "-P", __file__, json.dumps(settings)]
        self.running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        """Send a request and wait for its answer."""
        into, back = cast(IO[str], self.running.stdin), cast(IO[str], self.running.stdout)
        try:
            into.write(json.dumps(request) + "\n")
            into.flush()
            return dict(json.loads(back.readline()))
        except (OSError, ValueError) as error:
            from namm_transfer.errors import DataError

            self.end()
            raise DataError(
                f"the kvpress process ended with code {self.running.returncode} at {request}; its own words are above"
            ) from error

    def end(self) -> None:
        self.running.kill()
        self.running.wait()


def serve(settings: Mapping[str, Any]) -> None:
    """Answer requests until the input ends (runs in the environment of kvpress)."""
    from pathlib import Path

    import kvpress
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=settings["layers"],
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    torch.manual_seed(settings["seed"])
    model = LlamaForCausalLM(shape).to(getattr(torch, settings["dtype"])).eval()
    generator = torch.Generator().manual_seed(settings["seed"])

    @torch.inference_mode()
    def measure(column: str, length: int) -> dict[str, float]:
        name = PRESSES[column]
        press = None if name is None else getattr(kvpress, name)(compression_ratio=1 - settings["kvpress_budget"])
        # this press reads the attention weights, which only the eager implementation returns
        model.set_attn_implementation("eager" if column == "ObservedAttention" else "sdpa")
        prompt = torch.randint(0, 49152, (1, length), generator=generator)
        cache: Any = DynamicCache()

        def prefill() -> torch.Tensor:
            chosen: torch.Tensor = model(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            return chosen

        start = time.perf_counter()
        if press is None:
            token = prefill()
        else:
            with press(model):
                token = prefill()
        middle = time.perf_counter()
        model.set_attn_implementation("sdpa")
        for step in range(settings["decode"]):
            position = torch.tensor([[length + step]])
            token = model(token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits.argmax(-1)
        seconds = (time.perf_counter() - middle) / max(settings["decode"], 1)
        size = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        kept = cache.layers[0].keys.shape[2] / (length + settings["decode"])
        return {"prefill": middle - start, "decode": seconds, "kept": kept, "bytes": size}

    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            name = {"now": "VmRSS", "peak": "VmHWM"}[request["memory"]]
            (found,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
            answer: dict[str, float] = {"bytes": int(found.split()[1]) * 1024}
            if request["memory"] == "now":
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        else:
            answer = measure(request["column"], request["length"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
