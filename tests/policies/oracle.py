"""Brute force: a tiny Llama run token by token over explicit lists of tokens, in float64, with rules written out.

Nothing here is shared with the package; the rules are written down from their definitions.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

Array = NDArray[np.float64]


@dataclass
class Token:
    """A cached token of one head: its attention is recorded from query 0 on, zeros before it existed."""

    position: int
    key: Array
    value: Array
    attention: list[float] = field(default_factory=list)


Heads = list[list[list[Token]]]
"""The tokens of one layer, by [row][head]."""


@dataclass
class Moment:
    """What a rule knows at a decision: the layer's number, the tokens seen, and the update interval."""

    layer: int
    seen: int
    interval: int


Rule = Callable[[Heads, Moment], list[list[set[int]]]]
"""Gives the positions to keep, by [row][head]."""


class OracleLlama:
    """Runs the weights of a Llama with a rule; ``layers`` holds the tokens by [layer][row][head]."""

    def __init__(self, model: LlamaForCausalLM, rule: Rule, interval: int, rows: int = 1) -> None:
        self.weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
        self.config = model.config
        self.rule, self.interval, self.rows, self.seen = rule, interval, rows, 0
        heads = model.config.num_key_value_heads
        self.layers: list[Heads] = [
            [[[] for _ in range(heads)] for _ in range(rows)] for _ in range(model.config.num_hidden_layers)
        ]

    def feed(self, ids: NDArray[np.int64]) -> Array:
        """One token a row, [rows] -> logits [rows, vocab]."""
        w, config = self.weights, self.config
        hidden = w["model.embed_tokens.weight"][ids]
        for number, layer in enumerate(self.layers):
            name = f"model.layers.{number}."
            x = self._norm(hidden, name + "input_layernorm")
            mixed = np.stack([self._attention(name + "self_attn.", x[b], layer[b]) for b in range(self.rows)])
            hidden = hidden + mixed @ w[name + "self_attn.o_proj.weight"].T
            x = self._norm(hidden, name + "post_attention_layernorm")
            gate, up = x @ w[name + "mlp.gate_proj.weight"].T, x @ w[name + "mlp.up_proj.weight"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ w[name + "mlp.down_proj.weight"].T
            if (self.seen + 1) % self.interval == 0:
                keep = self.rule(layer, Moment(number, self.seen + 1, self.interval))
                for b, heads in enumerate(layer):
                    layer[b] = [[t for t in heads[k] if t.position in keep[b][k]] for k in range(len(heads))]
        self.seen += 1
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        assert config.hidden_act == "silu"
        return self._norm(hidden, "model.norm") @ head.T

    def positions(self) -> list[list[list[list[int]]]]:
        """Retained positions by [layer][row][head]."""
        return [[[[t.position for t in head] for head in row] for row in layer] for layer in self.layers]

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return x / scale * self.weights[name + ".weight"]

    def _rotated(self, x: Array) -> Array:
        half = len(x) // 2
        theta = self.config.rope_parameters["rope_theta"]
        angle = self.seen * theta ** (-np.arange(half) / half)
        first, second = x[:half], x[half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    def _attention(self, name: str, x: Array, heads: list[list[Token]]) -> Array:
        config, w = self.config, self.weights
        width = config.head_dim
        group = config.num_attention_heads // config.num_key_value_heads
        query, key, value = ((w[f"{name}{p}_proj.weight"] @ x).reshape(-1, width) for p in ("q", "k", "v"))
        out = []
        for k, tokens in enumerate(heads):
            tokens.append(Token(self.seen, self._rotated(key[k]), value[k], [0.0] * self.seen))
            keys, values = np.stack([t.key for t in tokens]), np.stack([t.value for t in tokens])
            shared = np.zeros(len(tokens))
            for h in range(k * group, (k + 1) * group):
                logits = keys @ self._rotated(query[h]) / math.sqrt(width)
                weight = np.exp(logits - logits.max())
                weight /= weight.sum()
                shared += weight / group
                out.append(weight @ values)
            for token, amount in zip(tokens, shared, strict=True):
                token.attention.append(float(amount))
        return np.concatenate(out)


# -- rules -------------------------------------------------------------------------------------------------------


def best(tokens: list[Token], scores: list[float], budget: int | float, seen: int) -> set[int]:
    """The newest token, then the highest scores within the budget, the newer first among equals."""
    allowed = round(budget * seen) if isinstance(budget, float) else budget
    order = sorted(range(len(tokens) - 1), key=lambda i: (-scores[i], -tokens[i].position))
    chosen = [len(tokens) - 1, *order][: max(allowed, 1)]
    return {tokens[i].position for i in chosen}


def per_token(budget: int | float, score: Callable[[Token, int, int, Moment], float]) -> Rule:
    """A rule that scores each token by itself: score(token, place, head, moment)."""

    def rule(layer: Heads, moment: Moment) -> list[list[set[int]]]:
        return [
            [
                best(head, [score(t, i, k, moment) for i, t in enumerate(head)], budget, moment.seen)
                for k, head in enumerate(row)
            ]
            for row in layer
        ]

    return rule


def full() -> Rule:
    return lambda layer, moment: [[{t.position for t in head} for head in row] for row in layer]


def streaming(budget: int | float, sinks: int = 4) -> Rule:
    return per_token(budget, lambda t, i, k, m: math.inf if t.position < sinks else t.position)


def key_norm(budget: int | float) -> Rule:
    return per_token(budget, lambda t, i, k, m: -math.sqrt(sum(t.key**2)))


def h2o(budget: int | float) -> Rule:
    """Half of the budget is the newest tokens; the rest those with the largest sum of attention ever received."""

    def rule(layer: Heads, moment: Moment) -> list[list[set[int]]]:
        allowed = min(max(round(budget * moment.seen) if isinstance(budget, float) else budget, 1), moment.seen)

        def one(head: list[Token]) -> set[int]:
            newest = max(allowed // 2, 1)
            recent, older = head[-newest:], head[:-newest]
            heavy = sorted(older, key=lambda t: (-sum(t.attention), -t.position))[: allowed - len(recent)]
            return {t.position for t in (*recent, *heavy)}

        return [[one(head) for head in row] for row in layer]

    return rule


def tova(budget: int | float) -> Rule:
    """The last query's attention, averaged over all heads: every head keeps the same tokens."""

    def rule(layer: Heads, moment: Moment) -> list[list[set[int]]]:
        out = []
        for row in layer:
            assert all([t.position for t in head] == [t.position for t in row[0]] for head in row)
            mean = [sum(head[i].attention[-1] for head in row) / len(row) for i in range(len(row[0]))]
            out.append([best(head, mean, budget, moment.seen) for head in row])
        return out

    return rule


def snapkv(budget: int | float, window: int = 32, kernel: int = 5) -> Rule:
    """The newest tokens, then the attention of as many last queries, averaged over neighbouring older tokens."""

    def rule(layer: Heads, moment: Moment) -> list[list[set[int]]]:
        last = min(window, moment.interval)

        def one(head: list[Token]) -> set[int]:
            older = [sum(t.attention[-last:]) for t in head[: max(len(head) - last, 0)]]
            scores = []
            for i in range(len(head)):
                if i >= len(older):
                    scores.append(math.inf)
                    continue
                around = [older[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < len(older)]
                scores.append(sum(around) / kernel)
            return best(head, scores, budget, moment.seen)

        return [[one(head) for head in row] for row in layer]

    return rule


# -- the NAMM ----------------------------------------------------------------------------------------------------


HANN = [0.5 * (1 - math.cos(2 * math.pi * n / 32)) for n in range(32)]
WAVES = np.array([[HANN[n] * cmath.exp(-2j * math.pi * f * n / 32) for n in range(32)] for f in range(17)])


class OracleNAMM:
    """DESIGN.md section 3, word by word, for one head at a time."""

    def __init__(self, vector: Array, mean: Array, var: Array) -> None:
        sizes = {"w_qkv": 25 * 96, "b_qkv": 96, "w_o": 32 * 50, "b_o": 50, "w": 25, "b": 1}
        parts, start = {}, 0
        for name, size in sizes.items():
            parts[name], start = vector[start : start + size], start + size
        assert start == len(vector) == 4172
        self.w_qkv, self.w_o = parts["w_qkv"].reshape(25, 96), parts["w_o"].reshape(32, 50)
        self.b_qkv, self.b_o, self.w, self.b = parts["b_qkv"], parts["b_o"], parts["w"], parts["b"][0]
        self.mean, self.var = mean, var

    @staticmethod
    def spectrum(attention: list[float]) -> Array:
        """The moving average over all frames of a token's attention since query 0."""
        ema = np.zeros(17)
        padded = [0.0] * 16 + attention  # before the first hop: zeros
        gamma = 0.99**16
        for start in range(0, len(attention), 16):  # frame t: the hop before, then this hop
            magnitude = np.abs(WAVES @ np.array(padded[start : start + 32]))
            ema = gamma * ema + (1 - gamma) * magnitude
        return ema

    def scores(self, head: list[Token], seen: int) -> Array:
        """Scores of a head's tokens, oldest first."""
        rows = []
        for token in head:
            recency = seen - 1 - token.position
            angles = [recency * 50_000 ** (-i / 4) for i in range(4)]
            spectrum = (self.spectrum(token.attention) - self.mean) / np.maximum(np.sqrt(self.var), 1e-7)
            rows.append([*map(math.sin, angles), *map(math.cos, angles), *spectrum])
        x = np.array(rows)
        q, k, v = np.split(x @ self.w_qkv + self.b_qkv, 3, axis=1)
        logits = q @ k.T / math.sqrt(32)
        for i in range(len(x)):
            for j in range(i):  # a token attends to itself and to newer ones
                logits[i, j] = -math.inf
        weight = np.exp(logits - logits.max(1, keepdims=True))
        out = weight / weight.sum(1, keepdims=True) @ v @ self.w_o + self.b_o
        return (x * (1 + out[:, 25:]) + out[:, :25]) @ self.w + self.b

    def threshold(self, layer: Heads, moment: Moment) -> list[list[set[int]]]:
        """Each head drops exactly its own negative tokens; the newest stays."""
        return [[self._positive(head, moment.seen) for head in row] for row in layer]

    def _positive(self, head: list[Token], seen: int) -> set[int]:
        scores = self.scores(head, seen)
        return {t.position for t, s in zip(head, scores, strict=True) if s >= 0 or t is head[-1]}

    def reference(self, layer: Heads, moment: Moment) -> list[list[set[int]]]:
        """Every head of every row drops as many as the one that drops fewest, lowest scores first."""
        negative = []
        for row in layer:
            for head in row:
                scores = self.scores(head, moment.seen)
                drop = [(s, t.position) for s, t in zip(scores, head, strict=True) if s < 0 and t is not head[-1]]
                negative.append([position for _, position in sorted(drop)])
        fewest = min(map(len, negative))
        dropped = iter([set(drop[:fewest]) for drop in negative])
        return [[{t.position for t in head} - next(dropped) for head in row] for row in layer]

    def ranked(self, budget: int | float) -> Rule:
        def rule(layer: Heads, moment: Moment) -> list[list[set[int]]]:
            return [
                [best(head, list(self.scores(head, moment.seen)), budget, moment.seen) for head in row] for row in layer
            ]

        return rule
