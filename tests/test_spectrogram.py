"""The spectrum of attention columns against the DFT written out, and torch's own."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from namm_transfer import NAMM, MemoryCache, kernels
from namm_transfer.policies.namm import NAMMPolicy
from namm_transfer.scoring import LayerView
from namm_transfer.spectrogram import BINS, DECAY, HOP, WINDOW, advance, loaded
from namm_transfer.store import TokenStore
from namm_transfer.tiles import Observed


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs with the compiled kernel and with torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "cpu", lambda: None)
    elif kernels.cpu() is None:
        pytest.skip("no compiler")


def advanced(ema: Tensor, previous: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `advance`, on copies, and for one head of one row too."""
    found, left = ema.clone(), previous.clone()
    single = ema.ndim == 2
    advance(*(x[None, None] if single else x for x in (found, left, rows)))
    return found, left


def explicit(column: list[float], ema: list[float], previous: list[float]) -> list[float]:
    """The moving average after a column of whole hops, in loops."""
    series = previous + column
    for start in range(0, len(column), 16):
        for f in range(17):
            x = sum(
                series[start + n] * 0.5 * (1 - math.cos(2 * math.pi * n / 32)) * cmath.exp(-2j * math.pi * f * n / 32)
                for n in range(32)
            )
            ema[f] = 0.99**16 * ema[f] + (1 - 0.99**16) * abs(x)
    return ema


def test_explicit_dft() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 3, 5 * HOP, 4, generator=generator)
    ema = torch.rand(2, 3, 4, BINS, generator=generator)
    previous = torch.rand(2, 3, 4, HOP, generator=generator)
    found, left = advanced(ema, previous, rows)
    assert torch.equal(left, rows[..., -HOP:, :].mT)
    for i in range(2):
        for k in range(3):
            for n in range(4):
                want = explicit(rows[i, k, :, n].tolist(), ema[i, k, n].tolist(), previous[i, k, n].tolist())
                torch.testing.assert_close(found[i, k, n], torch.tensor(want), atol=2e-6, rtol=1e-5)


def test_torch_stft() -> None:
    rows = torch.rand(6 * HOP, 3, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(HOP, 3), rows]).T
    window = torch.hann_window(WINDOW, periodic=True)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True).abs()  # [3, 17, 6]
    want = torch.zeros(3, BINS)
    for t in range(6):
        want = DECAY * want + (1 - DECAY) * spectrum[..., t]
    found, _ = advanced(torch.zeros(3, BINS), torch.zeros(3, HOP), rows)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_into_hops(cuts: list[int], seed: int) -> None:
    rows = torch.rand(2, 1, sum(cuts) * HOP, 5, generator=torch.Generator().manual_seed(seed))
    whole = advanced(torch.zeros(2, 1, 5, BINS), torch.zeros(2, 1, 5, HOP), rows)
    part = torch.zeros(2, 1, 5, BINS), torch.zeros(2, 1, 5, HOP)
    for piece in rows.split([n * HOP for n in cuts], dim=2):
        part = advanced(*part, piece)
    torch.testing.assert_close(part[0], whole[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(part[1], whole[1])


def test_a_token_never_attended_to_stays_silent() -> None:
    found, left = advanced(torch.zeros(3, BINS), torch.zeros(3, HOP), torch.zeros(4 * HOP, 3))
    assert not found.any()
    assert not left.any()


def test_constant_attention_is_the_lowest_two_bins() -> None:
    found, _ = advanced(torch.zeros(1, BINS), torch.ones(1, HOP), torch.ones(HOP, 1))
    # a Hann window of 32 sums to 16, and its own transform has half of that at the neighbouring bin
    want = torch.tensor([16.0, 8.0] + [0.0] * 15) * (1 - DECAY)
    torch.testing.assert_close(found[0], want, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_apart(data: st.DataObject, dtype: torch.dtype) -> None:
    """Queries come a few at a time, to some rows, each at its own point: as if each row's had come in whole hops."""
    rows, heads, tokens = data.draw(st.integers(1, 4)), 2, data.draw(st.sampled_from([3, 16, 21]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    namm = NAMMPolicy(namm=NAMM())
    fields = {"keys": ((4,), dtype), "values": ((4,), dtype), "positions": ((), torch.int32)}
    fields |= namm.fields(dtype) | namm.unfinished_fields(dtype)
    made = {k: torch.zeros((rows, heads, tokens, *shape), dtype=kind) for k, (shape, kind) in fields.items()}
    store = TokenStore.from_padded(made, torch.full((rows, heads), tokens))
    queries = [0] * rows
    history: list[list[Tensor]] = [[] for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 30))):
        count = data.draw(st.integers(1, 15))
        moving = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        attn = torch.rand(rows, heads, count, tokens, generator=generator) / tokens
        namm.observe_apart(store, 0, 64, list(queries), moving, Observed(attn))
        for row in range(rows):
            if moving[row]:
                queries[row] += count
                history[row].append(attn[row])
    for row in range(rows):
        whole = torch.cat([torch.zeros(heads, 0, tokens), *history[row]], dim=1)
        hops = whole.shape[1] // HOP * HOP
        ema, previous = torch.zeros(1, heads, tokens, BINS), torch.zeros(1, heads, tokens, HOP)
        if hops:
            advance(ema, previous, whole[None, :, :hops])
        waiting = torch.zeros(heads, tokens, HOP)
        waiting[..., : whole.shape[1] - hops] = whole[:, hops:].mT
        exact = {"ema": ema[0], "previous": previous[0], "waiting": waiting}
        for name, want in exact.items():
            found = loaded(store[name][row])
            # in float16 each of the 32 values of a frame is off by 2^-11 of itself, and so is what is stored of them
            near = (
                {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 16 / tokens / 2**11, "rtol": 2e-3}
            )
            torch.testing.assert_close(found, want, **near)


class Watching(NAMMPolicy):
    """Counts what it is shown."""

    shown: list[int] = []  # noqa: RUF012

    def observe(self, view: LayerView, attn: Observed) -> None:
        if view.layer == 0:
            self.shown.append(attn.count)
        super().observe(view, attn)


def test_a_policy_of_ones_own_is_shown_every_tile(llama: Callable[..., PreTrainedModel]) -> None:
    Watching.shown.clear()
    cache = MemoryCache(Watching(namm=NAMM(), budget=0.5), 32)
    for count in (5, 5, 6, 3):
        llama()(torch.arange(count)[None], past_key_values=cache)
    assert Watching.shown == [5, 5, 6, 3]
