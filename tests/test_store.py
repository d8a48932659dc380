"""The token store against lists of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from namm_transfer import kernels
from namm_transfer.store import GROWTH, SLACK, TokenStore

FIELDS = {
    "keys": ((3,), torch.float32),
    "values": ((2,), torch.float32),
    "positions": ((), torch.int32),
    "state": ((2, 2), torch.float64),
}
Model = list[list[list[tuple[int, float]]]]
"""[row][head] -> (position, state) of each token."""


def new_tokens(rows: int, heads: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens [rows, heads, n] whose keys tell row, head and position."""
    row = torch.arange(rows).view(-1, 1, 1).expand_as(positions)
    head = torch.arange(heads).view(1, -1, 1).expand_as(positions)
    keys = torch.stack([row, head, positions], -1).float()
    return {"keys": keys, "values": -keys[..., 1:], "positions": positions.int()}


def check(store: TokenStore, model: Model, owners: list[int]) -> None:
    """Everything the store says must follow from the lists; ``owners`` are the rows' numbers when they were made."""
    lengths = [[len(head) for head in row] for row in model]
    longest = max(max(row) for row in lengths)
    assert store.lengths.tolist() == lengths
    assert store.width == longest
    assert store.capacity >= longest
    assert not store.even or {n for row in lengths for n in row} == {longest}
    valid, keys, values = store.valid(), store["keys"], store["values"]
    for b, row in enumerate(model):
        for k, head in enumerate(row):
            n = len(head)
            assert valid[b, k].tolist() == [True] * n + [False] * (longest - n)
            assert store["positions"][b, k, :n].tolist() == [p for p, _ in head]
            assert values[b, k, :n].tolist() == [[-k, -p] for p, _ in head]
            assert keys[b, k, :n].tolist() == [[owners[b], k, p] for p, _ in head]
            assert store["state"][b, k, :n, 1, 0].tolist() == [s for _, s in head]
    fields = dict(store)
    assert store.bytes(("keys",)) == 4 * fields["keys"].numel()
    tables = 1 if store.flat is None else 3  # lengths, and where the heads' places start and how many they are
    held = sum(v.numel() * v.element_size() for v in fields.values())
    assert store.bytes() == held + tables * 8 * store.lengths.numel()
    # as they lie: what the kernels read
    flat, _, starts = store.places()
    for b, row in enumerate(model):
        for k, head in enumerate(row):
            lying = flat[starts[b, k] : starts[b, k] + len(head)]
            assert lying.tolist() == [[owners[b], k, p] for p, _ in head]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 3), heads=st.integers(1, 3))
