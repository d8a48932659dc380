"""Readings with a gradient: what the answers gain or lose when the scores of a decision change, or needed of it.

Eviction is a step function of the scores, so its derivative says nothing. Here a token's place in the memory is a gate
on its attention weight. Forward the gate is 1 or 0, exactly as the policy decides, so that the likelihoods are those of
an ordinary reading; backward it is a sigmoid of the distance to the threshold (a straight-through estimator: Bengio et
al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).

Only the last decision before the answers is relaxed. All before it is read as ever, once and without a gradient, and
the few tokens behind it are all that is differentiated.

Shape legend: C conditions read as rows, L layers, H query heads, K KV heads, N tokens before the decision, t tokens
behind it, D head width, F = 25 features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from namm_transfer.attention import AttentionOptions, Memory, expecting
from namm_transfer.errors import UnsupportedModelError
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.population import Condition
from namm_transfer.masks import AttentionMask
from namm_transfer.memory import MemoryCache
from namm_transfer.network import NAMM, scores, unflatten
from namm_transfer.policies import NAMMPolicy
from namm_transfer.scoring import LayerView

__all__ = ["Foresight", "RelaxedReading", "foresee", "read_relaxed"]

_LEAST = 1e-8


@dataclass(frozen=True)
class RelaxedReading:
    """What a NAMM's last decision made of the answers behind it.

    Attributes:
        difference: [C] mean log-likelihood minus the full cache's from the same decision on, in nats a token.
        kept: [C] fraction of the tokens kept.
        gradient: [4172] of the sum over conditions of the former, less the price of what was kept by threshold.
    """

    difference: Tensor
    kept: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Foresight:
    """What some heads could have known at a decision, and what they needed afterwards.

    Attributes:
        features: [J, N, 25] float16 the network's input for each of J heads.
        needed: [J, N] float16 the highest attention that each token got from any query behind the decision.
        weight: [J] float32 how much the answers depend on a head's memory (the sum of the magnitudes of their
            log-likelihood's derivatives by its gates); 1 on average over all heads.
    """

    features: Tensor
    needed: Tensor
    weight: Tensor


@dataclass
class _Decision:
    """What there was to decide on: [L, K, N, ...], padded behind the `lengths` [L, K] of each head."""

    seen: int
    features: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor

    def valid(self) -> Tensor:
        """[L, K, N] bool: the place holds a token."""
        return torch.arange(self.keys.shape[2], device=self.keys.device) < self.lengths.unsqueeze(-1)


def read_relaxed(
    model: PreTrainedModel,
    sample: Sample,
    condition: Condition,
    namm: NAMM,
    budgets: Sequence[float | None],
    price: float,
) -> RelaxedReading | None:
    """Read a sample up to the last decision before half of its answers, relax that one, and differentiate.

    Args:
        model: a frozen causal LM whose attention is `"namm"`.
        sample: what to read.
        condition: of the reading up to the decision.
        namm: whose decision it is.
        budgets: of the decision, each a row of one batch; None: by threshold.
        price: nats that keeping everything by threshold costs, as in `fitness.utilities`.

    Returns:
        None if the sample has no decision before half of its answers.

    Raises:
        UnsupportedModelError: the model's attention is more than a softmax under a causal mask.
    """
    seen = _last_decision(sample, condition.update_interval)
    if not seen:
        return None
    decision = _decision(model, sample, condition, namm, seen)
    vector = nn.Parameter(namm.to_vector().to(decision.features.device))
    found = scores(unflatten(vector.unsqueeze(0)), decision.features, decision.lengths)
    gates, kept = zip(*(_gates(found, decision, budget) for budget in budgets), strict=True)
    with torch.no_grad():
        full = _answers(model, sample, _GatedCache(decision, decision.valid().float().unsqueeze(0)))
    difference = _answers(model, sample, _GatedCache(decision, torch.stack(gates))) - full
    paid = sum(part**2 for part, budget in zip(kept, budgets, strict=True) if budget is None)
    (difference.sum() - price * paid).backward()
    gradient = torch.zeros_like(vector) if vector.grad is None else vector.grad
    return RelaxedReading(difference.detach().double().cpu(), torch.stack(kept).detach().double().cpu(), gradient.cpu())


def foresee(
    model: PreTrainedModel, sample: Sample, update_interval: int, namm: NAMM, heads: int, rng: np.random.Generator
) -> Foresight | None:
    """Read a sample with nothing evicted, and note what its answers needed of the tokens before them.

    Args:
        model: a frozen causal LM whose attention is `"namm"`.
        sample: what to read.
        update_interval: tokens between two decisions; the one looked at is the last before half of the answers.
        namm: gives the feature normaliser.
        heads: how many of the model's KV heads to note.
        rng: draws them.

    Returns:
        None if the sample has no decision before half of its answers.

    Raises:
        UnsupportedModelError: the model's attention is more than a softmax under a causal mask.
    """
    seen = _last_decision(sample, update_interval)
    if not seen:
        return None
    decision = _decision(model, sample, Condition(None, seen), namm, seen)  # the first and only one
    gates = decision.valid().float().unsqueeze(0).requires_grad_()
    cache = _GatedCache(decision, gates)
    _answers(model, sample, cache).sum().backward()
    effect = torch.zeros_like(gates[0]) if gates.grad is None else gates.grad[0].abs()
    weight = effect.sum(-1).flatten()
    needed = torch.stack(cache.highest).flatten(0, 1)
    chosen = torch.from_numpy(rng.permutation(len(weight))[:heads])
    return Foresight(
        decision.features.flatten(0, 1)[chosen].half().cpu(),
        needed[chosen].half().cpu(),
        (weight / weight.mean().clamp_min(_LEAST))[chosen].cpu(),
    )


def _last_decision(sample: Sample, interval: int) -> int:
    """Tokens seen at the last decision before half of the answers; 0 if there is none."""
    return (int(sample.targets[len(sample.targets) // 2]) - 1) // interval * interval


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(NAMMPolicy):
    """Decides as its NAMM does, but keeps everything at one decision, and notes there what there was to decide on."""

    seen: int
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def decide(self, view: LayerView) -> Tensor:
        if view.seen != self.seen:
            return super().decide(view)
        tokens = view.tokens
        self.found.append((self.features(view), tokens["keys"].clone(), tokens["values"].clone(), tokens.lengths))
        return view.valid()


def _decision(model: PreTrainedModel, sample: Sample, condition: Condition, namm: NAMM, seen: int) -> _Decision:
    recorder = _Recorder(namm=namm, budget=condition.budget, seen=seen)
    cache = MemoryCache(recorder, update_interval=condition.update_interval)
    with torch.no_grad():
        ids = sample.input_ids[None, :seen].to(model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    features, keys, values, lengths = zip(*recorder.found, strict=True)
    width = max(part.shape[2] for part in keys)

    def padded(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, width - part.shape[2])) for part in parts])

    return _Decision(seen, padded(features), padded(keys), padded(values), torch.cat(lengths))


def _gates(found: Tensor, decision: _Decision, budget: float | None) -> tuple[Tensor, Tensor]:
    """Gates [L, K, N] from scores, and the fraction that is kept: values as decided, gradients as of the sigmoid.

    What changes no decision has no gradient either. Distances are in standard deviations of the scores (of a head, by
    rank; of all, by threshold), so that their scale has none; by rank, the edge moves with the scores around it, so
    that as many gates close as open.
    """
    valid, lengths = decision.valid(), decision.lengths.unsqueeze(-1)
    newest = torch.arange(found.shape[-1], device=found.device) == lengths - 1
    deviation = torch.where(valid, found - torch.where(valid, found, 0.0).sum(-1, keepdim=True) / lengths, 0.0)
    variance = deviation.square().sum(-1, keepdim=True) / lengths
    ranked = found.detach().masked_fill(~valid, -math.inf).masked_fill(newest, math.inf)
    if budget is None:
        hard, distance = ranked >= 0, found / (variance.mean() + _LEAST).sqrt()
    else:
        allowance = min(max(1, round(budget * decision.seen)), found.shape[-1])
        last = ranked.topk(allowance, dim=-1).values[..., -1:]  # minus infinity where a head has fewer
        hard = (ranked >= last) & valid
        edge = torch.where(last.isfinite(), last, found.detach().min())
        spread = (variance + _LEAST).sqrt()
        near = torch.sigmoid((found.detach() - edge) / spread.detach())
        near = torch.where(valid & ~newest, near * (1 - near), 0.0)
        moving = (near * found).sum(-1, keepdim=True) / near.sum(-1, keepdim=True).clamp_min(_LEAST)
        distance = (found - edge - (moving - moving.detach())) / spread
    soft = torch.where(valid & ~newest, torch.sigmoid(distance), 0.0)
    gates = hard.float() + (soft - soft.detach())
    return gates, gates.sum() / (decision.seen * lengths.numel())


def _answers(model: PreTrainedModel, sample: Sample, cache: _GatedCache) -> Tensor:
    """Mean log-likelihood [C] of the answers behind the decision."""
    ids, seen, rows = sample.input_ids.to(model.device), cache.get_seq_length(), cache.rows
    targets = sample.targets[sample.targets > seen].to(model.device)
    logits = model(
        input_ids=ids[seen:].expand(rows, -1),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=targets - 1 - seen,
    ).logits
    chosen = logits.float().log_softmax(-1).gather(2, ids[targets].expand(rows, -1).unsqueeze(-1))
    return chosen.squeeze(-1).mean(-1)


class _GatedCache(Cache):
    """The tokens before a decision, behind gates [C, L, K, N]; it takes the tokens behind it in one call.

    Attributes:
        rows: C.
        highest: of each layer read, [K, N] the highest attention that a token before the decision got in row 0.
    """

    def __init__(self, decision: _Decision, gates: Tensor) -> None:
        super().__init__(layers=[])
        self._decision, self._gates = decision, gates
        self.rows, self.highest = len(gates), list[Tensor]()
        self._pending: Tensor | None = None
        self._layer = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._pending, self._layer = key_states, layer_idx
        expecting.set(self)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._decision.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._decision.seen + query_length, 0

    def new_call(self) -> Memory | None:
        return None

    def expects(self, module: nn.Module, key: Tensor) -> bool:
        return key is self._pending

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: AttentionOptions
    ) -> Tensor:
        """[C, H, t, D]; the old tokens' weights are multiplied by their gates before all are normalised."""
        expecting.set(None)
        self._pending = None
        if not options.plain or (isinstance(mask, AttentionMask) and not mask.causal):
            raise UnsupportedModelError(
                f"{type(module).__name__} attends with a softcap, sinks or more than a causal mask, which a reading "
                "with a gradient does not do; choose another host, or descent_steps=0"
            )
        rows, heads, count, width = query.shape
        group = heads // key.shape[1]
        scaling = width**-0.5 if options.scaling is None else options.scaling
        grouped = (query * scaling).reshape(rows, key.shape[1], group * count, width)
        past_keys, past_values = self._decision.keys[self._layer], self._decision.values[self._layer]
        old = (grouped @ past_keys.transpose(-1, -2)).float()
        causal = torch.ones(count, count, dtype=torch.bool, device=query.device).tril().repeat(group, 1)
        new = (grouped @ key.transpose(-1, -2)).float().masked_fill(~causal, -math.inf)
        highest = torch.maximum(old.amax(-1, keepdim=True), new.amax(-1, keepdim=True)).detach()
        old, new = (old - highest).exp(), (new - highest).exp()
        gated = _through(old, self._gates[:, self._layer].unsqueeze(2), new)
        total = gated.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
        share = gated / total
        self.highest.append(share[0].detach().amax(1))
        out = share.to(value.dtype) @ past_values + (new / total).to(value.dtype) @ value
        return out.reshape(rows, heads, count, -1)


def _through(weights: Tensor, gates: Tensor, new: Tensor) -> Tensor:
    """Weights [C, K, n, N] behind gates [C, K, 1, N]; an evicted token's gradient is as if it came back whole.

    To first order its return would change a query's output by its weight over the sum of those that stayed, which is
    without bound where a sink was evicted. The whole change has the weight in the sum.
    """
    with torch.no_grad():
        hard = gates.detach()
        stayed = (weights * hard).sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
        slope = torch.where(hard > 0, weights, weights * (stayed / (stayed + weights)))
    return weights * hard + slope * (gates - hard)
