"""The memory's life: forked, saved, reordered, measured, moved, reset; never cropped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from namm_transfer import NAMM, MemoryCache, adapt, policy
from namm_transfer.attention import expecting
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import CacheError, ConfigError
from namm_transfer.policies import Policy

INTERVAL = 32
POLICIES = ("full", "random", "streaming", "h2o", "key_norm", "tova", "snapkv", "namm", "namm-rank")


@pytest.fixture(scope="module")
def make_policy(make_namm) -> Callable[[str], Policy]:
    """A policy of each kind, by name."""

    def make(name: str) -> Policy:
        if name == "full":
            return policy("full")
        if name.startswith("namm"):
            return policy("namm", namm=make_namm(), budget=24 if name == "namm-rank" else None)
        return policy(name, budget=24)

    return make


def feed(model: LlamaForCausalLM, cache: MemoryCache, ids: Tensor) -> Tensor:
    """Logits [rows, count, vocab] of more tokens."""
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def state(cache: MemoryCache) -> list[Tensor]:
    """A copy of everything that the tokens of a memory hold."""
    return [x[name][x.valid()] for layer in cache.layers for x in [layer.tokens] for name, _ in sorted(x)]


def tables(cache: MemoryCache) -> int:
    """Bytes of what says where the tokens are: lengths, where the heads' places start, and how many they are."""
    return sum(3 * layer.tokens.lengths.nbytes for layer in cache.layers)


