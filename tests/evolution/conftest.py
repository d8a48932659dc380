"""A byte-level tokenizer and made-up documents, so that nothing has to be fetched."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from namm_transfer.evolution.text import Document

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 256 in all, as many as the tiny hosts have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)


def made_up_documents(count: int = 3) -> tuple[Document, ...]:
    """Texts of words drawn at random, a few thousand characters each."""
    rng = np.random.default_rng(0)
    words = ["stone", "river", "early", "question", "market", "gentle", "number", "window", "paper", "winter"]
    texts = []
    for index in range(count):
        sentences = [" ".join(rng.choice(words, rng.integers(4, 9))).capitalize() + "." for _ in range(120)]
        texts.append(Document(f"document{index}", " ".join(sentences)))
    return tuple(texts)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def documents() -> tuple[Document, ...]:
    return made_up_documents()
