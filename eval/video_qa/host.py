"""The packaged video LLMs: each a LLaVA-NeXT-Video with its tokenizer and processing.

Shape letters: T frames, S side of a frame in pixels, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BatchEncoding,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from namm_transfer.errors import CheckpointError, DataError
from namm_transfer.eval.checkpoint import load_weights
from namm_transfer.eval.language_model import language_model
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.video_qa.backbone import ADAPTERS, base_of, end_with, load_adapted, put_decoder
from namm_transfer.eval.video_qa.clips import DIRECTIONS, SIDE
from namm_transfer.eval.video_qa.drawing import COLOURS, SHAPES
from namm_transfer.eval.video_qa.questions import LETTERS, VIDEO_PLACEHOLDER
from namm_transfer.evolution.hosts import LanguageHost

_HOSTS = Path(__file__).resolve().parent.parent / "assets" / "hosts"
PACKAGED = _HOSTS / "video_llm"
PACKAGED_HOSTS: dict[str, Path] = {
    "llava_next_video": PACKAGED,
    "llava_next_video_suite": _HOSTS / "suite_llm",
    "llava_next_video_suite_256": _HOSTS / "suite_llm_256",
    "llava_next_video_suite_1024": _HOSTS / "suite_llm_1024",
    "llava_next_video_smollm2": _HOSTS / "suite_smollm2",
}
"""Folders of the packaged video LLMs, by name: of the packaged clips' questions, of the suite's about clips of 64
frames, of those about clips of 256 and of 1,024, and on SmolLM2, of those about 64."""
PATCH = 8
POOL = 2
TOKENS_PER_FRAME = (SIDE // PATCH // POOL) ** 2
ANSWER_TOKENS, CHAT_ANSWER_TOKENS = 3, 16
"""Of an answer at most: a word is one token of the packaged hosts' own tokenizer, a few of a language model's."""
_DATE = {
    "%d": "26", "%-d": "26", "%m": "07", "%B": "July", "%b": "Jul", "%Y": "2024", "%y": "24", "%A": "Friday",
    "%a": "Fri", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
_ONE_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{directive}', '{value}')" for directive, value in _DATE.items())
    + " }}{% endmacro %}\n"
)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", VIDEO_PLACEHOLDER, "<image>")
QUESTION_WORDS = ("What", "Which", "way", "did", "move", "was", "came", "the", "first", "last", "after", "before")
WORDS: tuple[str, ...] = ("colour", "shape", *QUESTION_WORDS, *COLOURS, *SHAPES, *DIRECTIONS)
"""Of the questions and answers about the packaged clips."""


def build_tokenizer(known: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows exactly the words of some questions and answers, and what prompts add."""
    words = [*SPECIAL_TOKENS, *LETTERS, "Answer", ":", "?", *known]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[VIDEO_PLACEHOLDER, "<image>"],
        padding_side="left",
    )


def build_model(
    seed: int, tokenizer: PreTrainedTokenizerBase | None = None, stretch: float = 1.0
) -> LlavaNextVideoForConditionalGeneration:
    """An untrained host, its weights drawn from `seed` without touching the global generator.

    Args:
        tokenizer: whose words it is to know; by default those of the packaged clips' questions.
        stretch: what the decoder's positions are divided by, so that it may have so many times as many.
    """
    tokenizer = tokenizer or build_tokenizer()
    rope = {"rope_type": "default"} if stretch == 1 else {"rope_type": "linear", "factor": float(stretch)}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=round(4096 * stretch),
        rope_parameters={"rope_theta": 10000.0, **rope},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _untrained(text, VideoQAProcessor(tokenizer))
        # Tied embeddings are read-out weights too: at the usual 0.02 their logits start out too flat.
        embeddings = word_embeddings(model).weight
        nn.init.normal_(embeddings, std=embeddings.shape[1] ** -0.5)
    return model


def build_on(language: LanguageHost, seed: int) -> LlavaNextVideoForConditionalGeneration:
    """A host whose decoder is a language model, frozen; vision tower and projector are drawn from `seed`.

    Raises:
        CheckpointError: the tokenizer does not fit (`chat_processor`), or spares tokens that have no embedding.
    """
    processor = chat_processor(language.tokenizer)
    known = language.model.config.vocab_size
    if (placed := token_id(language.tokenizer, processor.video_token)) >= known:
        raise CheckpointError(
            f"{language.name} has {known} embeddings, and none for {processor.video_token!r}, {placed}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _untrained(language.model.config, processor)
    put_decoder(model, language)
    return model


def _untrained(text: PretrainedConfig, processor: VideoQAProcessor) -> LlavaNextVideoForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=96,
        ),
        text_config=text,
        tie_word_embeddings=True,
        video_token_index=token_id(tokenizer, processor.video_token),
        image_token_index=token_id(tokenizer, processor.image_token),
        vision_feature_layer=-1,
        spatial_pool_stride=POOL,
        image_seq_length=(SIDE // PATCH) ** 2,
        video_seq_length=TOKENS_PER_FRAME,
    )
    model = LlavaNextVideoForConditionalGeneration(config)
    end_with(model, tokenizer)
    return model


def on_one_day(template: str) -> str:
    """A chat template that writes one date where it would write today's, so that a prompt is the same on every day."""
    return _ONE_DAY + template  # whose own first line the end of the line keeps one


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def word_embeddings(model: LlavaNextVideoForConditionalGeneration) -> nn.Embedding:
    """The text decoder's embeddings, which are its read-out weights as well."""
    return cast(nn.Embedding, model.get_input_embeddings())


