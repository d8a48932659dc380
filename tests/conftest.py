"""What all tests share: one thread, and tiny random hosts."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which transformers does

from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from namm_transfer import NAMM, MemoryCache
from namm_transfer.network import NUM_PARAMETERS
from namm_transfer.spectrogram import BINS

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the tensors are tiny; more threads only wait for each other


@cache
def tiny_llama(
    *, layers: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 32, attention: str = "namm", seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama with attention far from uniform, so that what a policy evicts matters."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.35,
        attn_implementation=attention,
        eos_token_id=None,
        pad_token_id=0,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # transformers initialises from the global generator
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.random.set_rng_state(state)
    return model


@pytest.fixture(scope="session")
def llama() -> Callable[..., LlamaForCausalLM]:
    """Makes (once for the same settings) a tiny random Llama."""
    return tiny_llama


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, 256 in all, as many as the tiny hosts have; ``special`` tokens are some of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a tokenizer of bytes."""
    return byte_tokenizer


def random_namm(seed: int = 2, *, bias: float = 0.0) -> NAMM:
    """A random network; with the default seed it evicts about a third of the tokens at each decision."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(NUM_PARAMETERS, generator=generator) * 0.3
    vector[-1] = bias
    mean = torch.rand(BINS, generator=generator) * 0.05
    var = torch.rand(BINS, generator=generator) * 0.01 + 0.0005
    return NAMM.from_vector(vector, feature_mean=mean, feature_var=var)


@pytest.fixture(scope="session")
def make_namm() -> Callable[..., NAMM]:
    """Makes a random NAMM from a seed."""
    return random_namm


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Makes random token ids [rows, count] without 0, the padding.

    No id comes twice in a row: the keys of equal ids in the first layer have equal norms, so that rounding would
    choose between them.
    """

    def make(count: int, rows: int = 1, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randperm(255, generator=generator)[:count] + 1 for _ in range(rows)])

    return make


def retained_positions(cache: MemoryCache) -> list[list[list[list[int]]]]:
    """The retained positions of a memory, by [layer][row][head]."""
    return [
        [
            [layer.tokens["positions"][b, k, : layer.tokens.lengths[b, k]].tolist() for k in range(heads)]
            for b in range(rows)
        ]
        for layer in cache.layers
        for rows, heads in [layer.tokens.lengths.shape]
    ]


@pytest.fixture(scope="session")
def retained() -> Callable[[MemoryCache], list[list[list[list[int]]]]]:
    """Reads the retained positions of a memory, by [layer][row][head]."""
    return retained_positions
