"""Language samples that ask what a memory still knows: needles, recall of a passage, continuation.

Every sample is one teacher-forced sequence with marked answer tokens. The answers stand behind everything they ask
about, and a causal model reads no token after the one it predicts, so one pass over the sequence gives the likelihood
of every answer under exactly the memory that had been kept when it was due.

Shape legend: T tokens of a sample, M marked answer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution.text import Document

__all__ = ["KINDS", "Sample", "SampleMaker"]

_FACTS = (
    ("The magic number of {subject} is {value}.", "What is the magic number of {subject}?", "number"),
    ("The phone extension of {subject} is {value}.", "What is the phone extension of {subject}?", "number"),
    ("The secret word of {subject} is {value}.", "What is the secret word of {subject}?", "word"),
    ("The favourite animal of {subject} is the {value}.", "What is the favourite animal of {subject}?", "animal"),
    ("The parcel for {subject} was sent to {value}.", "Where was the parcel for {subject} sent to?", "city"),
)
_NAMES = """
    Anna Boris Carla David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nora Oscar
    Paula Quentin Rosa Stefan Tina Ulrich Vera Walter Xenia Yusuf Zoe Amir Bianca Cyrus Doris
"""
_WORDS = """
    lantern copper velvet harbour pepper marble thunder willow saddle crystal
    bottle ladder anchor feather candle mirror pocket ribbon basket timber
