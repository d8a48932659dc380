"""What training adds to the host: packed attention, symbolic frames, and dense supervision of the frames.

Shape letters: B clips, T frames, M visual tokens, N questions of L slots per clip, Q tokens of all of a clip's
questions, D hidden size of the text decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerBase

from namm_transfer.eval.video_qa.batches import CELLS, IGNORED, PackedQuestions
from namm_transfer.eval.video_qa.host import TOKENS_PER_FRAME, word_embeddings

FRAME_LAYER, CONTENT_LAYER = 1 / 2, 2 / 3
"""After which part of the layers it is asked what is true at a frame, and for the answer."""
ATTENTION = "packed_questions"
PLAIN_TOKENS = 256
"""Up to so many, plain matrix products are faster than the fused kernel with its backward pass, on a CPU."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    question_length: int,
    questions: int,
    slots: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention over the shared prefix; each question sees the prefix and, causally, itself.

    Here every question has L slots; `slots` int64 [B, Q] names those that the Q tokens behind the prefix fill. What is
    empty stands at the end of a question, where causality hides it. No mask over the whole sequence is ever built, and
    no score between two questions is ever computed.
    """
    prefix = query.shape[2] - slots.shape[1]
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    shared = slice(None, prefix)
    head = _causal(query[:, :, shared], key[:, :, shared], value[:, :, shared], scaling)
    filled = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    asking, own_key, own_value = (
        states.new_zeros(*states.shape[:2], questions * question_length, states.shape[3])
        .scatter(2, filled, states[:, :, prefix:])
        .unflatten(2, (questions, question_length))
        for states in (query, key, value)
    )
    future = torch.ones(question_length, question_length, dtype=torch.bool).triu(1)
    own = (asking @ own_key.transpose(-1, -2)).masked_fill(future, float("-inf")).flatten(2, 3)
    seen = asking.flatten(2, 3) @ key[:, :, shared].transpose(-1, -2)
    weights = torch.softmax(torch.cat([seen, own], dim=-1) * scaling, dim=-1)
    own_weights = weights[..., prefix:].unflatten(2, (questions, question_length))
    tail = weights[..., shared] @ value[:, :, shared] + (own_weights @ own_value).flatten(2, 3)
    return torch.cat([head, tail.gather(2, filled)], dim=2).transpose(1, 2), None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of a prefix to itself, in the way whose backward pass is the faster on a CPU."""
    length = query.shape[2]
    if length > PLAIN_TOKENS:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(future, float("-inf"))
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


