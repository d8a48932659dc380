"""Bad input: one error family, and messages that say what came and what was expected."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from namm_transfer import MemoryCache, policy
from namm_transfer.errors import (
    BudgetError,
    CacheError,
    CheckpointError,
    ConfigError,
    NammTransferError,
    UnsupportedModelError,
)
from namm_transfer.network import NUM_PARAMETERS
from namm_transfer.policies import names

RULES = ("random", "streaming", "h2o", "key_norm", "tova", "snapkv")


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0, -16, 1, 24, 511])
def test_update_interval_no_multiple_of_a_hop(interval: int) -> None:
    with pytest.raises(ConfigError, match=rf"positive multiple of 16; got {interval}"):
        MemoryCache(policy("full"), update_interval=interval)


@pytest.mark.parametrize("interval", [16.0, "512", None, True])
def test_update_interval_of_another_type(interval: object) -> None:
    with pytest.raises(ConfigError, match=rf"update_interval must be an int; got {interval!r}"):
        MemoryCache(policy("full"), update_interval=interval)


def test_numbers_of_numpy(llama, tokens) -> None:
    """They mean what Python's mean, and a memory that was made with them can be saved."""
    cache = MemoryCache(policy("h2o", budget=np.int64(8)), update_interval=np.int64(32))
    decode(llama(), cache, tokens(40))
    assert cache.fork(rows=np.int64(2)).batch_size == 2
    assert cache.stats().retained.unique().tolist() == [8 + 40 - 32]
    for given, meant in ((np.int64(8), 8), (np.float32(0.5), 0.5), (np.float64(0.5), 0.5)):
        assert json.dumps(policy("h2o", budget=given).describe()) == json.dumps(policy("h2o", budget=meant).describe())
        with pytest.raises(BudgetError, match="takes no budget"):
            policy("full", budget=given)
    for wrong in (np.bool_(True), np.int64(0), np.float32(1.5), np.array([8])):
        with pytest.raises(BudgetError):
            policy("h2o", budget=wrong)
    for wrong in (np.bool_(True), np.float64(32.0), np.int64(24)):
        with pytest.raises(ConfigError, match="update_interval must be"):
            MemoryCache(policy("full"), update_interval=wrong)


@pytest.mark.parametrize("rows", ["2", 0, True, 1.0, None])
def test_forks_of_no_number_of_rows(rows: object) -> None:
    with pytest.raises(ConfigError, match=f"fork: rows must be an int of at least 1; got {rows!r}"):
        MemoryCache(policy("full")).fork(rows)


def test_a_file_that_cannot_be_written(llama, tokens, tmp_path: Path) -> None:
    cache = MemoryCache(policy("full"))
    decode(llama(), cache, tokens(20))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "memory", tmp_path / "folder"):
        with pytest.raises(CacheError, match=f"cannot write a memory to '{path}'"):
            cache.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("given", ["h2o", None, 512])
