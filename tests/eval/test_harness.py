"""lm-evaluation-harness with our model: its own tasks and ours on files of the Hub's format, without a network.

The model is a tiny random Llama in a folder, so scores mean nothing. What is compared: ours with the harness's own `hf`
model, batches with single requests, likelihoods with `read_sample`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from namm_transfer import NAMM, policy
from namm_transfer.cli import app
from namm_transfer.errors import ConfigError, UnsupportedModelError
from namm_transfer.eval.language.command import TASKS
from namm_transfer.eval.language.command import lm_eval as lm_eval_command
from namm_transfer.eval.language.harness import NAMMLM
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.population import read_sample

RETRIEVAL = "longbench_passage_retrieval_en"
JAPANESE = "choubun_wiki_qa"
SUITES = Path(lm_eval.tasks.__path__[0])
LONGBENCH = SUITES / "longbench"
FILES = {
    RETRIEVAL: ("retrieval", f"include: {LONGBENCH / 'passage_retrieval_en.yaml'}"),
    JAPANESE: ("japanese", f"include: {TASKS / 'choubun' / 'wiki_qa.yaml'}"),
    "choices": (
        "choices",
        """
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    ),
}
"""Task files: a task, where its records are, and what it is."""


SPECIAL = {"eos_token": "Ā", "pad_token": "ā", "bos_token": "Ā"}
"""Of the tokenizer: byte 0 ends a text, byte 1 is padding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Path:
    """The model, the data sets' files, and a task of choices."""
    root = tmp_path_factory.mktemp("harness")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.35,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "model")
    make_tokenizer(**SPECIAL).save_pretrained(root / "model")

    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(["stone", "river", "market", "paper", "window"], words))

    lengths = (20, 33, 33, 47, 2)
    retrieval = [
        {
            "context": "\n".join(f"Paragraph {i}: {text(words)}" for i in range(1, 4)),
            "question": text(6),
            "answers": ["Paragraph 2"],
            "all_classes": None,
        }
        for words in lengths
    ]
    japanese = [
        {"context": "東京は日本の首都です。" * words, "input": "首都はどこですか。", "answers": ["東京", "東京都"]}
        for words in (4, 7, 5)
    ]
    choices = [
        {"context": text(words), "choices": [" stone", " s", f" {text(3)}", " z"], "label": 1} for words in lengths
    ]
    for name, rows in {"retrieval": retrieval, "japanese": japanese, "choices": choices}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    for name, (data, what) in FILES.items():
        records = f"{{data_files: {{test: {root / data}.jsonl}}}}"
        (root / "tasks" / f"{name}.yaml").write_text(
            f"{what}\ntask: {name}\ndataset_path: json\ndataset_name: null\ndataset_kwargs: {records}\n"
        )
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def evaluate(folder: Path, model: str = "namm", batch_size: int = 1, **arguments: Any) -> dict[str, Any]:
    """What the harness makes of all three tasks."""
    settings = {key: arguments.pop(key) for key in ("use_cache", "apply_chat_template") if key in arguments}
    return simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder / "model"), "dtype": "float32", **arguments},
        tasks=list(FILES),
        task_manager=TaskManager(include_defaults=False, include_path=folder / "tasks"),
        gen_kwargs={"max_gen_toks": 12},
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        **settings,
    )


