"""The published implementation, replayed: vectors recorded by running it (see tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from namm_transfer import NAMM, MemoryCache
from namm_transfer.policies import LayerView, NAMMPolicy

FILE = Path(__file__).parent / "golden" / "reference_gqa.safetensors"


class Recorder(NAMMPolicy):
    """The policy under test, writing down what it saw and decided."""

    def decide(self, view: LayerView) -> Tensor:
        keep = super().decide(view)
        record = {
            "layer": view.layer,
            "embedding": self.features(view),
            "scores": self.scores(view),
            "positions": view.tokens["positions"].clone(),
            "keep": keep,
        }
        LOG.append(record)
        return keep


LOG: list[dict] = []


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FILE, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def replay(golden: tuple[dict[str, Tensor], dict[str, str]]) -> tuple[Tensor, Tensor, list[dict]]:
    """Logits [41, vocab] and stored keys [41, layers] of prefill and 40 fed tokens, and the log of decisions."""
    tensors, about = golden
    config = LlamaConfig(**{k: v for k, v in json.loads(about["config"]).items() if k != "transformers_version"})
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    model.set_attn_implementation("namm")
    namm = NAMM.from_vector(
        tensors["namm.flat"], feature_mean=tensors["namm.feature_mean"], feature_var=tensors["namm.feature_var"]
    )
    cache = MemoryCache(Recorder(namm=namm, eviction="reference"), update_interval=int(about["update_interval"]))
    LOG.clear()
    logits, lengths = [], []
    with torch.no_grad():
        for ids in [tensors["input_ids"], *tensors["generated"].view(-1, 1, 1)]:
            logits.append(model(ids, past_key_values=cache).logits[0, -1])
            lengths.append(cache.stats().retained.amax((1, 2)))
    return torch.stack(logits), torch.stack(lengths), list(LOG)


def test_logits(golden, replay) -> None:
    torch.testing.assert_close(replay[0], golden[0]["logits"], atol=1e-4, rtol=0)


def test_cache_lengths(golden, replay) -> None:
    assert torch.equal(replay[1], golden[0]["cache_len"])


def test_every_decision(golden, replay) -> None:
    tensors, about = golden
    # the reference decides layer by layer within an update; a prompt streams through a whole layer first
    order = sorted(range(len(replay[2])), key=lambda i: _time(replay[2], i))
    assert len(order) == int(about["updates"])
    for i, record in enumerate(replay[2][j] for j in order):
        prefix = f"update.{i}.layer{record['layer']}."
        torch.testing.assert_close(record["embedding"], tensors[prefix + "embedding"], atol=1e-3, rtol=1e-3)
        assert torch.equal(record["positions"].long(), tensors[prefix + "positions"])
        torch.testing.assert_close(record["scores"], tensors[prefix + "scores"], atol=1e-3, rtol=0)
        kept = torch.stack([row.nonzero().flatten() for row in record["keep"][0]])
        assert torch.equal(kept, tensors[prefix + "retained"][0])


def _time(log: list[dict], i: int) -> tuple[int, int]:
    return int(log[i]["positions"].max()), log[i]["layer"]
