"""Training the packaged video LLMs on one CPU core, from cheap lessons to whole videos.

1. *told*: the lower half of the text decoder learns what is true at symbolic frames, embeddings made of words; for
   decoders so large that to answer as well costs much.
2. *questions*, *options*: the text decoder answers about symbolic frames.
3. *frames*: the vision tower and the projector learn to turn pixels into those same embeddings.
4. *video*: the text decoder and the projector answer about real frames, few at first, then all 64.
5. *whole*: everything does, so that the tower learns to tell what questions search for.

Clips are drawn on the fly from seeds that no other split uses, and go through mp4 before the tower sees them.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import LlavaNextVideoForConditionalGeneration

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.task import host_folder
from namm_transfer.eval.video import through_mp4
from namm_transfer.eval.video_qa.backbone import (
    ADAPTERS,
    add_adapters,
    load_language,
    low_rank,
    own_parameters,
    read_adapted,
    save_adapted,
)
from namm_transfer.eval.video_qa.batches import CELLS, IGNORED, UNASKED, Material, pack_questions
from namm_transfer.eval.video_qa.clips import FPS, FRAMES
from namm_transfer.eval.video_qa.evaluate import held_out_accuracy
from namm_transfer.eval.video_qa.host import (
    PACKAGED_HOSTS,
    TOKENS_PER_FRAME,
    VideoQAProcessor,
    build_model,
    build_on,
    build_tokenizer,
    chat_processor,
    load_host,
    pixel_values,
    save_host,
    word_embeddings,
)
from namm_transfer.eval.video_qa.model import (
    FrameHeads,
    SymbolicFrames,
    content_loss,
    decode_packed,
    use_packed_attention,
    visual_features,
    watch,
)
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER
from namm_transfer.eval.video_qa.shapes import Shapes
from namm_transfer.eval.video_qa.suite.evaluate import held_out_accuracy as suite_accuracy
from namm_transfer.eval.video_qa.suite.material import Suite
from namm_transfer.eval.video_training import LossAt, Stage, Trainer, check_stages, is_finished
from namm_transfer.kernels import compiler

FRAME_WEIGHT = 2.0
_SHAPES = (
    Stage("questions", steps=4000, batch=8, learning_rate=1e-3, frames=16, goal=0.88, figure="word"),
    Stage("options", steps=3000, batch=8, learning_rate=1e-3, frames=16, goal=0.92, figure="answer"),
    Stage("frames", steps=1200, batch=64, learning_rate=1.5e-3),
    Stage("video", steps=1500, batch=4, learning_rate=1e-3, frames=16, goal=0.86, figure="answer"),
    Stage("video", steps=400, batch=4, learning_rate=5e-4, frames=32, goal=0.90, figure="answer"),
    Stage("video", steps=300, batch=4, learning_rate=6e-4, frames=64),
    # the packaged host had these in runs of their own (`start`), the last one with another seed
    Stage("video", steps=800, batch=4, learning_rate=6e-4, frames=64),
    Stage("whole", steps=500, batch=4, learning_rate=6e-4, frames=64),
    Stage("whole", steps=600, batch=4, learning_rate=8e-4, frames=64),
)
_SUITE = (
    Stage("options", steps=12000, batch=8, learning_rate=1e-3, frames=64, goal=0.92, figure="answer"),
    Stage("frames", steps=1500, batch=64, learning_rate=1.5e-3),
    Stage("video", steps=1500, batch=4, learning_rate=6e-4, frames=64),
)
FIGURES = {
    "told": (),
    "questions": ("word",),
    "options": ("word", "answer"),
    "frames": (),
    "video": ("word", "answer"),
    "whole": ("word", "answer"),
}
"""The kinds of stages, and the figures of each that a goal can be set for: the others are losses, which fall."""
MATERIALS: dict[str, tuple[Material[Any], tuple[Stage, ...], Callable[..., Any]]] = {
    "shapes": (Shapes(), _SHAPES, held_out_accuracy),
    "suite": (Suite(), _SUITE, suite_accuracy),
}
"""What a host may be taught with, in which stages (those of `shapes` made the packaged one), how it is examined."""


@dataclass(frozen=True)
class TrainConfig:
    """How the video LLM is trained; everything that the result depends on.

    Attributes:
        material: `shapes`, or `suite`, the eight families of questions.
        stages: null: those of `MATERIALS`.
        start: trained host that the first stage goes on from, a folder or the name of a packaged one; null: weights
            drawn from the seed.
        stretch: what positions are divided by (linear position interpolation, https://arxiv.org/abs/2306.15595): a
            host that reads 64 frames begins to read 256 where they are divided by 4.
        language: language model whose decoder it gets, frozen but for low-rank adapters: `smollm2-135m-instruct`, which
            is fetched, a folder, or a Hub id; null: a small decoder of its own. Of a `start` without adapters it takes
            the vision tower only.
        rank: of the adapters.
        compile: let torch compile the decoder's layers, which takes a C++ compiler and a minute at the start; a large
            decoder then learns half as fast again, and to figures that differ by rounding.
    """

    seed: int = 0
    material: str = "shapes"
    questions_per_clip: int = 10
    stages: tuple[Stage, ...] | None = None
    held_out_clips: int = 200
    threads: int = 1
    start: str | None = None
    stretch: float = 1.0
    language: str | None = None
    rank: int = 16
    compile: bool = False

    def __post_init__(self) -> None:
        if self.material not in MATERIALS:
            raise ConfigError(f"material is {self.material!r}; expected one of {', '.join(MATERIALS)}")
        check_at_least_one(self, "questions_per_clip", "held_out_clips", "threads", "rank")
        check_stages(self.stages or (), FIGURES)
        shown = MATERIALS[self.material][0].shown
        for number, stage in enumerate(self.stages or ()):
            if stage.name != "frames" and stage.frames not in shown:
                listed = ", ".join(map(str, shown))
                raise ConfigError(f"stages[{number}].frames is {stage.frames}; expected one of {listed}")
            if stage.name == "frames" and stage.frames:
                raise ConfigError(f"stages[{number}].frames is {stage.frames}; a stage of single frames has 0")
        if not 1 <= self.stretch < math.inf:
            raise ConfigError(f"stretch is {self.stretch}; expected a number of at least 1")
        if self.language is not None and self.stretch != 1:
            raise ConfigError(f"stretch is {self.stretch}; positions of a language model stay as they are: expected 1")


def train(config: TrainConfig, out_dir: Path, *, resume: bool = True) -> LlavaNextVideoForConditionalGeneration:
    """Train, evaluate on held-out mp4 clips, and write weights, tokenizer and `training.json` to `out_dir`.

    The running state is kept in `out_dir/checkpoint.pt`; it is removed when training is done.

    Raises:
        OSError: no C++ compiler for `compile`.
        CheckpointError: with `resume`, a checkpoint or a host of another configuration is in the way; no host at
            `start`, or one that knows other words, or whose positions are stretched further.
        ConfigError: clips of so many frames do not fit its positions.
        DataError: a language model that cannot be fetched, or without what reads it.
    """
    torch.set_num_threads(config.threads)
    out_dir.mkdir(parents=True, exist_ok=True)
    material, usual, examine = MATERIALS[config.material]
    stages = config.stages or usual
    config = replace(config, stages=stages)
    if resume and is_finished(out_dir, asdict(config), asdict(TrainConfig())):
        return load_host(out_dir)[0]
    if config.compile:
        compiler()  # else it would be missed at the first step
    lessons = _Lessons(config, material)
    lessons.check_room(max(stage.frames for stage in stages) or FRAMES)
    asked_at = max((stage.frames for stage in stages if stage.name not in UNASKED), default=0)
    asked = ("seed", "material", "questions_per_clip", "start", "stretch", "language", "rank")
    settings: dict[str, Any] = {key: getattr(config, key) for key in asked}
    before = {}
    if config.start is not None:
        start = host_folder({"path": config.start}, PACKAGED_HOSTS)
        lessons.begin_with(start)
        record = start / "training.json"
        before = {"before": json.loads(record.read_text())} if record.is_file() else {}
    trainer = Trainer(lessons.modules, out_dir / "checkpoint.pt", settings, resume=resume)
    for number, stage in enumerate(stages):
        parameters, loss_at = lessons.stage(number, stage)
        trainer.run(number, stage, parameters, loss_at)
    lessons.save(out_dir)
    host = load_host(out_dir)
    told = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": asdict(config),
        "seconds": round(trainer.seconds),
        "parameters": sum(parameter.numel() for parameter in lessons.model.parameters()),
        "held_out": examine(*host, config.held_out_clips, num_frames=asked_at or FRAMES),
        "history": trainer.history,
        **before,
    }
    (out_dir / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    (out_dir / "checkpoint.pt").unlink()
    return host[0]


class _Lessons:
    """The modules that are trained, and the loss of every stage."""

    def __init__(self, config: TrainConfig, material: Material[Any]) -> None:
        self.config = config
        self.material = material
        self.adapted = None
        if config.language is None:
            self.processor = VideoQAProcessor(build_tokenizer(material.words))
            self.model = build_model(config.seed, self.processor.tokenizer, config.stretch)
            parts: dict[str, nn.Module] = {"model": self.model}
            self.decoder: nn.Module = self.model.model.language_model
        else:
            language = load_language(config.language)
            self.processor = chat_processor(language.tokenizer)
            self.model = build_on(language, config.seed)
            self.adapted = add_adapters(self.model, low_rank(config.language, config.rank), config.seed)
            self.decoder = own_parameters(self.adapted)
            eyes = self.model.model
            parts = {"tower": eyes.vision_tower, "projector": eyes.multi_modal_projector, "adapters": self.decoder}
        use_packed_attention(self.model)
        if config.compile:
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=True)  # questions are of all lengths
        generator = torch.Generator().manual_seed(config.seed)
        hidden = self.model.config.get_text_config().hidden_size
        self.symbols = SymbolicFrames(word_embeddings(self.model), self.processor.tokenizer, material.looks, generator)
        self.decoder_heads = FrameHeads(hidden, material.classes, generator)
        seen = {key: len(words) + 1 for key, words in material.looks.items()}
        self.tower_heads = FrameHeads(hidden, seen, generator)
        self.modules = {
            **parts,
            "symbols": self.symbols,
            "decoder_heads": self.decoder_heads,
            "tower_heads": self.tower_heads,
        }

    def begin_with(self, folder: Path) -> None:
        """Take the weights of a trained host; of one with another decoder, what sees."""
        if self.adapted is not None and (folder / ADAPTERS).is_file():
            read_adapted(self.model, self.adapted, folder)
            return
        host, processor = load_host(folder)
        stretch = host.config.get_text_config().rope_parameters.get("factor", 1.0)
        if self.adapted is not None:
            self.model.model.vision_tower.load_state_dict(host.model.vision_tower.state_dict())
        elif processor.tokenizer.get_vocab() != self.processor.tokenizer.get_vocab():
            raise CheckpointError(f"{folder} knows other words than the questions of {self.config.material!r}")
        elif self.config.stretch < stretch:
            raise CheckpointError(
                f"stretch is {self.config.stretch}; the positions of {folder} are stretched by {stretch}"
            )
        else:
            self.model.load_state_dict(host.state_dict())

    def check_room(self, frames: int) -> None:
        """Refuse clips that, with a question about them, have more tokens than there are positions.

        Raises:
            ConfigError: names both.
        """
        rng = np.random.default_rng(0)
        (clip,) = self.material.clips(rng, 1, frames)
        asked = self.material.questions(rng, clip, 1)
        needed = frames * TOKENS_PER_FRAME + pack_questions(self.processor, [asked]).tokens.shape[-1]
        positions = self.model.config.get_text_config().max_position_embeddings
        if needed > positions:
            raise ConfigError(
                f"stretch is {self.config.stretch}: clips of {frames} frames need {needed} positions, not {positions}"
            )

    def save(self, folder: Path) -> None:
        if self.adapted is None:
            save_host(self.model, folder, self.processor.tokenizer)
        else:
            save_adapted(self.model, self.adapted, folder)

    def stage(self, number: int, stage: Stage) -> tuple[list[nn.Parameter], LossAt]:
        """Parameters that a stage trains, and its loss at a step."""
        parts = self.model.model
        decoder = [self.decoder, self.decoder_heads]
        trained, loss = {
            "told": ([*decoder, self.symbols], self._told),
            "questions": ([*decoder, self.symbols], self._symbolic),
            "options": ([*decoder, self.symbols], self._symbolic),
            "frames": ([parts.vision_tower, parts.multi_modal_projector, self.tower_heads], self._frames),
            "video": ([*decoder, parts.multi_modal_projector], self._video),
            "whole": ([*decoder, parts.multi_modal_projector, parts.vision_tower], self._video),
        }[stage.name]

        def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
            rng = np.random.default_rng([self.config.seed, number, step])
            with torch.autocast("cpu", torch.bfloat16):
                return loss(stage, rng)

        return [parameter for module in trained for parameter in module.parameters()], loss_at

    def _clips(self, stage: Stage, rng: np.random.Generator) -> tuple[list[Any], np.ndarray, dict[str, torch.Tensor]]:
        """Clips, the numbers of the frames that are shown, and what is true at them."""
        clips = self.material.clips(rng, stage.batch, stage.frames)
        frames = self.material.frames(rng, stage.frames)
        return clips, frames, self.material.frame_truth(clips, frames)

    def _told(self, stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        _, _, truth = self._clips(stage, rng)
        before, _ = self.processor.around(VIDEO_PLACEHOLDER)
        states = watch(self.model, self.symbols(truth), before, truth["place"])
        loss = self.decoder_heads(states.float(), truth)
        return loss, {"frame": loss.item()}

    def _symbolic(self, stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clips, frames, truth = self._clips(stage, rng)
        return self._answer(self.symbols(truth), truth, clips, rng, options=stage.name == "options", frames=len(frames))

    def _video(self, stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clips, frames, truth = self._clips(stage, rng)
        pixels = [pixel_values(through_mp4(self.material.render(clip), FPS)[frames]) for clip in clips]
        visual = visual_features(self.model, torch.stack(pixels), frozen=stage.name != "whole")
        return self._answer(visual, truth, clips, rng, options=True)

    def _answer(
        self,
        visual: torch.Tensor,
        truth: dict[str, torch.Tensor],
        clips: list[Any],
        rng: np.random.Generator,
        *,
        options: bool,
        frames: int = 0,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of answering: `visual` are the tokens of so many `frames` that are told, or else all that are seen."""
        questions = [self.material.questions(rng, clip, self.config.questions_per_clip) for clip in clips]
        packed = pack_questions(self.processor, questions, options=options)
        places = truth["place"]
        last, states, thinking = decode_packed(self.model, visual, packed, places if frames else None, frames)
        # What is true at a frame is asked where the shape is: in pixels as in symbols.
        if not frames:
            states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        frame_loss = self.decoder_heads(states.float(), truth)
        word_loss, right = content_loss(self.model, thinking, packed.content)
        loss = FRAME_WEIGHT * frame_loss + word_loss
        figures = {"frame": frame_loss.item(), "word": right.float().mean().item()}
        if options:
            asked = packed.labels != IGNORED
            logits, labels = self.model.lm_head(last[asked]).float(), packed.labels[asked]
            loss = loss + cross_entropy(logits, labels)
            wrong = torch.zeros_like(asked)
            wrong[asked] = logits.argmax(-1) != labels
            figures["answer"] = 1.0 - wrong.any(-1).float().mean().item()
        return loss, figures

    def _frames(self, stage: Stage, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clips = self.material.clips(rng, stage.batch, self.material.shown[0])
        pairs = [(clip, self.material.moment(rng, clip)) for clip in clips]
        # One frame each of many clips, all in one file: as varied as it gets for the price of one encoding.
        frames = through_mp4(np.concatenate([self.material.render(*pair) for pair in pairs]), FPS)
        truths = [self.material.cell_truth(*pair) for pair in pairs]
        truth = {key: torch.stack([one[key] for one in truths]) for key in truths[0]}
        visual = visual_features(self.model, pixel_values(frames)[:, None], frozen=False)[:, None]
        with torch.no_grad():
            target = self.symbols(truth)
        # Most cells are empty: without the balance the tower learns little beyond that.
        losses = []
        shown = truth["cell"] < CELLS**2
        for chosen in (shown, ~shown):
            error = mse_loss(visual[chosen].float(), target[chosen].float()) / target.float().var()
            read = self.tower_heads(visual[chosen].float(), {key: truth[key][chosen] for key in truth})
            losses.append(torch.stack([error, read]))
        figures = {"error": losses[0][0].item(), "read": losses[0][1].item()}
        return torch.stack(losses).sum(), figures