@dataclass(frozen=True)
class VideoQAProcessor:
    """Turns decoded frames and a prompt into the model's inputs, and generated tokens into text.

    A prompt is what a user says where the tokenizer has a chat template, else all there is.

    Attributes:
        video_token: what stands for a visual token; never read, since its embedding is replaced.
        image_token: what would stand for one of an image.
        answer_tokens: how many tokens the answer to a question has at most.
    """

    tokenizer: PreTrainedTokenizerBase
    video_token: str = VIDEO_PLACEHOLDER
    image_token: str = "<image>"
    answer_tokens: int = ANSWER_TOKENS

    def around(self, prompt: str) -> tuple[list[int], list[int]]:
        """Tokens before and behind the one `<video>` of a prompt.

        Raises:
            DataError: a prompt without exactly one `<video>`.
        """
        if prompt.count(VIDEO_PLACEHOLDER) != 1:
            raise DataError(f"expected exactly one {VIDEO_PLACEHOLDER} in the prompt, got: {prompt!r}")
        chat = bool(self.tokenizer.chat_template)
        if chat:
            said = [{"role": "user", "content": prompt}]
            written = self.tokenizer.apply_chat_template(
                said,
                chat_template=on_one_day(self.tokenizer.get_chat_template()),
                add_generation_prompt=True,
                tokenize=False,
            )
            prompt = cast(str, written)
        before, behind = prompt.split(VIDEO_PLACEHOLDER)
        return (
            self.tokenizer(before, add_special_tokens=not chat)["input_ids"],
            self.tokenizer(behind, add_special_tokens=False)["input_ids"],
        )

    def __call__(self, frames: np.ndarray, prompt: str) -> BatchEncoding:
        """Model inputs for one video and one prompt.

        Args:
            frames: uint8 [T, S, S, 3] RGB.
            prompt: text with one `<video>` where the video belongs.

        Returns:
            `input_ids` and `attention_mask` int64 [1, L], `pixel_values_videos` float32 [1, T, 3, S, S].

        Raises:
            DataError: frames of another shape or type, or a prompt without exactly one `<video>`.
        """
        before, behind = self.around(prompt)
        pixels = pixel_values(frames)[None]
        visual = [token_id(self.tokenizer, self.video_token)] * (TOKENS_PER_FRAME * len(frames))
        ids = torch.tensor([[*before, *visual, *behind]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels})

    def decode(self, tokens: torch.Tensor) -> str:
        """Text of generated tokens, special tokens left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def chat_processor(tokenizer: PreTrainedTokenizerBase) -> VideoQAProcessor:
    """The processor of a host on a language model, two of whose spare tokens stand for what is seen.

    Raises:
        CheckpointError: the tokenizer has no chat template, not two special tokens to spare, or is not a fast one.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        lacking = "chat template" if tokenizer.is_fast else "fast implementation"
        raise CheckpointError(f"the tokenizer of {tokenizer.name_or_path} has no {lacking}, which is needed")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    spare = [token for token in special if token not in used and token not in str(tokenizer.chat_template)]
    if len(spare) < 2:
        raise CheckpointError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(spare)} special tokens to spare ({spare}); expected 2"
        )
    return VideoQAProcessor(tokenizer, video_token=spare[-1], image_token=spare[-2], answer_tokens=CHAT_ANSWER_TOKENS)


def pixel_values(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, S, S, 3] to float32 [T, 3, S, S] in -1..1.

    Raises:
        DataError: frames of another shape or type.
    """
    expected = (SIDE, SIDE, 3)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected or not len(frames):
        raise DataError(f"expected uint8 frames [T, {SIDE}, {SIDE}, 3], got {frames.dtype} {list(frames.shape)}")
    return rearrange(torch.from_numpy(frames), "t h w c -> t c h w").float() / 127.5 - 1.0


def save_host(
    model: LlavaNextVideoForConditionalGeneration, path: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write float16 weights, configuration and the tokenizer it was built for; the model itself stays float32."""
    path.mkdir(parents=True, exist_ok=True)
    half = LlavaNextVideoForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(path)
    (tokenizer or build_tokenizer()).save_pretrained(path)


def identity(folder: Path) -> dict[str, str]:
    """What a host is, for the record: its digest; and of one on a language model, what that is.

    Raises:
        CheckpointError: its settings cannot be read.
        DataError: peft is missing, or the language model is gone.
    """
    told = {"host": digest(folder)}
    if (folder / ADAPTERS).is_file():
        try:
            told["language model"] = language_model(base_of(folder))
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
    return told


def is_host(folder: Path) -> bool:
    """Whether a folder looks like one that `load_host` reads."""
    return any((folder / name).is_file() for name in ("tokenizer.json", ADAPTERS))


def load_host(path: Path = PACKAGED) -> tuple[LlavaNextVideoForConditionalGeneration, VideoQAProcessor]:
    """The host in evaluation mode, and its processor; in float32, or in the type of the language model that it is on.

    Raises:
        CheckpointError: the folder lacks the weights, the configuration or the tokenizer, or they cannot be read.
        DataError: it is on a language model, which cannot be fetched.
    """
    if (path / ADAPTERS).is_file():
        adapted, known = load_adapted(path)
        processor = chat_processor(known)
        if token_id(known, processor.video_token) != adapted.config.video_token_id:
            raise CheckpointError(
                f"{path} was trained with token {adapted.config.video_token_id} for what is seen; the tokenizer of "
                f"{known.name_or_path} spares {processor.video_token!r}"
            )
        return adapted, processor
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise CheckpointError(f"no {name} in {path}: expected a folder written by `train video_llm`")
    model = load_weights(LlavaNextVideoForConditionalGeneration, path, "video LLM")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"{path}/tokenizer.json cannot be read: {error}") from error
    return model, VideoQAProcessor(tokenizer)
