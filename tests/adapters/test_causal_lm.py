"""The invariants of the memory over causal language models, each against the unmodified model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    ResNetConfig,
)

from namm_transfer import MemoryCache, adapt, policy
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError

from . import checks
from .checks import INTERVAL, KEEPERS, TOLERANCE, evictor
from .hosts import BASE, CAUSAL_LMS, LEARNED_POSITIONS, PADDING_COUNTS, causal_lm, left_padded, prompt

every_model = pytest.mark.parametrize("name", CAUSAL_LMS)
POLICIES = {"all": KEEPERS["namm"], "namm": evictor("namm"), "h2o": evictor("h2o")}


def under(*names: str) -> pytest.MarkDecorator:
    """Once under each of the named policies; "all" keeps every token."""
    return pytest.mark.parametrize("keep", [POLICIES[n] for n in names], ids=names)


CUTS = ([1, 33, 16, 50], [60, *[1] * 10, 30], [64, 36], [31, 1, 1, 1, 66])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_model
def test_nothing_evicted_is_the_unmodified_model(name: str) -> None:
    assert checks.nothing_evicted(causal_lm(name), {"input_ids": prompt(2, 110)}) <= TOLERANCE


@every_model
@under("all", "namm", "h2o")
def test_any_split_of_the_prompt_gives_the_same(name: str, keep) -> None:
    assert checks.splits(causal_lm(name), {"input_ids": prompt(1, 100)}, keep, CUTS) <= TOLERANCE


@every_model
@under("all", "namm")
def test_left_padding_and_neighbours_change_nothing(name: str, keep) -> None:
    if name in PADDING_COUNTS:
        pytest.skip(PADDING_COUNTS[name])
    prompts = [prompt(1, size, seed=size) for size in (110, 71, 53)]

    def positions(mask: Tensor) -> dict[str, Tensor]:
        return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if name in LEARNED_POSITIONS else {}

    rows = [{"input_ids": x} for x in prompts]
    assert checks.left_padding(causal_lm(name), rows, left_padded(prompts), keep, positions) <= TOLERANCE


@every_model
def test_beam_search_is_the_unmodified_models(name: str) -> None:
    checks.beams(causal_lm(name), {"input_ids": prompt(2, 90)})


@every_model
def test_a_budget_evicts_in_every_layer(name: str) -> None:
    checks.evicts_everywhere(causal_lm(name), {"input_ids": prompt(2, 110)}, layers=2)


@every_model
def test_the_model_is_restored(name: str) -> None:
    checks.restored(causal_lm(name), {"input_ids": prompt(1, 40)})


def test_only_what_differs_from_unpadded_is_skipped() -> None:
    """The skipped models differ without a memory too."""
    prompts = [prompt(1, size, seed=size) for size in (110, 71)]
    for name in PADDING_COUNTS:
        model = causal_lm(name)
        _, together = checks.greedy(model.generate, left_padded(prompts))
        _, alone = checks.greedy(model.generate, {"input_ids": prompts[1]})
        assert checks.distance(together[1], alone[0]) > 1e-3


def test_a_call_goes_on_with_the_memory_it_is_given() -> None:
    model, ids = causal_lm("llama"), prompt(1, 150)
    with adapt(model, evictor("h2o"), INTERVAL) as host:
        whole = host(input_ids=ids).logits
        cache = host.new_cache()
        host(input_ids=ids[:, :100], past_key_values=cache)
        rest = host(input_ids=ids[:, 100:], past_key_values=cache).logits
        assert host.cache is cache
        assert checks.distance(rest, whole[:, 100:]) <= TOLERANCE


def test_stats_before_a_call_are_refused() -> None:
    with adapt(causal_lm("llama"), policy("full")) as host, pytest.raises(CacheError, match="no call yet"):
        host.stats()


def test_another_cache_is_refused() -> None:
    with adapt(causal_lm("llama"), policy("full")) as host:
        with pytest.raises(ConfigError, match=r"must be a MemoryCache.*DynamicCache"):
            host(input_ids=prompt(1, 8), past_key_values=DynamicCache())
        with pytest.raises(ConfigError, match="use_cache=False"):
            host(input_ids=prompt(1, 8), use_cache=False)


def test_inputs_by_position() -> None:
    ids, model = prompt(1, 50), causal_lm("llama")
    with adapt(model, evictor(), INTERVAL) as host:
        assert torch.equal(host(ids).logits, host(input_ids=ids).logits)
        assert torch.equal(host(ids, torch.ones_like(ids)).logits, host(input_ids=ids).logits)
        settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(host.generate(ids, **settings), host.generate(input_ids=ids, **settings))
        assert host.stats().seen == [53]
        with pytest.raises(TypeError, match="multiple values"):
            host(ids, input_ids=ids)


def test_use_cache_none_is_as_the_host_likes() -> None:
    with adapt(causal_lm("llama"), evictor(), INTERVAL) as host:
        host(input_ids=prompt(1, 50), use_cache=None)
        assert host.stats().updates == 1


@pytest.mark.parametrize("given", [None, "llama", nn.Linear])
def test_what_is_no_model_is_refused(given: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"adapt needs a model, a torch.nn.Module; got"):
        adapt(given, policy("full"))


def test_outside_of_the_block_nothing_is_evicted_silently() -> None:
    host = adapt(causal_lm("llama"), evictor(), INTERVAL)
    with pytest.raises(CacheError, match="runs without its memory: use the host in a block"):
        host(input_ids=prompt(1, 50))
    with host:
        host(input_ids=prompt(1, 50))
    with pytest.raises(CacheError, match="runs without its memory: use the host in a block"):
        host(input_ids=prompt(1, 50))


def _lm(kind: str, **settings: object) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | settings)))


_MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
_MLA |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
_GEMMA3N = {
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "head_dim": 8,
    "vocab_size_per_layer_input": BASE["vocab_size"],
}
_GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "hidden_size_per_layer_input": 8}
_GEMMA3N |= {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 3, "intermediate_size": 48}
_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
UNSUPPORTED = {
    # what it is -> (how to build it, what the error must say was found)
    "plain module": (lambda: nn.Linear(4, 4), "found torch.nn.modules.linear.Linear"),
    "resnet": (
        lambda: AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")),
        "a language-model head.; ResNetModel has none",
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)),
        "a language-model head.; BertForMaskedLM has none",
    ),
    "t5": (
        lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **_T5)),
        "a decoder-only model; T5ForConditionalGeneration is an encoder-decoder",
    ),
    "mamba": (lambda: _lm("mamba", state_size=4), "MambaForCausalLM has layers of type"),
    "jamba": (
        lambda: _lm("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False),
        "JambaForCausalLM has layers of type linear_attention",
    ),
    "recurrent gemma": (lambda: _lm("recurrent_gemma"), "RecurrentGemmaForCausalLM has layers of type"),
    "gpt-j": (
        lambda: _lm("gptj", n_embd=32, n_layer=1, n_head=2, rotary_dim=8),
        "AttentionInterface; that of GPTJModel does not",
    ),
    "bloom": (lambda: _lm("bloom", n_layer=1, n_head=2), "AttentionInterface; that of BloomModel does not"),
    "deepseek-v3": (lambda: _lm("deepseek_v3", **_MLA), "DeepseekV3ForCausalLM caches latents"),
    "gemma3n": (
        lambda: _lm("gemma3n_text", **_GEMMA3N),
        "1 layers share those of others",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_served_is_told_what_it_lacks(name: str) -> None:
    build, found = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match="no adapter fits") as error:
        adapt(build(), policy("full"))
    assert "CausalLMHost needs" in str(error.value)
    assert re.search(found, str(error.value)), str(error.value)


def test_a_cache_of_latents_is_refused_without_an_adapter_too() -> None:
    model = _lm("deepseek_v3", **_MLA).eval()
    model.set_attn_implementation("namm")
    with pytest.raises(UnsupportedModelError, match="latents"):
        model(prompt(1, 8), past_key_values=MemoryCache(policy("full")))
