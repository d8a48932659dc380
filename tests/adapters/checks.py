"""The invariants of a decoder under a memory, each as a function that returns the largest difference it found.

Shape legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from namm_transfer import NAMM, adapt, policy
from namm_transfer.network import NUM_PARAMETERS
from namm_transfer.policies import Policy

INTERVAL = 32
STEPS = 24
"""Decoding steps; the prompts are such that a decision falls among them."""
TOLERANCE = 1e-5
Inputs = dict[str, Tensor]

KEEPERS: dict[str, Policy] = {
    "full": policy("full"),
    "namm": policy("namm", namm=NAMM.from_vector(torch.zeros(NUM_PARAMETERS))),  # watches, decides, scores all 0: keeps
}


def evictor(name: str = "namm", budget: float = 0.3) -> Policy:
    """A policy that keeps the given fraction, the NAMM with random weights."""
    if name != "namm":
        return policy(name, budget=budget)
    vector = torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(3)) * 0.3
    return policy("namm", namm=NAMM.from_vector(vector), budget=budget)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite if a value is NaN."""
    return float((a - b).abs().max().nan_to_num(nan=float("inf")))


def greedy(call: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Generate :data:`STEPS` tokens. Returns the tokens [B, STEPS] and their logits [B, STEPS, V]."""
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1} | options
    out = call(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def nothing_evicted(model: PreTrainedModel, inputs: Inputs) -> float:
    """Prefill and greedy decoding equal the unmodified model's under every policy that keeps everything."""
    logits = model(**inputs).logits
    tokens, step_logits = greedy(model.generate, inputs)
    worst = 0.0
    for name, keep in KEEPERS.items():
        with adapt(model, keep, INTERVAL) as host:
            worst = max(worst, distance(host(**inputs).logits, logits))
            ours, our_logits = greedy(host.generate, inputs)
            worst = max(worst, distance(our_logits, step_logits))
            assert torch.equal(ours, tokens), f"{name}: other tokens were generated"
            stats = host.stats()
        assert stats.kept_fraction == 1.0
        decisions = (inputs["input_ids"].shape[1] + STEPS - 1) // INTERVAL
        assert stats.updates == (decisions if keep.evicts else 0)
    return worst


def splits(model: PreTrainedModel, inputs: Inputs, keep: Policy, cuts: Iterable[Sequence[int]]) -> float:
    """A prompt in pieces of the given sizes gives the logits of the prompt in one piece; pixels go with the first."""
    ids, worst = inputs["input_ids"], 0.0
    with adapt(model, keep, INTERVAL) as host:
        whole = host(**inputs).logits
        kept = host.stats().retained
        for sizes in cuts:
            assert sum(sizes) == ids.shape[1]
            cache, pieces, done = host.new_cache(), [], 0
            for i, size in enumerate(sizes):
                piece = {"input_ids": ids[:, done : done + size]}
                if i == 0:
                    piece = {k: v[:, :size] if v.shape == ids.shape else v for k, v in inputs.items()}
                pieces.append(host(**piece, past_key_values=cache).logits)
                done += size
            worst = max(worst, distance(torch.cat(pieces, dim=1), whole))
            assert torch.equal(cache.stats().retained, kept)
    return worst


def left_padding(
    model: PreTrainedModel,
    rows: Sequence[Inputs],
    together: Inputs,
    keep: Policy,
    positions: Callable[[Tensor], Inputs] = lambda mask: {},
) -> float:
    """A left-padded batch gives every row what it gets alone: prefill, decoding, what is retained.

    Args:
        rows: the rows alone.
        together: the same rows as a batch, with attention_mask.
        positions: makes the position ids that a forward call must be told.
    """
    worst = 0.0
    with adapt(model, keep, INTERVAL) as host:
        logits = host(**together, **positions(together["attention_mask"])).logits
        tokens, step_logits = greedy(host.generate, together)
        retained = host.stats().retained
        for i, row in enumerate(rows):
            size = row["input_ids"].shape[1]
            alone = host(**row, **positions(torch.ones_like(row["input_ids"]))).logits
            worst = max(worst, distance(logits[i, -size:], alone[0]))
            ours, our_logits = greedy(host.generate, row)
            worst = max(worst, distance(our_logits[0], step_logits[i]))
            assert torch.equal(ours[0], tokens[i]), f"row {i}: other tokens in the batch than alone"
            assert torch.equal(host.stats().retained[:, 0], retained[:, i])
    return worst


def beams(model: PreTrainedModel, inputs: Inputs) -> None:
    """Beam search with everything kept finds the unmodified model's sequence."""
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    settings = {"num_beams": 3, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    with adapt(model, KEEPERS["namm"], INTERVAL) as host:
        assert torch.equal(host.generate(**inputs, **settings), expected)
        assert host.stats().kept_fraction == 1.0


def evicts_everywhere(model: PreTrainedModel, inputs: Inputs, layers: int) -> float:
    """Under a budget every head of every layer drops tokens, the stats say how many, and the output changes.

    Returns:
        The largest change of the logits.
    """
    length = inputs["input_ids"].shape[1]
    last = length // INTERVAL * INTERVAL
    expected = round(0.3 * last) + length - last
    with adapt(model, KEEPERS["full"], INTERVAL) as host:
        full = host(**inputs).logits
    with adapt(model, evictor(), INTERVAL) as host:
        logits = host(**inputs).logits
        stats = host.stats()
    assert stats.seen == [length] * len(inputs["input_ids"])
    assert stats.retained.shape[:2] == (layers, len(inputs["input_ids"]))
    assert (stats.retained == expected).all()
    assert stats.kept_fraction == expected / length
    assert stats.updates == length // INTERVAL
    change = distance(logits[:, INTERVAL:], full[:, INTERVAL:])
    assert change > 1e-3, "tokens were evicted, but the output is the same"
    return change


def implementations(model: PreTrainedModel) -> dict[int, str]:
    """The attention implementation of every config that a part of the model holds, by the config's id."""
    found: dict[int, str] = {}

    def visit(config: PreTrainedConfig) -> None:
        found[id(config)] = config._attn_implementation
        for name in config.sub_configs:
            if getattr(config, name, None) is not None:
                visit(getattr(config, name))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return found


def restored(model: PreTrainedModel, inputs: Inputs) -> None:
    """Only the text decoder runs the namm attention, and nothing of it is left on exit, whatever happened inside."""
    before, decoder = implementations(model), id(model.get_decoder().config)
    assert "namm" not in before.values()
    logits = model(**inputs).logits
    with adapt(model, evictor(), INTERVAL) as host:
        assert implementations(model) == before | {decoder: "namm"}
        host(**inputs)
    assert implementations(model) == before
    try:
        with adapt(model, evictor(), INTERVAL) as host:
            host(**{**inputs, "input_ids": inputs["input_ids"] + 10**6})  # fails inside the model
    except (IndexError, ValueError):
        pass
    else:
        raise AssertionError("the call should have failed")
    assert implementations(model) == before
    assert torch.equal(model(**inputs).logits, logits)
