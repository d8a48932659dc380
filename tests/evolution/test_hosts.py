"""Fetching and keeping host models; nothing here touches a registry."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from namm_transfer.errors import CheckpointError, DataError
from namm_transfer.evolution import hosts
from namm_transfer.evolution.hosts import cache_folder, fetch_package, load_host


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAMM_TRANSFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_folder_can_be_set(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("NAMM_TRANSFER_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "namm-transfer"


def test_an_installed_package_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_install", lambda *args: pytest.fail("fetched"))
    assert (fetch_package("safetensors==0.0.0") / "torch.py").is_file()


def test_a_package_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def install(requirement: str, target: Path) -> None:
        fetched.append(requirement)
        (target / "made_up_corpus").mkdir(parents=True)

    monkeypatch.setattr(hosts, "_install", install)
    folder = fetch_package("made-up-corpus==1.0")
    assert folder == cache / "packages" / "made-up-corpus-1.0" / "made_up_corpus"
    assert fetch_package("made-up-corpus==1.0") == folder
    assert fetched == ["made-up-corpus==1.0"]


def test_a_failed_fetch_says_why_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 1, "", "no such release")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match="no such release"):
        fetch_package("made-up-corpus==1.0")
    assert list((cache / "packages").iterdir()) == []


def test_a_missing_reader_of_gguf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gguf.*namm-transfer\[language\]"):
        load_host("smollm2-135m-instruct")


def test_a_folder_is_loaded(
    tmp_path: Path, llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    llama().save_pretrained(tmp_path / "host")
    tokenizer.save_pretrained(tmp_path / "host")
    host = load_host(str(tmp_path / "host"), dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(host.model(ids).logits, llama(attention="eager")(ids).logits, atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in host.model.parameters())


def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="no readable language model"):
        load_host(str(tmp_path))


def test_a_host_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="packaged hosts"):
        load_host(str(tmp_path / "nowhere"))