def responses(results: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """All generations, and all log-likelihoods."""
    samples = results["samples"]
    texts = [one["resps"][0][0] for name in (RETRIEVAL, JAPANESE) for one in samples[name]]
    return texts, np.array([[float(c[0][0]) for c in one["resps"]] for one in samples["choices"]])


OTHERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "infinitebench_passkey": (
        f"include: {SUITES / 'infinitebench' / 'infinitebench_passkey.yaml'}\ntest_split: test",
        [
            {
                "id": i,
                "context": f"The grass is green. The pass key is {key}. Remember it. {key} is the pass key. " * 9,
                "input": "What is the pass key?",
                "answer": [str(key)],
                "options": [],
            }
            for i, key in enumerate((71432, 90125))
        ],
    ),
    "niah_single_1": (  # RULER draws its records when it is asked; these are as it draws them
        f"include: {SUITES / 'ruler' / 'niah_single_1.yaml'}\ncustom_dataset: null",
        [
            {
                "index": i,
                "input": "The grass is green. " * 30 + f"One of the special magic numbers for late-rain is: {number}.",
                "outputs": [str(number)],
                "length": 200,
                "max_length": 4096,
                "gen_prefix": "The special magic number for late-rain mentioned in the provided text is",
            }
            for i, number in enumerate((8273645, 1928374))
        ],
    ),
}
"""Tasks of InfiniteBench and of RULER: what it is, and records in the suite's own format."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_suites_own_tasks_run_on_records_of_their_format(folder: Path, tmp_path: Path, name: str) -> None:
    what, records = OTHERS[name]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tasks").mkdir()
    data = f"dataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: {{test: {tmp_path}/records.jsonl}}}}"
    (tmp_path / "tasks" / "task.yaml").write_text(f"{what}\ntask: ours_{name}\n{data}\n")
    found = {}
    for model, arguments in (("hf", {}), ("namm", {"policy": "full"}), ("namm", {"policy": "h2o", "budget": 0.4})):
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": str(folder / "model"), "dtype": "float32"}
            | ({"update_interval": 64} | arguments if arguments else {}),
            tasks=[f"ours_{name}"],
            task_manager=TaskManager(include_defaults=False, include_path=tmp_path / "tasks"),
            gen_kwargs={"max_gen_toks": 8},
            device="cpu",
            bootstrap_iters=0,
        )
        samples = results["samples"][f"ours_{name}"]
        found[model, *arguments.values()] = [one["resps"][0][0] for one in samples]
        kept = results["config"].get("memory", {}).get(f"ours_{name}", {}).get("kept_at_updates")
        assert all(any(key in one for key in ("score", "4096")) for one in samples)
    assert found["namm", "full"] == found["hf",]
    assert found["namm", "h2o", 0.4] != found["hf",]
    assert kept == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("chat", [False, True])
def test_with_nothing_evicted_all_is_as_with_the_harness_own_model(folder: Path, chat: bool) -> None:
    theirs = evaluate(folder, "hf", batch_size=2, apply_chat_template=chat)
    ours = evaluate(folder, policy="full", batch_size=2, apply_chat_template=chat)
    assert responses(ours)[0] == responses(theirs)[0]
    np.testing.assert_allclose(responses(ours)[1], responses(theirs)[1], atol=1e-4)
    assert ours["results"] == theirs["results"]
    assert {name: m["kept_at_updates"] for name, m in ours["config"]["memory"].items()} == dict.fromkeys(
        (RETRIEVAL, JAPANESE, "choices"), 1.0
    )


def test_batches_give_what_single_requests_give(folder: Path) -> None:
    namm = {"policy": "namm", "budget": 0.4, "update_interval": 32}
    single, batched = evaluate(folder, **namm), evaluate(folder, batch_size=4, **namm)
    assert responses(single)[0] == responses(batched)[0]
    np.testing.assert_allclose(responses(single)[1], responses(batched)[1], atol=1e-4)
    for name, memory in single["config"]["memory"].items():
        assert batched["config"]["memory"][name] == pytest.approx(memory), name

    full = responses(evaluate(folder, policy="full"))
    assert np.abs(full[1] - responses(single)[1]).max() > 0.05, "the budget is of no effect on likelihoods"
    assert full[0] != responses(single)[0], "the budget is of no effect on generations"


def test_the_prompt_of_a_japanese_question(folder: Path) -> None:
    tasks = TaskManager(include_defaults=False, include_path=folder / "tasks").load([JAPANESE])["tasks"]
    (chosen,) = tasks.values()
    assert chosen.doc_to_text(chosen.eval_docs[0]) == (
        "次の文書を読んで、そのあとの質問に答えてください。"
        "答えは、文書に書かれている言葉をそのまま抜き出したものにしてください。\n\n"
        "【文書】\n東京は日本の首都です。東京は日本の首都です。東京は日本の首都です。東京は日本の首都です。\n\n"
        "【質問】\n首都はどこですか。\n\n【答え】\n"
    )
    assert chosen.process_results(chosen.eval_docs[0], ["「東京都」"]) == {"f1": 1.0}


def test_results_say_under_what_memory_they_came_about(folder: Path) -> None:
    config = evaluate(folder, policy="namm", budget=0.4, update_interval=32)["config"]
    described = config["policy"]
    assert (described["name"], described["budget"]) == ("namm", 0.4)
    assert described["namm"] == NAMM.from_pretrained("default").fingerprint()
    assert config["update_interval"] == 32
    assert config["model_args"]["budget"] == 0.4
    for memory in config["memory"].values():
        assert memory["kept_at_updates"] == pytest.approx(0.4, abs=0.02)
    assert config["memory"]["choices"]["readings"] > config["memory"]["choices"]["readings_with_decisions"] > 0
    json.dumps(described)


@pytest.mark.parametrize("name", ["full", "h2o", "namm"])
def test_likelihoods_are_those_of_our_own_reading(folder: Path, name: str) -> None:
    options = {"budget": 0.3} if name != "full" else {}
    lm = NAMMLM(str(folder / "model"), name, dtype="float32", update_interval=16, batch_size=3, device="cpu", **options)
    pairs = [("the river" * 20, " stone market"), ("paper" * 9, "w"), ("a stone" * 13, " and a river of paper" * 3)]
    requests = [Instance("loglikelihood", {}, pair, 0, ("test", i, 1)) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (likelihood, _) in zip(pairs, found, strict=True):
        ids = torch.tensor(lm.tok_encode(context + continuation))
        targets = torch.arange(len(ids) - len(continuation), len(ids))
        reading = read_sample(lm.model, Sample("", "", ids, targets), lm.policy, 16)
        assert likelihood == pytest.approx(float(reading.log_likelihood) * len(continuation), abs=1e-4)


def test_rolling_likelihoods_are_read_under_the_memory_too(folder: Path) -> None:
    text = "the river has a stone and the market has paper " * 3
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("rolling", 0, 1))
    found = {}
    for options in ({"policy": "full"}, {"policy": "streaming", "budget": 16}):
        lm = NAMMLM(str(folder / "model"), dtype="float32", update_interval=32, device="cpu", **options)
        (found[options["policy"]],) = lm.loglikelihood_rolling([request], disable_tqdm=True)
        ids = torch.tensor([lm.prefix_token_id, *lm.tok_encode(text)])
        reading = read_sample(lm.model, Sample("", "", ids, torch.arange(1, len(ids))), lm.policy, 32)
        assert found[options["policy"]] == pytest.approx(float(reading.log_likelihood) * len(text), abs=1e-3)
    assert abs(found["full"] - found["streaming"]) > 0.1


def test_a_policy_that_never_decides_is_refused(folder: Path) -> None:
    # the shortest task is answered first: nothing is lost with it
    with pytest.raises(ConfigError, match=rf"{JAPANESE}: policy 'h2o' took no decision in any of 3 readings: .* 4096"):
        evaluate(folder, policy="h2o", budget=0.5, update_interval=4096)
    memory = evaluate(folder, policy="h2o", budget=0.5, update_interval=4096, allow_idle=True)["config"]["memory"]
    assert memory[RETRIEVAL]["kept_at_updates"] is None
    assert memory[RETRIEVAL]["readings_with_decisions"] == 0


def test_a_cache_of_responses_serves_one_memory(folder: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "responses")
    h2o = {"policy": "h2o", "budget": 0.5, "update_interval": 32, "use_cache": cache}
    first = evaluate(folder, **h2o)
    again = evaluate(folder, **h2o, batch_size=2)
    assert responses(first)[0] == responses(again)[0]
    assert again["config"]["policy"] == first["config"]["policy"]
    assert again["config"]["memory"] == {}, "every response came from the cache"
    for change in ({"budget": 0.4}, {"policy": "tova"}, {"update_interval": 64}):
        with pytest.raises(ConfigError, match="responses must not mix"):
            evaluate(folder, **h2o | change)
    evaluate(folder, "hf", use_cache=str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="filled by another model"):
        evaluate(folder, policy="full", use_cache=str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "h20"}, "did you mean 'h2o'"),
        ({"policy": "h2o", "budget": 1.5}, "must lie in"),
        ({"policy": "h2o", "budget": 0.5, "namm": "default"}, "no option 'namm'"),
        ({"policy": "random", "budget": 0.5, "policy_sed": 1}, "did you mean 'seed'"),
        ({"policy": "namm", "namm": "nowhere"}, "no NAMM 'nowhere'"),
        ({"update_interval": 100}, "multiple of 16"),
        ({"pretrained": "smollm2-135m-instruct", "dtype": "float31"}, "dtype is 'float31'"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAMMLM(**{"pretrained": str(folder / "model"), "device": "cpu"} | arguments)


def test_options_of_a_policy_reach_it(folder: Path) -> None:
    lm = NAMMLM(str(folder / "model"), "random", budget=0.5, policy_seed=3, device="cpu")
    assert lm.policy == policy("random", budget=0.5, seed=3)


def test_a_model_that_no_memory_serves_is_named(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    config = T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer(**SPECIAL).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="needs a decoder-only model; T5ForConditionalGeneration is"):
        NAMMLM(str(tmp_path), device="cpu")


def test_the_users_own_task_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda self, given: seen.append(given.include_path))
    config = tmp_path / "run.yaml"
    config.write_text("model: namm\ninclude_path: theirs\n")
    run = ["run", "--tasks", "choubun"]
    for arguments in ([], ["--include_path", "mine"], ["--config", str(config)]):
        lm_eval_command([*run, *arguments])
    assert seen == [[str(TASKS)], [str(TASKS), "mine"], [str(TASKS), "theirs"]]
    with pytest.raises(ConfigError, match="no file nowhere"):
        lm_eval_command([*run, "--config", "nowhere"])


def test_the_command_knows_our_model_and_our_tasks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # indexing the harness's own 15,000 files takes longer than all else here
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "manager.py"))
    (tmp_path / "mine.yaml").write_text(f"include: {folder / 'tasks' / JAPANESE}.yaml\ntask: mine\n")
    command = ["lm-eval", "run", "--model", "namm", "--tasks", "mine", "--include_path", str(tmp_path)]
    command += ["--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "out.json")]
    model = f"pretrained={folder / 'model'},dtype=float32,policy=namm,budget=0.5,update_interval=32"
    done = CliRunner().invoke(app, [*command, "--model_args", model])
    assert done.exit_code == 0, done.output
    assert "|mine|" in done.output.replace(" ", "")
    (file,) = tmp_path.glob("out*.json")
    config = json.loads(file.read_text())["config"]
    assert config["memory"]["mine"]["kept_at_updates"] == pytest.approx(0.5, abs=0.02)

    listed = CliRunner().invoke(app, ["lm-eval", "ls", "tasks"]).output
    for name in ("wiki_qa", "edinet_qa", "corp_sec_qa", "corp_sec_sum"):
        assert f"choubun_{name}" in listed
    refused = CliRunner().invoke(app, [*command, "--model_args", model.replace("0.5", "5.5")])
    assert refused.exit_code == 2
    assert "must lie in (0, 1]; got 5.5" in refused.output