def test_a_memory_without_a_policy(given: object) -> None:
    with pytest.raises(ConfigError, match=rf"needs a policy.*got {given!r}"):
        MemoryCache(given)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "at least 1; got 0"),
        (-5, "at least 1; got -5"),
        (0.0, r"in \(0, 1\]; got 0.0"),
        (1.5, r"in \(0, 1\]; got 1.5"),
        (-0.1, r"in \(0, 1\]; got -0.1"),
        (math.nan, r"in \(0, 1\]; got nan"),
        (math.inf, r"in \(0, 1\]; got inf"),
        (True, "int .tokens. or a float .*got True"),
        (None, "int .tokens. or a float .*got None"),
        ("0.5", "int .tokens. or a float .*got '0.5'"),
    ],
)
def test_budgets(name: str, budget: object, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        policy(name, budget=budget)


@pytest.mark.parametrize("name", RULES)
def test_a_missing_budget(name: str) -> None:
    with pytest.raises(BudgetError, match="got None"):
        policy(name)


def test_budgets_of_full_and_namm(make_namm) -> None:
    with pytest.raises(BudgetError, match=r"'full' keeps every token and takes no budget; got 0.5"):
        policy("full", budget=0.5)
    assert policy("namm", namm=make_namm()).budget is None
    for budget in (0, 1.01, math.nan, False):
        with pytest.raises(BudgetError, match=f"got {budget}"):
            policy("namm", namm=make_namm(), budget=budget)


@pytest.mark.parametrize(
    ("given", "near"),
    [("h20", "h2o"), ("nam", "namm"), ("keynorm", "key_norm"), ("snap_kv", "snapkv"), ("TOVA!", None)],
)
def test_an_unknown_policy_names_the_nearest(given: str, near: str | None) -> None:
    hint = rf" \(did you mean '{near}'\?\)" if near else ""
    with pytest.raises(ConfigError, match=rf"unknown policy '{given}'{hint}; known are {', '.join(names())}"):
        policy(given)


@pytest.mark.parametrize("given", [None, 3, ["h2o"]])
def test_a_policy_name_of_another_type(given: object) -> None:
    with pytest.raises(ConfigError, match="unknown policy"):
        policy(given)


def test_an_unknown_option_names_the_nearest(make_namm) -> None:
    with pytest.raises(ConfigError, match=r"'h2o' has no option 'budgets' \(did you mean 'budget'\?\); it has budget"):
        policy("h2o", budgets=0.5)
    with pytest.raises(ConfigError, match=r"'snapkv' has no option 'windows' \(did you mean 'window'\?\)"):
        policy("snapkv", budget=5, windows=4)
    with pytest.raises(ConfigError, match=r"'namm' has no option 'evicton' \(did you mean 'eviction'\?\)"):
        policy("namm", namm=make_namm(), evicton="per_head")
    with pytest.raises(ConfigError, match="'tova' has no option 'temperature'; it has budget"):
        policy("tova", budget=5, temperature=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("streaming", {"sinks": -1}, "sinks must be .*at least 0; got -1"),
        ("streaming", {"sinks": "4"}, "sinks must be .*got '4'"),
        ("streaming", {"sinks": 1.5}, "sinks must be .*got 1.5"),
        ("snapkv", {"window": 0}, "window must be .*at least 1; got 0"),
        ("snapkv", {"window": None}, "window must be .*got None"),
        ("snapkv", {"kernel": 4}, "kernel must be odd; got 4"),
        ("snapkv", {"kernel": 3.0}, "kernel must be .*got 3.0"),
        ("random", {"seed": "x"}, "seed must be .*got 'x'"),
        ("random", {"seed": -1}, "seed must be .*got -1"),
    ],
)
def test_options_out_of_range(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(name, budget=24, **options)


def test_the_namm_policy(make_namm) -> None:
    with pytest.raises(ConfigError, match="policy 'namm' needs namm=NAMM"):
        policy("namm")
    with pytest.raises(ConfigError, match=r"needs namm=NAMM.*got 'default'"):
        policy("namm", namm="default")
    for wrong in ([1, 2], np.zeros((2, NUM_PARAMETERS))):
        with pytest.raises(ConfigError, match=r"vectors must be a tensor \[rows, 4172\]; got (list|ndarray)"):
            policy("namm", namm=make_namm(), vectors=wrong)
    with pytest.raises(ConfigError, match="statistics must be a FeatureStatistics; got 3"):
        policy("namm", namm=make_namm(), statistics=3)
    with pytest.raises(ConfigError, match="eviction must be 'per_head' or 'reference'; got 'per-head'"):
        policy("namm", namm=make_namm(), eviction="per-head")
    for threshold in ("0.5", True, math.inf):
        with pytest.raises(ConfigError, match="threshold must be a finite number"):
            policy("namm", namm=make_namm(), threshold=threshold)


def test_nan_in_namm_parameters(make_namm) -> None:
    namm = make_namm()
    namm.vector[7] = math.nan
    with pytest.raises(CheckpointError, match="NAMM vector holds 1 values that are NaN or infinite"):
        policy("namm", namm=namm)
    vectors = torch.zeros(2, NUM_PARAMETERS)
    vectors[1, :3] = math.inf
    with pytest.raises(CheckpointError, match="NAMM vectors holds 3 values"):
        policy("namm", namm=make_namm(), vectors=vectors)
    namm = make_namm()
    namm.feature_var[2] = math.nan
    with pytest.raises(CheckpointError, match="NAMM feature_var holds 1 values"):
        policy("namm", namm=namm)


def test_a_population_of_another_shape(llama, tokens, make_namm) -> None:
    with pytest.raises(CheckpointError, match=r"\[rows, 4172\]; got \(2, 4171\)"):
        policy("namm", namm=make_namm(), vectors=torch.zeros(2, 4171))
    for members, rows in ((2, 3), (3, 2)):
        population = policy("namm", namm=make_namm(), vectors=torch.zeros(members, NUM_PARAMETERS))
        with pytest.raises(ConfigError, match=f"vectors has {members} rows, but the batch has {rows}"):
            llama()(tokens(40, rows=rows), past_key_values=MemoryCache(population, 16))


# -- a cache that is used wrongly --------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_that_does_not_run_the_namm_attention(llama, tokens, attention: str, layers: int) -> None:
    """A silent no-op is an error: within the first call, or at the latest when anything is asked of the memory."""
    model, wrong = llama(layers=layers, attention=attention), "its attention is not 'namm'.*set_attn_implementation"
    later = [
        lambda c: c.stats(),
        lambda c: model(tokens(1), past_key_values=c),
        lambda c: c.fork(),
        lambda c: c.save("never-written"),
        lambda c: c.get_seq_length(),
    ]
    for use in later:
        cache = MemoryCache(policy("h2o", budget=8), 16)
        if layers > 1:
            with pytest.raises(CacheError, match=f"layer 0: .*{wrong}"):
                model(tokens(40), past_key_values=cache)
        else:
            model(tokens(40), past_key_values=cache)
        with pytest.raises(CacheError, match=wrong):
            use(cache)
    with pytest.raises(CacheError, match=wrong):
        model.generate(tokens(40), past_key_values=MemoryCache(policy("full"), 16), max_new_tokens=3)


def decode(model, cache: MemoryCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch_shape(llama, tokens, rows: int) -> None:
    model, ids = llama(), tokens(60, rows=2)
    cache, untouched = (MemoryCache(policy("h2o", budget=8), 16) for _ in range(2))
    for c in (cache, untouched):
        decode(model, c, ids[:, :40])
    with pytest.raises(
        CacheError, match=rf"holds 2 rows of 2 KV heads.*got keys of shape \({rows}, 2, 5, 8\); use a new"
    ):
        decode(model, cache, tokens(5, rows=rows))
    # and nothing is lost: the right batch goes on
    assert torch.equal(decode(model, cache, ids[:, 40:]), decode(model, untouched, ids[:, 40:]))


def test_another_model(llama, tokens) -> None:
    cache = MemoryCache(policy("h2o", budget=8), 16)
    decode(llama(), cache, tokens(40))
    for other in (llama(kv_heads=4), llama(width=64)):
        with pytest.raises(CacheError, match=r"layer 0: this memory holds 1 rows of 2 KV heads of width 8.*got keys"):
            decode(other, cache, tokens(5))


def test_a_short_attention_mask(llama, tokens) -> None:
    model, ids = llama(), tokens(60, rows=2)
    cache, untouched = (MemoryCache(policy("h2o", budget=8), 16) for _ in range(2))
    for c in (cache, untouched):
        decode(model, c, ids[:, :40])
    short = torch.ones(2, 20, dtype=torch.int64)
    short[0, :3] = 0
    with pytest.raises(CacheError, match="attention_mask covers 20 tokens, but 40 were seen before these 20"):
        model(ids[:, 40:], attention_mask=short, past_key_values=cache)
    assert torch.equal(decode(model, cache, ids[:, 40:]), decode(model, untouched, ids[:, 40:]))


def test_a_short_attention_mask_of_ones(llama, tokens) -> None:
    cache = MemoryCache(policy("h2o", budget=8), 16)
    decode(llama(), cache, tokens(40))
    with pytest.raises(CacheError, match="attention_mask covers 20 tokens, but 40 were seen before these 20"):
        llama()(tokens(20), attention_mask=torch.ones(1, 20), past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.ones(1, 1, 20, 20, dtype=torch.bool),
            CacheError,
            "covers 20 keys, but 40 tokens were seen before these 20",
        ),
        (torch.full((1, 1, 20, 60), -1.0), UnsupportedModelError, "position bias"),
        (torch.ones(1, 4, 20, 60, dtype=torch.bool), UnsupportedModelError, r"one head .*got shape \(1, 4, 20, 60\)"),
    ],
)
def test_masks_in_four_dimensions(llama, tokens, mask: Tensor, error: type[NammTransferError], message: str) -> None:
    cache = MemoryCache(policy("h2o", budget=8), 16)
    decode(llama(), cache, tokens(40))
    with pytest.raises(error, match=message):
        llama()(tokens(20), attention_mask=mask, past_key_values=cache)