class SymbolicFrames(nn.Module):
    """Embeddings of what a frame shows, made of the words for it instead of its pixels.

    The decoder's cheap first lessons, and the target that the vision tower is aligned to: a red circle in
    the picture should look to the decoder like the words "red" and "circle" at a place.

    Args:
        looks: the words for what a token may look like, by respect.
    """

    def __init__(
        self,
        words: nn.Embedding,
        tokenizer: PreTrainedTokenizerBase,
        looks: Mapping[str, Sequence[str]],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        hidden = words.weight.shape[1]
        self.nothing = nn.Parameter(torch.randn(len(looks), hidden, generator=generator) * hidden**-0.5)
        self.columns = nn.Parameter(torch.randn(CELLS, hidden, generator=generator) * hidden**-0.5)
        self.rows = nn.Parameter(torch.randn(CELLS, hidden, generator=generator) * hidden**-0.5)
        self.nowhere = nn.Parameter(torch.randn(1, hidden, generator=generator) * hidden**-0.5)
        # As inside a sentence: where a word is several tokens, it looks like their mean.
        self._known = {
            key: [torch.tensor(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names]
            for key, names in looks.items()
        }
        self._words = [words]  # In a list: the embedding belongs to the model, not to this module.

    def forward(self, truth: dict[str, torch.Tensor]) -> torch.Tensor:
        """[..., D] from int64 [...]: one per respect (the last class: nothing there), and the "cell"."""
        words = self._words[0].weight
        # A place is a column plus a row, so that a step in one direction is one difference everywhere.
        cells = torch.cat([(self.rows[:, None] + self.columns[None]).flatten(0, 1), self.nowhere])
        seen = cells[truth["cell"]]
        for (key, known), nothing in zip(self._known.items(), self.nothing, strict=True):
            told = torch.stack([*(words[ids].mean(0) for ids in known), nothing])
            seen = seen + told[truth[key]]
        return seen


class FrameHeads(nn.Module):
    """Linear read-outs of a hidden state into what is true at a frame."""

    def __init__(self, hidden: int, classes: Mapping[str, int], generator: torch.Generator) -> None:
        super().__init__()
        self.heads = nn.ParameterDict(
            {key: nn.Parameter(0.02 * torch.randn(size, hidden, generator=generator)) for key, size in classes.items()}
        )

    def forward(self, states: torch.Tensor, truth: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy over all heads; states [..., D], truth int64 [...] per head."""
        states = nn.functional.rms_norm(states, states.shape[-1:]).flatten(0, -2)
        losses = [
            cross_entropy(states @ weight.T, truth[key].flatten(), ignore_index=IGNORED)
            for key, weight in self.heads.items()
        ]
        return torch.stack(losses).mean()


def decode_packed(
    model: LlavaNextVideoForConditionalGeneration,
    visual: torch.Tensor,
    packed: PackedQuestions,
    places: torch.Tensor | None = None,
    frames: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the text decoder over visual tokens [B, M, D] and packed questions.

    `places` int64 [B, M] puts symbolic frames where their visual tokens would stand, of `frames` frames.

    Returns:
        states [B, N, L, D] of the question tokens that `lm_head` reads, the states [B, M, D] of the visual tokens
        after `FRAME_LAYER` of the layers, and the states [B, N, L, D] of the question tokens after `CONTENT_LAYER`.
    """
    batch, count, length = packed.tokens.shape
    first = len(packed.before)
    output, slots = _run(model, visual, packed, places, frames)
    depth = model.config.get_text_config().num_hidden_layers
    thinking, watching = (output.hidden_states[round(part * depth)] for part in (CONTENT_LAYER, FRAME_LAYER))
    prefix = first + visual.shape[1]
    filled = slots[..., None].expand(-1, -1, visual.shape[-1])
    last, thinking = (
        states.new_zeros(batch, count * length, states.shape[-1])
        .scatter(1, filled, states[:, prefix:])
        .unflatten(1, (count, length))
        for states in (output.last_hidden_state, thinking)
    )
    return last, watching[:, first:prefix], thinking


def watch(
    model: LlavaNextVideoForConditionalGeneration, visual: torch.Tensor, before: list[int], places: torch.Tensor
) -> torch.Tensor:
    """States [B, M, D] of visual tokens after `FRAME_LAYER` of the layers; all but one of the others are not run.

    Args:
        visual: [B, M, D], of symbolic frames.
        before: tokens ahead of the video.
        places: int64 [B, M], as for `decode_packed`.
    """
    nothing = torch.zeros(len(visual), 0, 1, dtype=torch.int64)
    packed = PackedQuestions(before, lengths=nothing[..., 0], tokens=nothing, labels=nothing, content=nothing)
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    layer = round(FRAME_LAYER * depth)
    # A decoder runs so many of its layers. Its last states are normalised, so that those before are what is wanted.
    config.num_hidden_layers = layer + 1
    try:
        output, _ = _run(model, visual, packed, places)
    finally:
        config.num_hidden_layers = depth
    states: torch.Tensor = output.hidden_states[layer]
    return states[:, len(before) :]


def _run(
    model: LlavaNextVideoForConditionalGeneration,
    visual: torch.Tensor,
    packed: PackedQuestions,
    places: torch.Tensor | None,
    frames: int = 0,
) -> tuple[Any, torch.Tensor]:
    """The text decoder's output with all hidden states, [B, prefix + Q, D] each, and the slots of `_filled_slots`."""
    batch, count, length = packed.tokens.shape
    first = len(packed.before)
    embed = word_embeddings(model)
    start = embed(torch.tensor(packed.before)).expand(batch, -1, -1)
    slots = _filled_slots(packed)
    questions = embed(packed.tokens.flatten(1).gather(1, slots))
    inputs = torch.cat([start, visual.to(start.dtype), questions], dim=1)
    if places is None:
        places, behind = torch.arange(visual.shape[1]).expand(batch, -1), first + visual.shape[1]
    else:
        behind = first + TOKENS_PER_FRAME * frames
    positions = torch.cat([torch.arange(first).expand(batch, -1), first + places, behind + slots % length], dim=1)
    output = model.model.language_model(
        inputs_embeds=inputs,
        # A mask of four dimensions is handed on as it is: `packed_attention` needs none.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
        questions=count,
        question_length=length,
        slots=slots,
    )
    return output, slots


def _filled_slots(packed: PackedQuestions) -> torch.Tensor:
    """int64 [B, Q]: which of the N x L slots of a clip's questions are filled, in their order.

    Of a clip with fewer tokens than another some empty ones are among them.
    """
    empty = (torch.arange(packed.tokens.shape[-1]) >= packed.lengths[..., None]).flatten(1)
    return empty.to(torch.uint8).argsort(dim=1, stable=True)[:, : packed.lengths.sum(1).max()]


def visual_features(
    model: LlavaNextVideoForConditionalGeneration, pixels: torch.Tensor, *, frozen: bool = True
) -> torch.Tensor:
    """Visual tokens [B, 16 T, D] of pixels [B, T, 3, S, S]; with `frozen` only the projector gets gradients."""
    parts = model.model
    with torch.set_grad_enabled(not frozen):
        states = parts.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
        pooled = parts.vision_resampler(states[:, 1:])
    return parts.multi_modal_projector(pooled).unflatten(0, pixels.shape[:2]).flatten(1, 2)


def content_loss(
    model: LlavaNextVideoForConditionalGeneration, thinking: torch.Tensor, content: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the decoder know the answer's first word, layers before it has to say it?

    Args:
        thinking: states [B, N, L, D] of the question tokens.
        content: int64 [B, N, L], token ids or IGNORED.

    Returns:
        the mean cross-entropy, and bool [M] for the M tokens asked: was the likeliest word right?
    """
    asked = content != IGNORED
    states = nn.functional.rms_norm(thinking[asked], thinking.shape[-1:])
    logits = (states @ word_embeddings(model).weight.T).float()
    return cross_entropy(logits, content[asked]), logits.argmax(-1) == content[asked]


def use_packed_attention(model: LlavaNextVideoForConditionalGeneration) -> None:
    """Switch the text decoder to `packed_attention`, and the vision tower to what trains fastest."""
    AttentionInterface.register(ATTENTION, packed_attention)
    # For 65 tokens a frame, plain matrix products beat the fused kernel's backward pass on a CPU.
    model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "eager"})
