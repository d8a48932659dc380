"""A population evaluated as rows of a batch: every candidate is one row of the same sample, with its own memory.

Shape legend: P candidates, T tokens of a sample, M marked answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from namm_transfer.errors import ConfigError
from namm_transfer.evolution.tasks import Sample
from namm_transfer.memory import MemoryCache
from namm_transfer.network import NAMM
from namm_transfer.policies import NAMMPolicy, Policy, policy
from namm_transfer.stats import MemoryStats

__all__ = ["Condition", "Reading", "read_full", "read_population", "read_sample"]


@dataclass(frozen=True)
class Condition:
    """Under what memory a sample is read: the budget (None: eviction by threshold) and the update interval."""

    budget: float | None
    update_interval: int


@dataclass(frozen=True)
class Reading:
    """What was read off a sample.

    Attributes:
        log_likelihood: [P] float64 mean over the answer tokens, in nats.
        accuracy: [P] float64 fraction of the answer tokens that the model would have written itself.
        kept: [P] float64 fraction of tokens kept, averaged over layers, heads and decisions; NaN before the first.
        stats: of all P memories together.
    """

    log_likelihood: Tensor
    accuracy: Tensor
    kept: Tensor
    stats: MemoryStats


@torch.inference_mode()
def read_sample(model: PreTrainedModel, sample: Sample, memory: Policy, update_interval: int, rows: int = 1) -> Reading:
    """Read a sample with `rows` copies of it in one batch; row b has the memory that the policy gives to row b.

    Up to the first decision all rows are the same, so this part is computed once and the memory is forked.

    Args:
        model: a causal LM whose attention is `"namm"`.
        sample: what to read.
        memory: a policy; with `vectors` [rows, 4172], a population.
        update_interval: tokens between two decisions.
        rows: P.
    """
    device = model.device
    ids = sample.input_ids.to(device)
    targets = sample.targets.to(device)
    # The logits before the first answer must come from the part that is not shared.
    shared = min(update_interval, int(targets[0])) - 1
    if rows > 1 and shared > 0:
        cache = MemoryCache(_without_rows(memory), update_interval=update_interval)
        model(input_ids=ids[None, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = cache.fork(rows=rows)
        cache.policy = memory
        for layer in cache.layers:  # no decision has been taken yet, so the state is anyone's
            layer.policy = memory
    else:
        cache = MemoryCache(memory, update_interval=update_interval)
        shared = 0
    rest = ids[shared:].expand(rows, -1)
    logits = model(input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=targets - 1 - shared).logits
    answer = ids[targets]
    stats = cache.stats()
    return Reading(
        log_likelihood=torch.stack([_mean_log_likelihood(row, answer) for row in logits]),
        accuracy=(logits.argmax(-1) == answer).double().mean(-1),
        kept=torch.tensor([float("nan") if kept is None else kept for kept in stats.kept_by_row], dtype=torch.float64),
        stats=stats,
    )


def read_full(model: PreTrainedModel, sample: Sample) -> float:
    """The mean log-likelihood of the answers when everything is kept."""
    return float(read_sample(model, sample, policy("full"), update_interval=512).log_likelihood)


def read_population(
    model: PreTrainedModel,
    sample: Sample,
    condition: Condition,
    namm: NAMM,
    vectors: Tensor,
    rows_at_once: int,
) -> tuple[Tensor, Tensor]:
    """Read a sample under each candidate.

    Args:
        model: a causal LM whose attention is `"namm"`.
        sample: what to read.
        condition: budget and update interval, the same for all.
        namm: gives the feature normaliser.
        vectors: [P, 4172].
        rows_at_once: candidates per batch, which bounds the memory needed.

    Returns:
        [P] mean log-likelihood of the answer tokens in nats, and [P] fraction of tokens kept, NaN without a decision.

    Raises:
        ConfigError: `rows_at_once` is less than 1.
    """
    if rows_at_once < 1:
        raise ConfigError(f"rows_at_once must be at least 1; got {rows_at_once}")
    readings = []
    for part in torch.split(vectors, rows_at_once):
        memory = policy("namm", namm=namm, vectors=part, budget=condition.budget)
        readings.append(read_sample(model, sample, memory, condition.update_interval, rows=len(part)))
    return torch.cat([r.log_likelihood for r in readings]), torch.cat([r.kept for r in readings])


def _without_rows(memory: Policy) -> Policy:
    """The policy for a batch of one row: what it observes is the same, and it is not asked to decide."""
    return replace(memory, vectors=None) if isinstance(memory, NAMMPolicy) else memory


def _mean_log_likelihood(logits: Tensor, answer: Tensor) -> Tensor:
    """Of the answer tokens [M] under logits [M, vocabulary]; one row at a time, since logits are large."""
    chosen = logits.float().log_softmax(-1).gather(1, answer.unsqueeze(1))
    return chosen.double().mean()