"""
_ANIMALS = "otter badger falcon lizard camel panda beaver parrot walrus donkey spider salmon"
_CITIES = "Lisbon Oslo Cairo Lima Dublin Kyoto Nairobi Quebec Athens Prague Havana Seoul"
_SUBJECTS = tuple(_NAMES.split())
_VALUES = MappingProxyType(
    {"word": tuple(_WORDS.split()), "animal": tuple(_ANIMALS.split()), "city": tuple(_CITIES.split())}
)


@dataclass(frozen=True)
class Sample:
    """One sequence and the tokens in it whose likelihood counts.

    Attributes:
        kind: a name of `KINDS`.
        document: name of the document that the text is from.
        input_ids: [T] int64.
        targets: [M] int64 positions in `input_ids`, rising, each at least 1.
    """

    kind: str
    document: str
    input_ids: torch.Tensor
    targets: torch.Tensor


class SampleMaker:
    """Makes samples from documents; each call of `draw` depends on the generator given to it alone.

    Args:
        documents: texts to hide needles in.
        tokenizer: a fast tokenizer with a chat template.
        context_tokens: about how many tokens of a sample stand before the first question.
        questions: how many questions a needle sample asks; as many facts more are hidden and never asked about.

    Raises:
        ConfigError: more questions than there are subjects for.
        DataError: no document is long enough.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        context_tokens: int,
        questions: int = 4,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.questions = questions
        if not 1 <= questions <= len(_SUBJECTS) // 2:
            raise ConfigError(f"questions must be from 1 to {len(_SUBJECTS) // 2}; got {questions}")
        self._documents: list[tuple[str, list[str], list[int]]] = []
        for document in documents:
            sentences = re.split(r"(?<=[.?!])\s+", document.text)
            lengths = [len(ids) for ids in tokenizer([f"{s} " for s in sentences], add_special_tokens=False).input_ids]
            if sum(lengths) > context_tokens * 1.2:
                self._documents.append((document.name, sentences, lengths))
        if not self._documents:
            raise DataError(f"none of {len(documents)} documents is longer than 1.2 x {context_tokens} tokens")

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents that are long enough."""
        return tuple(name for name, _, _ in self._documents)

    def draw(self, kind: str, rng: np.random.Generator, document: str | None = None) -> Sample:
        """Make one sample.

        Args:
            kind: a name of `KINDS`.
            rng: the only source of chance.
            document: name of the document to take; drawn when None.

        Raises:
            ConfigError: the kind is unknown.
            DataError: the document is unknown or too short.
        """
        if kind not in KINDS:
            raise ConfigError(f"kind of sample {kind!r} is none of {tuple(KINDS)}")
        if document is None:
            document = self.documents[rng.integers(len(self._documents))]
        found = next((entry for entry in self._documents if entry[0] == document), None)
        if found is None:
            raise DataError(f"document {document!r} is unknown or shorter than 1.2 x {self.context_tokens} tokens")
        return KINDS[kind](self, found, rng)

    def _passage(self, entry: tuple[str, list[str], list[int]], tokens: int, rng: np.random.Generator) -> list[str]:
        """Consecutive sentences of about the given number of tokens, from anywhere in the document."""
        _, sentences, lengths = entry
        ends = np.cumsum(lengths)
        last_start = int(np.searchsorted(ends, ends[-1] - tokens))
        start = int(rng.integers(last_start + 1))
        stop = int(np.searchsorted(ends, ends[start] - lengths[start] + tokens)) + 1
        return sentences[start:stop]

    def _needles(self, entry: tuple[str, list[str], list[int]], rng: np.random.Generator) -> Sample:
        count = 2 * self.questions
        subjects = rng.choice(len(_SUBJECTS), count, replace=False)
        facts, dialogue = [], []
        for subject in subjects:
            statement, question, domain = _FACTS[rng.integers(len(_FACTS))]
            value = str(rng.integers(1_000, 100_000)) if domain == "number" else str(rng.choice(_VALUES[domain]))
            names = {"subject": _SUBJECTS[subject], "value": value}
            facts.append(statement.format(**names))
            dialogue.append((question.format(**names), statement.format(**names), value))
        needle_tokens = sum(len(ids) for ids in self.tokenizer(facts, add_special_tokens=False).input_ids)
        parts = self._passage(entry, max(self.context_tokens - needle_tokens, self.context_tokens // 2), rng)
        for fact in facts:
            parts.insert(int(rng.integers(1, len(parts) + 1)), fact)
        asked = [dialogue[i] for i in rng.permutation(count)[: self.questions]]
        return self._dialogue("needles", entry[0], " ".join(parts), asked)

    def _recall(self, entry: tuple[str, list[str], list[int]], rng: np.random.Generator) -> Sample:
        parts = self._passage(entry, self.context_tokens, rng)
        # Long sentences only, and not from the end, which every memory still holds.
        lengths = [len(ids) for ids in self.tokenizer(parts, add_special_tokens=False).input_ids]
        eligible = [i for i, length in enumerate(lengths[:-3]) if 12 <= length <= 48] or [int(np.argmax(lengths))]
        chosen = rng.permutation(eligible)[:2]
        asked = []
        for index in chosen:
            words = parts[index].split(" ")
            lead = " ".join(words[: max(3, len(words) // 4)])
            asked.append((f'Repeat the sentence that begins with "{lead}".', parts[index], parts[index][len(lead) :]))
        return self._dialogue("recall", entry[0], " ".join(parts), asked)

    def _continuation(self, entry: tuple[str, list[str], list[int]], rng: np.random.Generator) -> Sample:
        text = " ".join(self._passage(entry, int(self.context_tokens * 1.15), rng))
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        start = min(self.context_tokens, len(ids) * 7 // 8)
        return Sample("continuation", entry[0], ids, torch.arange(start, len(ids)))

    def _dialogue(self, kind: str, document: str, text: str, asked: Sequence[tuple[str, str, str]]) -> Sample:
        """A chat: the text, then (question, reply, what of the reply counts), one after the other."""
        messages = []
        for number, (question, reply, _) in enumerate(asked):
            messages.append({"role": "user", "content": f"{text}\n\n{question}" if number == 0 else question})
            messages.append({"role": "assistant", "content": reply})
        rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"]).T
        targets: list[int] = []
        position = rendered.index(text) + len(text)
        for question, reply, answer in asked:
            begin = rendered.index(reply, rendered.index(question, position) + len(question))
            begin += reply.rindex(answer)
            position = begin + len(answer)
            targets.extend(np.flatnonzero((ends > begin) & (starts < position) & (ends > starts)))
        return Sample(kind, document, torch.tensor(encoded["input_ids"]), torch.tensor(targets))


KINDS: Mapping[str, Callable[[SampleMaker, tuple[str, list[str], list[int]], np.random.Generator], Sample]] = (
    MappingProxyType(
        {
            "needles": SampleMaker._needles,
            "recall": SampleMaker._recall,
            "continuation": SampleMaker._continuation,
        }
    )
)
"""Name of each kind of sample and what makes it: facts hidden in an essay and asked about; sentences of an essay to
be repeated; the essay's own next tokens."""