def test_a_stale_memory_does_not_meddle(llama, tokens) -> None:
    """After its error was raised, calls without a memory are plain attention again."""
    cache = MemoryCache(policy("h2o", budget=8), 16)
    llama(layers=1, attention="sdpa")(tokens(40), past_key_values=cache)
    with pytest.raises(CacheError, match="its attention is not 'namm'"):
        cache.stats()
    found, want = (llama(layers=1, attention=a)(tokens(40), use_cache=False).logits for a in ("namm", "sdpa"))
    assert torch.equal(found, want)


def test_a_memory_left_waiting_does_not_meddle(llama, tokens) -> None:
    """Before its error was raised too; and it is still raised."""
    cache = MemoryCache(policy("h2o", budget=8), 16)
    llama(layers=1, attention="sdpa")(tokens(40), past_key_values=cache)
    found, want = (llama(layers=1, attention=a)(tokens(40), use_cache=False).logits for a in ("namm", "sdpa"))
    assert torch.equal(found, want)
    with pytest.raises(CacheError, match="its attention is not 'namm'"):
        cache.stats()


def test_rows_of_a_population_stay_in_their_places(llama, tokens, make_namm) -> None:
    vectors = torch.stack([make_namm(seed).to_vector() for seed in (2, 4)])
    cache = MemoryCache(policy("namm", namm=make_namm(), vectors=vectors), 16)
    decode(llama(), cache, tokens(40, rows=2))
    assert cache.fork().batch_size == 2
    for change in (lambda: cache.fork(rows=2), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        with pytest.raises(ConfigError, match="rows of a population cannot be repeated or reordered; got rows"):
            change()


def test_one_family() -> None:
    for error, builtin in (
        (ConfigError, ValueError),
        (BudgetError, ConfigError),
        (CheckpointError, ValueError),
        (CacheError, RuntimeError),
        (UnsupportedModelError, TypeError),
    ):
        assert issubclass(error, NammTransferError)
        assert issubclass(error, builtin)