@pytest.mark.parametrize("layout", ["ragged", "padded", "ragged, not compiled"])
def test_any_history(data: st.DataObject, rows: int, heads: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "ragged, not compiled":
        monkeypatch.setattr(kernels, "cpu", lambda: None)
        layout = "ragged"
    store = TokenStore.empty(rows, heads, FIELDS, torch.device("cpu"), layout)
    model: Model = [[[] for _ in range(heads)] for _ in range(rows)]
    owners, clock = list(range(rows)), 0
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        step = data.draw(
            st.sampled_from(
                ["append", "append_part", "append_some", "keep", "keep_part", "mark", "trim", "select", "clear"]
            )
        )
        rows, longest = len(model), store.width
        rng = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
        if step in ("append", "append_part"):
            count = data.draw(st.integers(1, 70), "count")
            first = data.draw(st.integers(0, rows - 1)) if step == "append_part" else 0
            last = data.draw(st.integers(first + 1, rows)) if step == "append_part" else rows
            store.reserve(count)
            part = store.rows(first, last)
            fresh = new_tokens(rows, heads, torch.arange(clock, clock + count).expand(rows, heads, -1))
            fresh["keys"][..., 0] = torch.tensor(owners).view(-1, 1, 1)
            part.append({k: v[first:last] for k, v in fresh.items()})
            store.recount()
            for row in model[first:last]:
                for head in row:
                    head.extend((p, 0.0) for p in range(clock, clock + count))
            clock += count
        elif step == "append_some":
            moving = torch.rand(rows, generator=rng) < 0.5
            count = data.draw(st.integers(1, 5), "count")
            store.reserve(count)
            fresh = new_tokens(rows, heads, torch.arange(clock, clock + count).expand(rows, heads, -1))
            fresh["keys"][..., 0] = torch.tensor(owners).view(-1, 1, 1)
            seen = [clock] * rows
            store.append_some(fresh["keys"], fresh["values"], seen, moving.tolist())
            for b, row in enumerate(model):
                for head in row:
                    if moving[b]:
                        head.extend((p, 0.0) for p in range(clock, clock + count))
            clock += count
        elif step in ("keep", "keep_part") and longest:
            first = data.draw(st.integers(0, rows - 1)) if step == "keep_part" else 0
            part = store.rows(first, rows)
            mask = torch.rand(rows - first, heads, part.width, generator=rng) < data.draw(st.sampled_from([0, 0.4, 1]))
            part.keep(mask)
            store.recount()
            for b, row in enumerate(model[first:]):
                for k, head in enumerate(row):
                    head[:] = [t for i, t in enumerate(head) if mask[b, k, i]]
        elif step == "mark" and longest:  # state written through a part lands in the store
            first = data.draw(st.integers(0, rows - 1))
            store.rows(first, rows, aligned=True)["state"].add_(1.0)
            model[first:] = [[[(p, s + 1) for p, s in head] for head in row] for row in model[first:]]
        elif step == "trim":
            store.trim(settled=True)
            assert store.capacity <= store.width + 2 * SLACK
            if store.flat is not None:
                used = sum(len(head) for row in model for head in row)
                assert len(store.flat.fields["keys"]) <= used + 2 * SLACK * len(model) * heads
        elif step == "select":
            index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            before, store = store, store.select(torch.tensor(index))
            before["state"].fill_(-1.0)  # a copy: the old one may change
            before.lengths.zero_()
            model, owners = [[list(h) for h in model[i]] for i in index], [owners[i] for i in index]
        elif step == "clear":
            gone = data.draw(st.lists(st.integers(0, rows - 1), max_size=2, unique=True))
            store.clear(torch.tensor(gone, dtype=torch.int64))
            for b in gone:
                model[b] = [[] for _ in range(heads)]
        check(store, model, owners)


def test_growth_copies_each_token_a_bounded_number_of_times() -> None:
    store, moved = TokenStore.empty(1, 1, {"positions": ((), torch.int32)}, torch.device("cpu")), 0
    for i in range(4000):
        before = store.capacity
        store.reserve(1)
        moved += store.width if store.capacity != before else 0
        store.append({"positions": torch.full((1, 1, 1), i)})
    assert moved < 4000 / (GROWTH - 1) * 1.5
    assert store.capacity <= 4000 * GROWTH + SLACK


def test_to_moves_everything() -> None:
    store = TokenStore.empty(2, 1, FIELDS, torch.device("cpu"))
    store.reserve(4)
    store.append(new_tokens(2, 1, torch.arange(4).expand(2, 1, -1)))
    moved = store.to("meta")
    assert {v.device.type for _, v in moved} | {moved.lengths.device.type} == {"meta"}
    assert (moved.width, moved.even, moved.capacity) == (store.width, store.even, store.capacity)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 1, 5), (1, 2, 5), (5,)])
def test_a_mask_may_speak_of_all_heads_at_once(
    shape: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "cpu", lambda: None)
    store = TokenStore.empty(2, 2, FIELDS, torch.device("cpu"))
    store.reserve(5)
    store.append(new_tokens(2, 2, torch.arange(5).expand(2, 2, -1)))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    store.keep(mask)
    for b, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        kept = mask.expand(2, 2, 5)[b, k].nonzero().flatten().tolist()
        n = int(store.lengths[b, k])
        assert store["positions"][b, k, :n].tolist() == kept
        assert store["keys"][b, k, :n].tolist() == [[b, k, p] for p in kept]
    for width in (store.width - 1, store.width + 3):
        with pytest.raises(RuntimeError):
            store.keep(torch.ones(2, 2, width, dtype=torch.bool))
