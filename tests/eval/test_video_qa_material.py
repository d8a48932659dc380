"""What video LLMs are taught with: every word is known, and what is told of a frame is what its pixels show."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.video_qa.batches import IGNORED, pack_questions
from namm_transfer.eval.video_qa.drawing import COLOURS
from namm_transfer.eval.video_qa.host import PACKAGED, VideoQAProcessor, build_tokenizer, load_host
from namm_transfer.eval.video_qa.shapes import Shapes
from namm_transfer.eval.video_qa.suite.clips import BAR, PALETTE, TRAIN_SEEDS
from namm_transfer.eval.video_qa.suite.material import Suite
from namm_transfer.eval.video_qa.suite.questions import FAMILIES
from namm_transfer.eval.video_qa.train import TrainConfig, train
from namm_transfer.eval.video_training import Stage


@pytest.mark.parametrize("material", [Shapes(), Suite()], ids=["shapes", "suite"])
def test_every_word_is_known_and_every_answer_is_asked_for(material) -> None:
    processor, families = VideoQAProcessor(build_tokenizer(material.words)), set()
    tokenizer = processor.tokenizer
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (clip,) = material.clips(rng, 1, material.shown[seed % len(material.shown)])
        assert clip.seed >= TRAIN_SEEDS
        questions = material.questions(rng, clip, 10)
        assert len(questions) == 10
        families |= {question.family for question in questions}
        for question in questions:
            words = f"{question.prompt()} {question.truth}"
            assert tokenizer.unk_token_id not in tokenizer(words)["input_ids"], words
        packed = pack_questions(processor, [questions])
        for row, question in enumerate(questions):
            told = [token for token in packed.content[0, row].tolist() if token != IGNORED]
            (word,) = set(tokenizer.convert_ids_to_tokens(told))
            assert len(told) == (1 if " these " in question.text else 2)
            place = question.truth.split().index(word)
            assert len({option.split()[place] for option in question.options}) > 1
            assert len({tuple(option.split()[:place]) for option in question.options}) == 1
    assert families == (set(FAMILIES) if isinstance(material, Suite) else {"colour", "shape", "direction", "order"})


@pytest.mark.parametrize(("length", "count"), [(64, 4), (256, 1)])
def test_what_is_told_of_a_frame_of_the_suite_is_what_its_cells_and_pixels_show(length, count) -> None:
    material, rng = Suite(), np.random.default_rng(0)
    clips, frames = material.clips(rng, count, length), material.frames(rng, length)
    assert np.array_equal(frames, np.arange(length))
    told = material.frame_truth(clips, frames)
    assert set(told) == {*material.classes, *material.looks, "cell", "place"}
    for row, clip in enumerate(clips):
        cells, pixels = material.cell_truth(clip, frames), material.render(clip)
        of_clip = {key: value[row].view(length, 2) for key, value in told.items()}
        for frame in frames:
            sign, shown = ({key: int(value[frame, which]) for key, value in of_clip.items()} for which in (0, 1))
            place = sign["place"] - 16 * frame
            assert place == sign["cell"] < 4 <= shown["place"] - 16 * frame < 16
            for key in ("colour", "shape", "size"):
                assert int(cells[key][frame, place]) == sign[key] < len(material.looks[key])
            bright = pixels[frame, :BAR, 16 * place : 16 * place + 16].reshape(-1, 3).max(0)
            assert np.abs(bright - np.array(COLOURS[PALETTE[sign["colour"]]])).max() < 60
            if shown["digit"] < 10:
                assert frame == clip.needle and (cells["digit"][frame, 4:] == clip.digit).all()
                assert shown["colour"] == len(PALETTE)
            elif shown["colour"] < len(PALETTE):
                event = next(event for event in clip.events if event.start <= frame < event.end)
                assert (PALETTE[shown["colour"]], material.looks["shape"][shown["shape"]]) == (
                    event.colour,
                    event.shape,
                )
                assert set(cells["colour"][frame, 4:].tolist()) <= {shown["colour"], len(PALETTE)}
                assert shown["sight"] == min(32 * (frame - event.start) // length, 23)
            else:
                assert set(cells["colour"][frame, 4:].tolist()) == {len(PALETTE)}
        assert of_clip["count"][-1, 1] == len(clip.events) and (of_clip["count"][:, 0] == IGNORED).all()
        assert of_clip["needle"][clip.needle, 1] == clip.digit and of_clip["needle"][clip.needle - 1, 1] == 10
        assert of_clip["changed"][clip.change, 0] < 4 == of_clip["changed"][clip.change - 1, 0]


@pytest.mark.parametrize("material", ["shapes", "suite"])
def test_a_host_is_trained_in_stages_saved_and_gone_on_from(tmp_path, material) -> None:
    video = Stage("video", steps=1, batch=1, learning_rate=1e-3, frames=64)
    stages = (
        Stage("options", steps=2, batch=2, learning_rate=1e-3, frames=64),
        Stage("frames", steps=1, batch=4, learning_rate=1e-3),
        video,
    )
    config = TrainConfig(material=material, stages=stages, questions_per_clip=3, held_out_clips=1)
    first = train(config, tmp_path / "first")
    again = TrainConfig(material=material, stages=(video,), held_out_clips=1, start=str(tmp_path / "first"))
    second = train(again, tmp_path / "second")
    for host, name in ((first, "first"), (second, "second")):
        loaded, processor = load_host(tmp_path / name)
        assert all(
            torch.equal(a, b) for a, b in zip(host.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
        assert len(processor.tokenizer) == loaded.config.get_text_config().vocab_size
    whole = replace(again, stages=(replace(video, name="whole"),))
    for found, towers in ((second, False), (train(whole, tmp_path / "third"), True)):
        moved = [k for k, v in found.state_dict().items() if not torch.equal(v, first.state_dict()[k])]
        assert moved and any("vision_tower" in name for name in moved) == towers


def test_a_start_that_does_not_fit_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="material is 'forms'; expected one of shapes, suite"):
        TrainConfig(material="forms")
    for change, message in (
        ({"name": "foo"}, r"stages\[0\].name is 'foo'; expected one of told, questions"),
        ({"frames": 40}, r"stages\[0\].frames is 40; expected one of 64, 32, 16, 8, 4, 2, 1"),
        ({"goal": 0.5, "figure": "accuracy"}, r"stages\[0\].figure is 'accuracy'; expected one of word, answer"),
    ):
        stage = {"name": "video", "steps": 1, "batch": 1, "learning_rate": 1e-3, "frames": 64} | change
        with pytest.raises(ConfigError, match=message):
            TrainConfig(stages=(Stage(**stage),))
    with pytest.raises(ConfigError, match=r"frames is 128; expected one of 64, 256, 1024"):
        TrainConfig(material="suite", stages=(Stage("video", steps=1, batch=1, learning_rate=1e-3, frames=128),))
    with pytest.raises(ConfigError, match="frames is 64; a stage of single frames has 0"):
        TrainConfig(stages=(Stage("frames", steps=1, batch=1, learning_rate=1e-3, frames=64),))
    for stretch in (0.5, float("nan")):
        with pytest.raises(ConfigError, match="stretch is .*; expected a number of at least 1"):
            TrainConfig(stretch=stretch)
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        train(TrainConfig(start=str(tmp_path)), tmp_path / "out")
    with pytest.raises(CheckpointError, match="knows other words than the questions of 'suite'"):
        train(TrainConfig(material="suite", start=str(PACKAGED)), tmp_path / "out")


def test_a_packaged_host_goes_on_with_its_positions_stretched_over_longer_clips(tmp_path) -> None:
    video = Stage("video", steps=1, batch=1, learning_rate=1e-6, frames=256)
    config = TrainConfig(
        material="suite", stages=(video,), held_out_clips=1, start="llava_next_video_suite", stretch=4, threads=2
    )
    model = train(config, tmp_path / "host")
    loaded, _ = load_host(tmp_path / "host")
    text = loaded.config.get_text_config()
    assert text.rope_parameters["factor"] == 4 and text.max_position_embeddings == 4 * 4096
    told = json.loads((tmp_path / "host" / "training.json").read_text())
    assert told["before"]["config"]["material"] == "suite" and told["held_out"]["all"]["n"] == 16
    # what stretching means: position 4 n is what n was
    rotary, before = (host.model.language_model.rotary_emb for host in (model, load_host(PACKAGED)[0]))
    states, places = torch.zeros(1, 9, 48), torch.arange(9)[None]
    for stretched, usual in zip(rotary(states, 4 * places), before(states, places), strict=True):
        torch.testing.assert_close(stretched, usual)
    usual = replace(config, stretch=1.0, start=str(tmp_path / "host"), stages=(replace(video, frames=64),))
    with pytest.raises(CheckpointError, match=r"stretch is 1.0; the positions of .*host are stretched by 4"):
        train(usual, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"stretch is 1.0: clips of 256 frames need \d+ positions, not 4096"):
        train(replace(config, stretch=1.0), tmp_path / "b")
    with pytest.raises(CheckpointError, match="another stretch"):
        train(replace(config, stretch=2), tmp_path / "host")