def same_state(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- fork --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_forks_are_independent(llama, tokens, make_policy, name: str) -> None:
    model, ids = llama(), tokens(150)
    cache = MemoryCache(make_policy(name), INTERVAL)
    feed(model, cache, ids[:, :70])
    before = state(cache)
    fork = cache.fork()
    continued = feed(model, fork, ids[:, 70:110])
    assert same_state(state(cache), before)  # the fork's life leaves no trace
    assert cache.get_seq_length() == 70
    after = state(fork)
    assert torch.equal(feed(model, cache, ids[:, 70:110]), continued)
    feed(model, cache, ids[:, 110:])
    assert same_state(state(fork), after)


@pytest.mark.parametrize("name", ["full", "h2o", "namm"])
def test_fork_into_rows(llama, tokens, make_policy, retained, name: str) -> None:
    """Three questions about one remembered prompt are what each question alone gets."""
    model, prompt, questions = llama(), tokens(70), tokens(60, rows=3, seed=1)
    cache = MemoryCache(make_policy(name), INTERVAL)
    feed(model, cache, prompt)
    together = cache.fork(rows=3)
    assert together.batch_size == 3
    assert together.stats().seen == [70] * 3
    logits = feed(model, together, questions)
    for row in range(3):
        alone = cache.fork()
        torch.testing.assert_close(logits[row], feed(model, alone, questions[row : row + 1])[0], atol=1e-4, rtol=0)
        assert [layer[row] for layer in retained(together)] == [layer[0] for layer in retained(alone)]


def test_fork_of_nothing(llama, tokens, make_policy) -> None:
    fork = MemoryCache(make_policy("h2o"), INTERVAL).fork()
    assert feed(llama(), fork, tokens(20, rows=2)).shape == (2, 20, 256)
    with pytest.raises(ConfigError, match="rows must be an int of at least 1; got 0"):
        fork.fork(rows=0)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_saved_memory_goes_on_exactly(llama, tokens, make_policy, tmp_path: Path, name: str) -> None:
    model, ids = llama(), tokens(150, rows=2)
    cache, file = MemoryCache(make_policy(name), INTERVAL), tmp_path / "memory.safetensors"
    feed(model, cache, ids[:, :77])  # within a hop, within an interval
    cache.save(file)
    loaded = MemoryCache.load(file, make_policy(name))
    assert loaded.update_interval == INTERVAL
    assert same_state(state(loaded), state(cache))
    for start, stop in ((77, 78), (78, 100), (100, 150)):
        assert torch.equal(feed(model, loaded, ids[:, start:stop]), feed(model, cache, ids[:, start:stop]))
    mine, other = loaded.stats(), cache.stats()
    assert (mine.seen, mine.kept_at_updates, mine.updates) == (other.seen, other.kept_at_updates, other.updates)


def test_a_loaded_memory_is_measured_and_saved_over_its_own_file(llama, tokens, make_policy, tmp_path: Path) -> None:
    file = tmp_path / "memory.safetensors"
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    feed(llama(), cache, tokens(77))
    cache.save(file)
    loaded = MemoryCache.load(file, make_policy("namm"))
    held = sum(v.nbytes for layer in loaded.layers for _, v in layer.tokens)
    assert loaded.stats().bytes["total"] == held + tables(loaded)
    loaded.save(file)  # its tensors may still be mapped from the file
    assert same_state(state(MemoryCache.load(file, make_policy("namm"))), state(cache))
    assert os.listdir(tmp_path) == [file.name]  # and nothing is left beside it


def test_empty_and_reset_memories_are_saved_too(llama, tokens, make_policy, tmp_path: Path) -> None:
    model, cache = llama(), MemoryCache(make_policy("h2o"), INTERVAL)
    for file in (tmp_path / "empty", tmp_path / "reset"):
        cache.save(file)
        loaded = MemoryCache.load(file, make_policy("h2o"))
        assert loaded.get_seq_length() == 0
        assert loaded.stats().bytes["total"] == 0
        assert torch.equal(feed(model, loaded, tokens(40, rows=2)), feed(model, cache, tokens(40, rows=2)))
        cache.reset()


def test_another_policy_is_refused(llama, tokens, make_policy, make_namm, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    feed(llama(), cache, tokens(40))
    cache.save(file)
    others = [
        policy("h2o", budget=24),
        policy("namm", namm=make_namm(), budget=24),
        policy("namm", namm=make_namm(), eviction="reference"),
        policy("namm", namm=make_namm(9)),
    ]
    for other in others:
        with pytest.raises(CacheError, match=r"was saved under the policy .*'namm'.*; got .*" + other.name):
            MemoryCache.load(file, other)


def test_another_population_is_refused(llama, tokens, make_namm, tmp_path: Path) -> None:
    file, vectors = tmp_path / "memory", torch.stack([make_namm(i).vector for i in (2, 4)])
    cache = MemoryCache(policy("namm", namm=make_namm(), vectors=vectors), INTERVAL)
    feed(llama(), cache, tokens(40, rows=2))
    cache.save(file)
    assert MemoryCache.load(file, policy("namm", namm=make_namm(), vectors=vectors.clone())).batch_size == 2
    with pytest.raises(CacheError, match="was saved under the policy"):
        MemoryCache.load(file, policy("namm", namm=make_namm(), vectors=vectors.flip(0)))


def test_files_that_hold_no_memory(llama, tokens, make_policy, make_namm, tmp_path: Path) -> None:
    p, file = make_policy("h2o"), tmp_path / "memory"
    with pytest.raises(CacheError, match=r"cannot read a memory from .*memory"):
        MemoryCache.load(file, p)
    cache = MemoryCache(p, INTERVAL)
    feed(llama(), cache, tokens(40))
    cache.save(file)
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"nothing of the kind"):
        file.write_bytes(broken)
        with pytest.raises(CacheError, match="cannot read a memory"):
            MemoryCache.load(file, p)
    make_namm().save_pretrained(tmp_path)
    with pytest.raises(CacheError, match="cannot read a memory"):
        MemoryCache.load(tmp_path / "model.safetensors", p)


# -- other models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["the same object", "a file"])
def test_a_model_with_more_layers_is_refused(llama, tokens, make_policy, tmp_path: Path, through: str) -> None:
    cache = MemoryCache(make_policy("h2o"), INTERVAL)
    feed(llama(layers=2), cache, tokens(70))
    if through == "a file":
        cache.save(tmp_path / "memory")
        cache = MemoryCache.load(tmp_path / "memory", make_policy("h2o"))
    with pytest.raises(CacheError, match="layer 2 is new to this memory, but layer 0 had seen 70 tokens.*2 layers"):
        feed(llama(layers=3), cache, tokens(5))


@pytest.mark.parametrize("through", ["the same object", "a file"])
def test_a_model_with_fewer_layers_is_refused(llama, tokens, make_policy, tmp_path: Path, through: str) -> None:
    """Whether the last layers are left out shows when the next call begins."""
    cache = MemoryCache(make_policy("h2o"), INTERVAL)
    feed(llama(layers=3), cache, tokens(70))
    if through == "a file":
        cache.save(tmp_path / "memory")
        cache = MemoryCache.load(tmp_path / "memory", make_policy("h2o"))
    feed(llama(layers=2), cache, tokens(5))
    with pytest.raises(CacheError, match="layer 2 has seen 70 tokens, but layer 0 has seen 75.*fewer layers"):
        feed(llama(layers=2), cache, tokens(5))
    with adapt(llama(layers=2, attention="sdpa", seed=1), make_policy("h2o"), INTERVAL) as host:
        cache = MemoryCache(make_policy("h2o"), INTERVAL)
        feed(llama(layers=3), cache, tokens(70))
        with pytest.raises(CacheError, match="a memory of 3 layers, but LlamaForCausalLM has 2"):
            host(input_ids=tokens(5), past_key_values=cache)


# -- beams -------------------------------------------------------------------------------------------------------


def beams(model: LlamaForCausalLM, ids: Tensor, cache: object, **more: object) -> tuple[Tensor, Tensor]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=40,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        length_penalty=0.0,  # a sequence's score is the sum of its log probabilities
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    return out.sequences, out.sequences_scores


def test_beam_search_with_nothing_evicted(llama, tokens) -> None:
    ids = tokens(40, rows=2)
    want, scores = beams(llama(attention="sdpa"), ids, DynamicCache())
    found, mine = beams(llama(), ids, MemoryCache(policy("full"), 16))
    assert torch.equal(found, want)
    torch.testing.assert_close(mine, scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["h2o", "tova", "namm"])
def test_beam_search_under_eviction(llama, tokens, make_policy, name: str) -> None:
    """Each beam's score is what its sequence gets when it is computed alone, from its first token."""
    model, ids = llama(), tokens(40)
    cache = MemoryCache(make_policy(name), 16)
    sequences, scores = beams(model, ids, cache)
    assert len(sequences.unique(dim=0)) == 3
    assert cache.stats().kept_fraction < 0.9
    for sequence, score in zip(sequences, scores, strict=True):
        log = feed(model, MemoryCache(make_policy(name), 16), sequence.unsqueeze(0))[0].log_softmax(-1)
        alone = log[39:-1].gather(1, sequence[40:, None]).sum()
        torch.testing.assert_close(score, alone, atol=1e-3, rtol=0)


def test_rows_are_chosen_in_every_layer(llama, tokens, make_policy, retained) -> None:
    model, ids = llama(), tokens(75, rows=3)
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    feed(model, cache, ids)
    before = retained(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert retained(cache) == [[layer[2], layer[0], layer[0]] for layer in before]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert retained(cache) == [[layer[2], layer[0]] for layer in before]
    cache.batch_repeat_interleave(2)
    assert retained(cache) == [[layer[i] for i in (2, 2, 0, 0)] for layer in before]


# -- measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_tensors(llama, tokens, make_policy, name: str) -> None:
    cache = MemoryCache(make_policy(name), INTERVAL)
    feed(llama(), cache, tokens(200, rows=2))
    bytes_ = cache.stats().bytes
    fields = [(k, v) for layer in cache.layers for k, v in layer.tokens]
    assert bytes_["kv"] == sum(v.untyped_storage().nbytes() for k, v in fields if k in ("keys", "values"))
    assert bytes_["total"] == sum(v.untyped_storage().nbytes() for _, v in fields) + tables(cache)
    assert bytes_["total"] == bytes_["kv"] + bytes_["positions"] + bytes_["policy"] + tables(cache)
    assert (bytes_["policy"] == 0) == (name in ("full", "random", "streaming", "key_norm"))
    tokens_, retained = cache.layers[0].tokens, cache.stats().retained[0]
    assert tokens_.capacity <= max(1.25 * retained.max(), retained.max() + 128)  # what was evicted is really given back
    assert len(tokens_.places()[0]) <= retained.sum() + 128 * retained.numel()  # and a head pays for its own tokens


@pytest.mark.parametrize("name", ["namm", "h2o", "full"])
def test_fractions(llama, tokens, make_policy, name: str) -> None:
    model, ids, rows = llama(), tokens(200, rows=2), 2
    cache, at_updates = MemoryCache(make_policy(name), INTERVAL), []
    assert (cache.stats().kept_fraction, cache.stats().kept_at_updates, cache.stats().updates) == (1.0, None, 0.0)
    for start in range(0, 192, INTERVAL):
        feed(model, cache, ids[:, start : start + INTERVAL])
        at_updates.append(cache.stats().retained.double() / (start + INTERVAL))
    feed(model, cache, ids[:, 192:])
    stats = cache.stats()
    retained = [[[len(h) for h in row] for row in layer] for layer in _positions(cache)]
    assert stats.retained.tolist() == retained
    assert stats.seen == [200, 200]
    assert stats.kept_fraction == pytest.approx(sum(n for x in retained for y in x for n in y) / (200 * 2 * rows * 2))
    for b in range(rows):
        assert stats.kept_fraction_by_row[b] == pytest.approx(float(stats.retained[:, b].double().mean() / 200))
    if name == "full":
        assert (stats.updates, stats.kept_at_updates) == (0, None)
        assert (stats.updates_by_row, stats.kept_by_row) == ([0, 0], [None, None])
    else:
        assert stats.updates == 6
        assert stats.kept_at_updates == pytest.approx(float(torch.stack(at_updates).mean()))
        assert stats.updates_by_row == [6 * 2] * rows
        assert stats.kept_by_row == pytest.approx(torch.stack(at_updates).mean((0, 1, 3)).tolist())


def test_a_row_without_a_decision_has_no_kept_fraction(llama, tokens, make_policy) -> None:
    """It does not count as one that kept everything, and the others' fraction is theirs alone."""
    model, ids = llama(), tokens(100, rows=3)
    lengths = (100, 20, 70)
    mask = (torch.arange(100) >= 100 - torch.tensor(lengths).unsqueeze(1)).long()
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    together, alone = cache.stats(), []
    for row, length in enumerate(lengths):
        single = MemoryCache(make_policy("namm"), INTERVAL)
        feed(model, single, ids[row : row + 1, 100 - length :])
        alone.append(single.stats())
    assert together.updates_by_row == [6, 0, 4]
    assert together.kept_by_row[1] is None
    for row in (0, 2):
        assert together.kept_by_row[row] == pytest.approx(alone[row].kept_at_updates)
        assert together.kept_by_row[row] < 1
    assert together.kept_by_row[0] != together.kept_by_row[2]
    weighted = (6 * together.kept_by_row[0] + 4 * together.kept_by_row[2]) / 10
    assert together.kept_at_updates == pytest.approx(weighted)
    assert together.kept_fraction_by_row == pytest.approx([one.kept_fraction for one in alone])


def _positions(cache: MemoryCache) -> list[list[list[list[int]]]]:
    return [
        [[x["positions"][b, k, : x.lengths[b, k]].tolist() for k in range(2)] for b in range(2)]
        for x in (layer.tokens for layer in cache.layers)
    ]


def test_to_moves_all_tensors(llama, tokens, make_policy) -> None:
    model, ids = llama(), tokens(80)
    cache, other = MemoryCache(make_policy("namm"), INTERVAL), MemoryCache(make_policy("namm"), INTERVAL)
    for c in (cache, other):
        feed(model, c, ids[:, :60])
    assert cache.to("cpu") is cache
    assert torch.equal(feed(model, cache, ids[:, 60:]), feed(model, other, ids[:, 60:]))
    cache.to("meta")
    assert {v.device.type for layer in cache.layers for _, v in layer.tokens} == {"meta"}
    assert MemoryCache(make_policy("h2o"), INTERVAL).to("meta").stats().seen == []


# -- reset and crop ----------------------------------------------------------------------------------------------


def test_reset_makes_it_new(llama, tokens, make_policy) -> None:
    model = llama()
    cache = MemoryCache(make_policy("namm"), INTERVAL)
    feed(model, cache, tokens(77, rows=3))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stats().bytes["total"] == 0
    fresh = MemoryCache(make_policy("namm"), INTERVAL)
    ids = tokens(70, rows=2, seed=5)  # another batch shape
    assert torch.equal(feed(model, cache, ids), feed(model, fresh, ids))
    assert cache.stats().updates == fresh.stats().updates == 2
    cache.reset()
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    assert out.shape == (2, 73)


def test_crop_is_refused(llama, tokens, make_policy) -> None:
    cache = MemoryCache(make_policy("h2o"), INTERVAL)
    feed(llama(), cache, tokens(40))
    cache.crop(0)
    for count in (-1, 5):
        with pytest.raises(CacheError, match="cannot be cropped: what was evicted cannot come back; fork it"):
            cache.crop(count)
    assert not cache.is_croppable


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_speculative_decoding_is_refused(llama, tokens, make_policy, kind: str) -> None:
    ids = tokens(40).repeat(1, 2)
    more = {"assistant_model": llama(layers=1, seed=3)} if kind == "assistant" else {"prompt_lookup_num_tokens": 4}
    with pytest.raises(CacheError, match="cannot be cropped"):
        llama().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=MemoryCache(make_policy("h2o"), INTERVAL),
            max_new_tokens=20,
            do_sample=False,
            **more,
        )


def test_importing_changes_no_model(llama, tokens) -> None:
    model, ids = llama(attention="sdpa"), tokens(30)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, DynamicCache)


