"""Multiple-choice questions: which answer does a model find most likely?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketchconv.errors import EvaluationError
from sketchconv.evaluation.limits import check_numbers, check_question
from sketchconv.tokens import BYTE_ORDER_MARK, half_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sketchconv.evaluation.network import Network

_PROMPTS = ("question", "context", "prompt")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its possible continuations, and the index of the right one.

    `place` says for errors where it stands; what is asked does not depend on it.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    place: str = field(default="a question", compare=False)


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """How often a model's most likely continuation is the right one.

    Args:
        questions: how many were asked.
        accuracy: share right by the sum of the log-probabilities of a choice's tokens.
        accuracy_per_byte: share right by that sum over the choice's UTF-8 bytes, so that long
            answers are not at a disadvantage.
        error: standard error of `accuracy`; `error_per_byte` that of the other.
        chance: share right by guessing.
    """

    questions: int
    accuracy: float
    error: float
    accuracy_per_byte: float
    error_per_byte: float
    chance: float


def read_questions(path: Path) -> tuple[Question, ...]:
    """Questions of a JSON Lines file: `question` (or `context`, `prompt`), `choices`, `answer`.

    Both `context` and `question` make one prompt, in this order, a line break between. The answer
    is an index from 0, a letter from A, or the text of the right choice.

    Raises:
        EvaluationError: names the line and what is wrong with it.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK).split("\n")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: byte {error.start} is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    if not questions:
        raise EvaluationError(f"{path}: holds no question")
    return tuple(questions)


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise EvaluationError(f"{where}: expected an object, got {type(record).__name__}")
    parts = [record[key] for key in ("context", "question", "prompt") if key in record]
    choices = record.get("choices")
    if not parts or not all(isinstance(part, str) and part for part in parts):
        raise EvaluationError(f"{where}: needs a text under {' or '.join(_PROMPTS)}")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise EvaluationError(f"{where}: choices must be a list of at least two texts")
    found = half_character("\n".join([*parts, *choices]))
    if found is not None:
        raise EvaluationError(f"{where}: {found}")
    answer = _answer(record.get("answer"), choices, where)
    return Question("\n".join(parts), tuple(choices), answer, where)


def _answer(value: Any, choices: Sequence[str], where: str) -> int:
    index = value
    if isinstance(value, str) and value in choices:
        index = choices.index(value)
    elif isinstance(value, str) and len(value) == 1 and value.isascii() and value.isalpha():
        index = ord(value.upper()) - ord("A")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise EvaluationError(
            f"{where}: answer must be an index from 0 to {len(choices) - 1}, a letter from A or "
            f"one of the choices, got {value!r}"
        )
    return index


def answer_questions(
    network: Network, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> ChoiceScore:
    """Ask every question of a model, all choices of one at once.

    Raises:
        EvaluationError: a question is too long for the model or has tokens that it does not know,
            or the model gives NaN.
    """
    plain, per_byte = [], []
    with torch.inference_mode():
        for question in questions:
            sums = _log_probabilities(network, tokenizer, question)
            lengths = torch.tensor([len(choice.encode()) for choice in question.choices])
            plain.append(int(sums.argmax()) == question.answer)
            per_byte.append(int((sums / lengths).argmax()) == question.answer)
    count = len(questions)
    chance = math.fsum(1 / len(question.choices) for question in questions) / count
    first, second = sum(plain) / count, sum(per_byte) / count
    return ChoiceScore(count, first, _error(first, count), second, _error(second, count), chance)


def _log_probabilities(
    network: Network, tokenizer: PreTrainedTokenizerBase, question: Question
) -> Tensor:
    """Sum of log-probabilities of each choice's tokens after the prompt, float64 [choices]."""
    rows = [continued(tokenizer, question.prompt, choice) for choice in question.choices]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, (tokens, _) in enumerate(rows):
        ids[n, : len(tokens)] = torch.tensor(tokens)
        mask[n, : len(tokens)] = 1
    check_question(network, ids, question.place)
    states = network.states(ids, mask)[-1]
    sums = []
    for n, (tokens, begin) in enumerate(rows):
        logits = network.logits(states[n, begin - 1 : len(tokens) - 1]).cpu()
        chosen = torch.log_softmax(logits, -1).gather(1, ids[n, begin : len(tokens), None])
        sums.append(chosen.sum(dtype=torch.float64))
    found = torch.stack(sums)
    check_numbers(network.name, found)
    return found


def continued(
    tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str
) -> tuple[list[int], int]:
    """Tokens of a prompt with a choice after it, and where the choice begins.

    A space stands between them, with the choice: tokenizers keep it at the start of a word.
    """
    prompt, choice = prompt.rstrip(), f" {choice.strip()}"
    before: list[int] = list(tokenizer(prompt)["input_ids"])
    whole: list[int] = list(tokenizer(prompt + choice)["input_ids"])
    begin = 0
    while begin < min(len(before), len(whole) - 1) and before[begin] == whole[begin]:
        begin += 1
    return whole, max(begin, 1)


def _error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
