"""Conversations as inputs of video LLMs: the packaged one, and a tiny one with a processor as on the Hub."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

from namm_transfer.errors import CheckpointError, ConfigError, DataError, VideoError
from namm_transfer.eval.video import DecodedVideo, write_mp4
from namm_transfer.eval.video_qa.chat import Frames, HubReader, PackagedReader, load_video_llm
from namm_transfer.eval.video_qa.host import build_model, build_tokenizer
from namm_transfer.eval.video_qa.lmms_command import completed, run
from namm_transfer.eval.video_qa.lmms_task import doc_to_text, process_results, rows
from namm_transfer.eval.video_qa.packaged import packaged_clips
from namm_transfer.network import NAMM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}> {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer :{% endif %}"
)
ASKED = [{"role": "user", "content": [{"type": "video", "url": "x"}, {"type": "text", "text": "What came first ?"}]}]


def video(count: int = 3, rate: float = 2.0) -> DecodedVideo:
    frames = np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3)).astype(np.uint8)
    return DecodedVideo(frames, np.arange(count) / rate, Path("x"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder as transformers writes it: a tiny random LLaVA-NeXT-Video and its processor."""
    folder, size = tmp_path_factory.mktemp("hub"), {"height": 64, "width": 64}
    shape = {"size": {"shortest_edge": 64}, "crop_size": size}
    LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**shape, image_grid_pinpoints=[[64, 64]]),
        video_processor=LlavaNextVideoVideoProcessor(**shape),
        tokenizer=build_tokenizer(),
        chat_template=TEMPLATE,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    build_model(0).save_pretrained(folder)
    return folder


def test_a_model_with_its_own_processor_answers(hub):
    model, reader = load_video_llm(str(hub), "bfloat16")
    encoded = reader.encode(ASKED, [video()])
    assert encoded.prompt == "user : <video> What came first ? Answer :"
    assert model.dtype == torch.bfloat16 and not model.training
    ids = encoded.inputs["input_ids"][0].tolist()
    assert ids.count(model.config.video_token_id) == 3 * 16 and ids[0] == reader.processor.tokenizer.bos_token_id
    pixels = encoded.inputs["pixel_values_videos"]
    assert pixels.shape == (1, 3, 3, 64, 64)
    inputs = dict(encoded.inputs) | {"pixel_values_videos": pixels.bfloat16()}
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert isinstance(reader.text(tokens[0, len(ids) :]), str)


def test_the_first_token_is_not_written_twice(hub):
    _, reader = load_video_llm(str(hub))
    reader.processor.chat_template = "<bos>" + TEMPLATE
    ids = reader.encode(ASKED, [video()]).inputs["input_ids"][0].tolist()
    assert ids.count(reader.processor.tokenizer.bos_token_id) == 1


def test_a_prompt_is_the_same_on_every_day(hub):
    _, reader = load_video_llm(str(hub))
    dated = "Today is {{ strftime_now('%d %b %Y') }}. " + TEMPLATE
    for template in (dated, {"default": dated, "tool_use": "none"}):
        reader.processor.chat_template = template
        assert reader.encode(ASKED, [video()]).prompt.startswith("Today is 26 Jul 2024. ")


def test_a_processor_may_choose_its_own_template(hub, monkeypatch):
    _, reader = load_video_llm(str(hub))
    write = type(reader.processor).apply_chat_template

    def chosen(self, chat, chat_template=None, **given):  # as SmolVLM's does
        return write(self, chat, chat_template=chat_template or f"Own. {TEMPLATE}", **given)

    monkeypatch.setattr(type(reader.processor), "apply_chat_template", chosen)
    assert reader.encode(ASKED, [video()]).prompt.startswith("Own. ")


def test_a_processor_without_videos_gets_their_frames_as_images():
    class Images:
        chat_template = TEMPLATE
        tokenizer = build_tokenizer()

        def apply_chat_template(self, chat, **_):
            return json.dumps(chat)

        def __call__(self, **given):
            return given

    still = Image.new("RGB", (4, 4))
    content = [{"type": "image", "url": still}, *ASKED[0]["content"]]
    encoded = HubReader(Images(), "images").encode([{"role": "user", "content": content}], [video(2)])
    assert [part["type"] for part in json.loads(encoded.prompt)[0]["content"]] == ["image"] * 3 + ["text"]
    assert encoded.inputs["images"][0] is still and len(encoded.inputs["images"]) == 3
    assert "videos" not in encoded.inputs