def test_without_a_memory_the_namm_attention_is_plain_attention(llama, tokens) -> None:
    ids, mask = tokens(30, rows=2), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :9] = 0
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}, {"use_cache": False}):
            mine, plain = (llama(attention=a)(ids, **more).logits for a in ("namm", "sdpa"))
            assert torch.equal(mine, plain)
        one, two = (llama(attention=a) for a in ("namm", "sdpa"))
        caches = DynamicCache(), DynamicCache()
        for part in (ids[:, :20], ids[:, 20:]):
            assert torch.equal(one(part, past_key_values=caches[0]).logits, two(part, past_key_values=caches[1]).logits)


def test_an_encoder_goes_on_listening_after_a_decoder(llama, tokens, make_policy) -> None:
    """A vision tower may be called again after the decoder of the same model."""
    encoder = EncoderMemory(make_policy("h2o"), INTERVAL, {})
    with encoder.listening():
        feed(llama(), MemoryCache(make_policy("h2o"), INTERVAL), tokens(40))
        assert expecting.get() is encoder
    assert expecting.get() is None


def test_policies_describe_themselves_apart(make_policy, make_namm) -> None:
    made = [make_policy(n) for n in POLICIES] + [
        policy("h2o", budget=25),
        policy("streaming", budget=24, sinks=2),
        policy("random", budget=24, seed=1),
        policy("snapkv", budget=24, window=8),
        policy("snapkv", budget=24, kernel=3),
        policy("namm", namm=NAMM.from_vector(make_namm().vector)),
    ]
    described = [str(p.describe()) for p in made]
    assert len(set(described)) == len(described)
