"""How lmms-eval comes to know the model `namm`, and `namm-transfer lmms-eval`, which hands over to its command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from namm_transfer.errors import ConfigError
from namm_transfer.network import NAMM

__all__ = ["completed", "manifest", "run"]

MODEL = "namm"
MODEL_ARGS = "--model_args"
FINGERPRINT = "namm-{}"
"""Digits alone lmms-eval might read as a number, as in 12e4."""


def manifest() -> Any:
    """The entry point that lmms-eval reads."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="namm_transfer.eval.video_qa.lmms.NAMMVideoLLM")


def run(arguments: Sequence[str]) -> None:
    """Run lmms-eval's own command.

    Raises:
        ConfigError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.cli.dispatch import main
    except ImportError as error:
        raise ConfigError(
            f"lmms-eval 0.7 cannot be imported ({error}): install it, in an environment of its own, by "
            "`uv pip install --no-config 'namm-transfer[lmms-eval]'`"
        ) from error
    sys.argv = ["lmms-eval", *completed(arguments)]
    main()


def completed(arguments: Sequence[str]) -> list[str]:
    """The arguments with our model where none is named, and with the fingerprint of its NAMM."""
    given = list(arguments)
    evaluates = given and (given[0].startswith("-") or given[0] == "eval")  # not so `models`, `tasks`, `version`
    if not evaluates or "--help" in given:
        return given
    if not any(one.split("=")[0] in ("--model", "--config") for one in given):
        given += ["--model", MODEL]
    for index, one in enumerate(given):
        if one == MODEL_ARGS and index + 1 < len(given):
            given[index + 1] = _with_fingerprint(given[index + 1])
        elif one.startswith(f"{MODEL_ARGS}="):
            given[index] = f"{MODEL_ARGS}={_with_fingerprint(one.removeprefix(f'{MODEL_ARGS}='))}"
    return given


def _with_fingerprint(model_args: str) -> str:
    pairs = dict(pair.split("=", 1) for pair in model_args.split(",") if "=" in pair)
    if pairs.get("policy") != MODEL or "fingerprint" in pairs:
        return model_args
    namm = NAMM.from_pretrained(pairs.get("namm", "default"))
    return f"{model_args},fingerprint={FINGERPRINT.format(namm.fingerprint())}"