def test_models_are_told_when_the_frames_are(hub, monkeypatch):
    _, reader = load_video_llm(str(hub))
    told = []
    call = type(reader.processor).__call__
    monkeypatch.setattr(type(reader.processor), "__call__", lambda self, **kw: told.append(kw) or call(self, **kw))
    reader.encode(ASKED, [video(5, rate=2.0)])
    [metadata] = told[0]["video_metadata"]
    assert metadata.timestamps == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert metadata.sampled_fps == pytest.approx(2.0)
    assert metadata.duration == 2.0


def test_the_packaged_host_gets_its_own_prompt():
    _, reader = load_video_llm("packaged")
    assert isinstance(reader, PackagedReader)
    question = packaged_clips()[0].questions[0]
    asked = [{"role": "user", "content": [ASKED[0]["content"][0], {"type": "text", "text": question.suffix()}]}]
    assert reader.encode(asked, [video()]).prompt == question.prompt()
    wide = replace(video(), frames=np.zeros((10, 48, 80, 3), np.uint8))
    assert reader.encode(asked, [wide]).inputs["pixel_values_videos"].shape == (1, 10, 3, 64, 64)
    with pytest.raises(DataError, match="one video and then one text; got text"):
        reader.encode([{"role": "user", "content": [{"type": "text", "text": "?"}]}], [])


@pytest.mark.parametrize(
    ("pretrained", "dtype", "error", "message"),
    [
        ("packaged", "int8", ConfigError, "dtype is 'int8'"),
        ("/nowhere/at-all", "auto", CheckpointError, "cannot load a video LLM from '/nowhere/at-all'"),
    ],
)
def test_what_cannot_be_loaded(pretrained, dtype, error, message):
    with pytest.raises(error, match=message):
        load_video_llm(pretrained, dtype)


def test_a_processor_without_a_template_is_refused(hub):
    _, reader = load_video_llm(str(hub))
    for template in (None, {"tool_use": TEMPLATE}):
        reader.processor.chat_template = template
        with pytest.raises(ConfigError, match="no chat template"):
            HubReader(reader.processor, "tiny")


def test_frames(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, np.zeros((8, 64, 64, 3), np.uint8), 4.0)
    counts = [len(Frames(*given)(path).frames) for given in ((4, None), ("all", None), (None, 2.0), (None, None))]
    assert counts == [4, 8, 4, 8]  # 32 by default, but there are only 8
    with pytest.raises(VideoError, match="no such file"):
        Frames(4)(tmp_path / "none.mp4")


@pytest.mark.parametrize("given", [(0, None), (True, None), ("some", None), (None, -1.0), (4, 2.0)])
def test_frames_refuse(given):
    with pytest.raises(ConfigError, match="num_frames|fps"):
        Frames(*given)


def test_rows_keep_the_question_and_its_prompt():
    clip = packaged_clips()[0]
    for row, question in zip(rows([clip]), clip.questions, strict=True):
        assert row["options"][0] == f"A. {question.options[0]}" and row["answer"] == question.letter
        assert f"<video>\n{doc_to_text(row)}" == question.prompt()
        assert process_results(row, [question.letter]) == process_results(row, [question.truth]) == {"accuracy": 1.0}
        assert process_results(row, ["no idea"]) == {"accuracy": 0.0}


def test_the_command_adds_model_and_fingerprint():
    fingerprint = NAMM.from_pretrained("default").fingerprint()
    full = f"policy=namm,budget=0.3,fingerprint=namm-{fingerprint}"
    assert completed(["--model_args", "policy=namm,budget=0.3"]) == ["--model_args", full, "--model", "namm"]
    assert completed(["--model_args=policy=namm,budget=0.3", "--model=namm"]) == [
        f"--model_args={full}",
        "--model=namm",
    ]
    assert completed(["--model_args", full, "--model", "namm"]) == ["--model_args", full, "--model", "namm"]
    for untouched in (
        ["tasks", "list"],
        ["ui", "--port", "8000"],
        ["--help"],
        ["--model", "namm", "--model_args", "policy=h2o,budget=4"],
    ):
        assert completed(untouched) == untouched
    with pytest.raises(CheckpointError, match="no NAMM 'missing'"):
        completed(["--model_args", "policy=namm,namm=missing"])


def test_without_lmms_eval_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ConfigError, match=r"namm-transfer\[lmms-eval\]"):
        run(["--tasks", "videomme"])
