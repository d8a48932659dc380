"""The encoder written out without its modules, against transformers' own call of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DecisionTransformerConfig, DecisionTransformerModel
from transformers.pytorch_utils import Conv1D

from namm_transfer import adapt, policy
from namm_transfer.adapters.gpt2_blocks import Blocks

ROWS, STEPS = 3, 40


def make_model(**settings: Any) -> DecisionTransformerModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"state_dim": 4, "act_dim": 2, "hidden_size": 24, "n_layer": 3, "n_head": 2, "n_inner": 40}
        model = DecisionTransformerModel(DecisionTransformerConfig(max_ep_len=64, **(sizes | settings))).eval()
        for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def play(model: DecisionTransformerModel, interrupt: Any = None) -> torch.Tensor:
    """Actions over an episode whose row 1 begins anew at step 7; ``interrupt(step)`` is called before each."""
    generator = torch.Generator().manual_seed(1)
    states, out = torch.randn(STEPS, ROWS, 4, generator=generator), []
    with adapt(model, policy("h2o", budget=20), 16) as host:
        host.reset(ROWS)
        for t in range(STEPS):
            if t == 7:
                host.reset_rows([1])
            if interrupt is not None:
                interrupt(t)
            out.append(host.step(states[t], torch.linspace(0, 1, ROWS)))
    return torch.stack(out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_head": 1, "activation_function": "gelu_new"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "n_layer": 1, "layer_norm_epsilon": 1e-2},
    ],
    ids=str,
)
def test_actions_are_those_of_the_encoder(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**settings)
    assert Blocks.of(model.encoder) is not None
    without = play(model)
    monkeypatch.setattr(Blocks, "of", lambda encoder: None)
    torch.testing.assert_close(without, play(model), atol=2e-6, rtol=1e-5)


def test_in_bfloat16() -> None:
    model = make_model()
    exact = play(model)
    torch.testing.assert_close(play(model.bfloat16()).float(), exact, atol=0.15, rtol=0.15)


@pytest.mark.parametrize("part", ["", "h.1", "h.1.attn", "h.0.mlp.c_fc", "h.2.mlp.act", "ln_f"])
def test_a_hook_is_called_whenever_it_comes(part: str) -> None:
    model = make_model()
    plain, shapes = play(model), []

    def interrupt(step: int) -> None:
        if step == STEPS - 5:
            hooked = model.encoder.get_submodule(part)
            hooked.register_forward_hook(lambda module, args, out: shapes.append(module), with_kwargs=False)

    torch.testing.assert_close(play(model, interrupt), plain, atol=2e-6, rtol=1e-5)
    assert len(shapes) == 5


class Adapted(nn.Module):
    """What low-rank adapters do with a projection."""

    def __init__(self, inner: Conv1D) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.1 * x.sum(-1, keepdim=True)


def test_changed_modules_are_called() -> None:
    model = make_model()
    plain = play(model)
    model.encoder.h[1].attn.c_attn = Adapted(model.encoder.h[1].attn.c_attn)
    assert Blocks.of(model.encoder) is None
    assert (play(model) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("part", ["", "h.0.mlp", "ln_f"])
def test_a_replaced_forward_is_called(part: str) -> None:
    model, calls = make_model(), []
    replaced = model.encoder.get_submodule(part)
    forward = replaced.forward
    replaced.forward = lambda *args, **kwargs: (calls.append(part), forward(*args, **kwargs))[1]
    torch.testing.assert_close(play(model), play(make_model()), atol=2e-6, rtol=1e-5)
    assert len(calls) == STEPS


class Doubled(nn.Embedding):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(index)


class Halved(nn.Dropout):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / 2


def exchange_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(make_model().encoder.h[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden: 2 * forward(self, hidden))


def test_other_kinds_of_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled, halved = make_model(), make_model()
    doubled.encoder.wpe = Doubled.from_pretrained(doubled.encoder.wpe.weight.data)
    halved.encoder.h[1].mlp.dropout = Halved()
    assert Blocks.of(doubled.encoder) is Blocks.of(halved.encoder) is None
    exchange_mlp(monkeypatch)
    assert Blocks.of(make_model().encoder) is None


def assign(model: DecisionTransformerModel) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def exchange_parameter(model: DecisionTransformerModel) -> None:
    fc = model.encoder.h[0].mlp.c_fc
    fc.weight = nn.Parameter(fc.weight * 2, requires_grad=False)


def exchange_activation(model: DecisionTransformerModel) -> None:
    model.encoder.h[1].mlp.act = nn.Tanh()


def exchange_forward(model: DecisionTransformerModel) -> None:
    model.encoder.h[1].mlp.forward = torch.zeros_like


def exchange_projection(model: DecisionTransformerModel) -> None:
    model.encoder.h[1].attn.c_attn = Adapted(model.encoder.h[1].attn.c_attn)


@pytest.mark.parametrize(
    "change", [assign, exchange_parameter, exchange_activation, exchange_forward, exchange_projection]
)
def test_changes_within_an_episode_count(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def played() -> torch.Tensor:
        model = make_model()
        return play(model, lambda step: change(model) if step == 20 else None)

    without = played()
    monkeypatch.setattr(Blocks, "of", lambda encoder: None)
    by_the_encoder = played()
    torch.testing.assert_close(without, by_the_encoder, atol=2e-6, rtol=1e-5)
    assert (by_the_encoder - play(make_model())).abs().max() > 1e-2


def test_dropout_in_force_is_not_left_out() -> None:
    model = make_model()
    blocks = Blocks.of(model.encoder)
    assert blocks is not None
    assert blocks.current
    model.encoder.h[2].mlp.dropout.train()
    assert not blocks.current


def test_another_encoder_is_left_to_itself() -> None:
    assert Blocks.of(nn.Linear(2, 2)) is None
    assert Blocks.of(make_model(add_cross_attention=True).encoder) is None
