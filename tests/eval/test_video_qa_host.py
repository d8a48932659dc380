"""The packaged video LLM: its inputs, its training batches, and what it answers about the packaged clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from namm_transfer.errors import CheckpointError, DataError
from namm_transfer.eval.video_qa import model as packed_model
from namm_transfer.eval.video_qa.batches import IGNORED, pack_questions
from namm_transfer.eval.video_qa.clips import make_clip, render
from namm_transfer.eval.video_qa.evaluate import QAClip, accuracy_by_family, answer, questions_of
from namm_transfer.eval.video_qa.host import (
    PACKAGED,
    TOKENS_PER_FRAME,
    VideoQAProcessor,
    build_model,
    build_tokenizer,
    load_host,
    pixel_values,
    save_host,
)
from namm_transfer.eval.video_qa.model import decode_packed, use_packed_attention, visual_features, watch
from namm_transfer.eval.video_qa.packaged import packaged_clips
from namm_transfer.eval.video_qa.questions import all_questions
from namm_transfer.eval.video_qa.shapes import Shapes


@pytest.fixture(scope="module")
def processor() -> VideoQAProcessor:
    return VideoQAProcessor(build_tokenizer())


def test_no_word_of_any_prompt_is_unknown(processor: VideoQAProcessor) -> None:
    tokenizer = processor.tokenizer
    for seed in range(30):
        for question in all_questions(make_clip(seed), np.random.default_rng(seed)):
            assert tokenizer.unk_token_id not in tokenizer(question.prompt() + " " + question.truth)["input_ids"]


def test_processor_puts_the_video_first(processor: VideoQAProcessor) -> None:
    frames = render(make_clip(0), np.arange(5))
    inputs = processor(frames, questions_of(0, 1)[0].prompt())
    ids = inputs["input_ids"][0].tolist()
    video = processor.tokenizer.convert_tokens_to_ids("<video>")
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids[1 : 1 + 5 * TOKENS_PER_FRAME] == [video] * (5 * TOKENS_PER_FRAME)
    assert video not in ids[1 + 5 * TOKENS_PER_FRAME :]
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, 64, 64)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32)],
)
def test_processor_refuses_other_frames(processor: VideoQAProcessor, frames: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected uint8 frames"):
        processor(frames, "<video> ?")


def test_processor_refuses_a_prompt_without_video(processor: VideoQAProcessor) -> None:
    with pytest.raises(DataError, match="exactly one <video>"):
        processor(render(make_clip(0), np.arange(1)), "What came first?")


@pytest.mark.parametrize("plain", [0, 256])
def test_packed_training_batch_equals_single_prompts(
    processor: VideoQAProcessor, plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_model, "PLAIN_TOKENS", plain)
    model = build_model(0).eval()
    clips = [render(make_clip(seed), np.arange(0, 64, 16)) for seed in (7, 8)]
    told = sorted(questions_of(7, 2), key=lambda question: len(question.prompt()))
    asked = [[told[-1], *told[:2]], told[-3:]]  # clips whose questions have not as many tokens
    packed = pack_questions(processor, asked)
    assert packed.lengths[0].sum() < packed.lengths[1].sum()
    alone = []
    for frames, questions in zip(clips, asked, strict=True):
        for question in questions:
            inputs = processor(frames, f"{question.prompt()} {question.truth}")
            alone.append(model(**inputs).logits[0, 1 + len(frames) * TOKENS_PER_FRAME :])
    assert [len(logits) for logits in alone] == packed.lengths.flatten().tolist()
    learned = [model.model.multi_modal_projector.linear_1.weight, *model.model.language_model.parameters()]
    expected_gradients = torch.autograd.grad(sum(logits.logsumexp(-1).sum() for logits in alone), learned)
    use_packed_attention(model)
    pixels = torch.stack([pixel_values(frames) for frames in clips])
    last, _, _ = decode_packed(model, visual_features(model, pixels), packed)
    logits = model.lm_head(last).flatten(0, 1)
    together = [row[: len(expected)] for row, expected in zip(logits, alone, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    gradients = torch.autograd.grad(sum(logits.logsumexp(-1).sum() for logits in together), learned)
    for found, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_to_watch_alone_is_to_watch_before_questions(processor: VideoQAProcessor) -> None:
    model = build_model(0).eval()
    use_packed_attention(model)
    symbols = torch.randn(2, 6, 192, generator=torch.Generator().manual_seed(0))
    places = TOKENS_PER_FRAME * torch.arange(6).expand(2, -1)
    packed = pack_questions(processor, [list(questions_of(seed, 1)) for seed in (7, 8)])
    with torch.no_grad():
        _, states, _ = decode_packed(model, symbols, packed, places, frames=6)
        ran: list[int] = []
        for number, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        alone = watch(model, symbols, packed.before, places)
    torch.testing.assert_close(alone, states)
    assert ran == [0, 1, 2, 3] and model.config.get_text_config().num_hidden_layers == 6


def test_labels_ask_for_the_answer_and_its_end(processor: VideoQAProcessor) -> None:
    tokenizer, questions = processor.tokenizer, questions_of(3, 2)
    packed = pack_questions(processor, [list(questions)])
    for row, question in enumerate(questions):
        labels = [label for label in packed.labels[0, row].tolist() if label != IGNORED]
        assert tokenizer.convert_ids_to_tokens(labels) == [*question.truth.split(), "<eos>"]
        words = [word for word in packed.content[0, row].tolist() if word != IGNORED]
        assert tokenizer.convert_ids_to_tokens(words) == [question.truth.split()[0]] * 2


def test_cells_agree_with_frames() -> None:
    material, clips = Shapes(), [make_clip(seed) for seed in range(6)]
    frames = material.frames(np.random.default_rng(0), 32)
    whole = material.frame_truth(clips, frames)
    for row, clip in enumerate(clips):
        cells = material.cell_truth(clip, frames)
        for step in range(32):
            shown = set(cells["colour"][step].tolist()) - {8}
            assert shown <= {int(whole["colour"][row, step])}
            if int(whole["cell"][row, step]) < 16 and shown:
                assert int(whole["cell"][row, step]) in cells["cell"][step]


def test_saved_host_loads_as_it_was(tmp_path: Path) -> None:
    model = build_model(1).half().float()
    save_host(model, tmp_path)
    loaded, _ = load_host(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_missing_host_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model.safetensors in .*" + tmp_path.name):
        load_host(tmp_path)


def test_a_host_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save_host(build_model(1), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_host(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="no readable video LLM"):
        load_host(tmp_path)


def test_packaged_clips_are_what_their_seeds_say() -> None:
    clips = packaged_clips()
    assert len(clips) == 16
    assert all(clip.path.is_file() and clip.questions == questions_of(clip.seed, 2) for clip in clips)


def test_manifest_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        packaged_clips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"clips": [{"seed": 1}]}')
    with pytest.raises(DataError, match="file"):
        packaged_clips(tmp_path)


def test_packaged_files_are_small() -> None:
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) < 14_000_000
    videos = packaged_clips()[0].path.parent.parent
    assert sum(file.stat().st_size for file in videos.rglob("*") if file.is_file()) < 4_000_000


def test_packaged_host_answers_packaged_clips() -> None:
    model, processor = load_host()
    figures = accuracy_by_family(model, processor, packaged_clips(), total=16)
    assert figures["all"]["n"] == 128
    assert figures["all"]["accuracy"] >= 0.85


def test_packaged_host_needs_its_video() -> None:
    """Shown another clip, it must fall towards chance: the answers come from the frames."""
    model, processor = load_host()
    clips = packaged_clips()
    swapped = [QAClip(b.path, a.seed, a.questions) for a, b in zip(clips, clips[1:] + clips[:1], strict=True)]
    assert accuracy_by_family(model, processor, swapped, total=16)["all"]["accuracy"] <= 0.6


def test_sharing_the_video_changes_no_answer() -> None:
    model, processor = load_host()
    clip = make_clip(1_000)
    frames, questions = render(clip, np.arange(0, 64, 4)), questions_of(1_000, 1)
    shared = answer(model, processor, frames, questions)
    for question, reply in zip(questions, shared, strict=True):
        inputs = processor(frames, question.prompt())
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert processor.decode(tokens[0, inputs["input_ids"].shape[1] :]) == reply
        assert reply in question.options
