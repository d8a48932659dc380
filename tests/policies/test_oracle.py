"""Every policy against brute force: logits of every token, and the retained positions of every layer and head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from namm_transfer import MemoryCache, policy
from namm_transfer.policies import LayerView, Policy
from namm_transfer.policies.random import Random
from namm_transfer.store import TokenStore

from . import oracle
from .oracle import OracleLlama, OracleNAMM, Rule

PROMPT, TOTAL = 93, 117


def check(model, p: Policy, rule: Rule, interval: int, ids: Tensor, read: Callable) -> MemoryCache:
    """Prefill and decoding, step by step against the oracle; returns the memory after the last token."""
    brute = OracleLlama(model, rule, interval, rows=len(ids))
    cache = MemoryCache(p, update_interval=interval)
    pieces = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    for piece in pieces:
        with torch.no_grad():
            logits = model(piece, past_key_values=cache).logits
        expected = np.stack([brute.feed(column.numpy()) for column in piece.T], axis=1)
        torch.testing.assert_close(logits.double(), torch.from_numpy(expected), atol=1e-4, rtol=0)
        assert read(cache) == brute.positions()
    return cache


def random_rule(budget: int | float, seed: int) -> Rule:
    """The life-long scores themselves are :mod:`test_random`'s matter: here the rule asks the policy for them."""
    p = Random(budget=budget, seed=seed)

    def score(token: oracle.Token, place: int, head: int, moment: oracle.Moment) -> float:
        positions = torch.full((1, head + 1, 1), token.position, dtype=torch.int32)
        store = TokenStore({"positions": positions}, torch.ones(1, head + 1, dtype=torch.int64), 1, True)
        return float(p.scores(LayerView(store, moment.layer, (0, 1), moment.seen, 0, moment.interval))[0, head, 0])

    return oracle.per_token(budget, score)


RULES = {
    "random": (lambda b: policy("random", budget=b, seed=7), lambda b: random_rule(b, 7)),
    "streaming": (lambda b: policy("streaming", budget=b), oracle.streaming),
    "streaming-2": (lambda b: policy("streaming", budget=b, sinks=2), lambda b: oracle.streaming(b, 2)),
    "h2o": (lambda b: policy("h2o", budget=b), oracle.h2o),
    "key_norm": (lambda b: policy("key_norm", budget=b), oracle.key_norm),
    "tova": (lambda b: policy("tova", budget=b), oracle.tova),
    "snapkv": (lambda b: policy("snapkv", budget=b), oracle.snapkv),
    "snapkv-9-3": (lambda b: policy("snapkv", budget=b, window=9, kernel=3), lambda b: oracle.snapkv(b, 9, 3)),
}
SETTINGS = [(24, 16, 2), (0.4, 48, 4), (3, 32, 1), (0.15, 16, 2)]
"""Budget, update interval, KV heads (of 4 query heads)."""


def test_full(llama, tokens, retained) -> None:
    check(llama(), policy("full"), oracle.full(), 16, tokens(TOTAL), retained)


@pytest.mark.parametrize(("budget", "interval", "kv_heads"), SETTINGS)
@pytest.mark.parametrize("name", RULES)
def test_rule(llama, tokens, retained, name: str, budget: int | float, interval: int, kv_heads: int) -> None:
    made, rule = RULES[name]
    model = llama(kv_heads=kv_heads)
    cache = check(model, made(budget), rule(budget), interval, tokens(TOTAL, seed=interval), retained)
    # at the last decision each head held its budget, then tokens came
    after = TOTAL % interval
    allowed = round(budget * (TOTAL - after)) if isinstance(budget, float) else budget
    assert (cache.stats().retained == allowed + after).all()


MODES = {
    "threshold": ({}, lambda o: o.threshold),
    "reference": ({"eviction": "reference"}, lambda o: o.reference),
    "rank": ({"budget": 20}, lambda o: o.ranked(20)),
    "rank-fraction": ({"budget": 0.3}, lambda o: o.ranked(0.3)),
}


@pytest.mark.parametrize(("seed", "interval", "kv_heads", "rows"), [(2, 16, 2, 1), (4, 48, 1, 1), (6, 32, 4, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_namm(
    llama, tokens, retained, make_namm, mode: str, seed: int, interval: int, kv_heads: int, rows: int
) -> None:
    namm = make_namm(seed)
    brute = OracleNAMM(*(x.double().numpy() for x in (namm.vector, namm.feature_mean, namm.feature_var)))
    options, rule = MODES[mode]
    model = llama(kv_heads=kv_heads)
    p = policy("namm", namm=namm, **options)
    cache = check(model, p, rule(brute), interval, tokens(TOTAL, rows, seed=interval), retained)
    kept = cache.stats().retained
    assert (kept < TOTAL - TOTAL % interval).all()
    if mode == "threshold" and kv_heads > 1:
        assert len(kept.unique()) > 1  # ragged, or the test shows little
