"""An essay's own next tokens."""

from __future__ import annotations

import numpy as np
import torch

from namm_transfer.evolution.page import Page, Sample

__all__ = ["continuation"]


def continuation(page: Page, rng: np.random.Generator) -> Sample:
    """Plain text without a chat; what follows `page.context_tokens` counts, at most 64 tokens."""
    text = " ".join(page.passage(page.context_tokens + 64, rng))
    begin = page.tokenizer("").input_ids[:1]  # of a tokenizer whose models know no text without it: the first token
    ids = torch.tensor([*begin, *page.tokenizer(text, add_special_tokens=False).input_ids])
    start = min(page.context_tokens, len(ids) * 7 // 8)
    ids = ids[: start + 64]
    return Sample("continuation", page.document.name, ids, torch.arange(start, len(ids)))
