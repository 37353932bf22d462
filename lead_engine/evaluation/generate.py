"""Greedy answers to held-out prompts, by transformers' own generation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lead_engine.base import console
from lead_engine.pool.end_of_turn import stop_tokens
from lead_engine.pool.records import Record
from lead_engine.pool.rendering import Renderer
from lead_engine.pool.template import prompt_ids


class Question(NamedTuple):
    """A record's last answer, to be generated: the tokens of the prompt, and the record's own answer."""

    record: Record
    prompt: list[int]
    reference: str


def choose_questions(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_task: int,
    longest: int,
    task_of: Callable[[Record], str],
) -> tuple[list[Question], int]:
    """Up to `per_task` records of every task, and how many prompts were longer than `longest` tokens.

    The choice depends on the records' ids alone (the smallest SHA-256), so every model answers the same questions in
    whatever order the file is; a model whose tokenizer makes more tokens may skip more of them. A record whose last
    answer is a tool call without text is not chosen, because nothing could be compared.
    """
    chosen: list[Question] = []
    taken: dict[str, int] = {}
    too_long = 0
    renderer = Renderer(tokenizer)
    for record in sorted(records, key=lambda r: hashlib.sha256(r.id.encode()).digest()):
        task = task_of(record)
        if taken.get(task, 0) == per_task or not record.messages[-1].content.strip():
            continue
        prompt = prompt_ids(renderer, record)
        if len(prompt) > longest:
            too_long += 1
            continue
        taken[task] = taken.get(task, 0) + 1
        chosen.append(Question(record, prompt, record.messages[-1].content))
    return chosen, too_long


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[str]:
    """The model's greedy continuation of every prompt, without special tokens, in the prompts' order.

    Prompts of similar length are padded on the left into batches of at most `batch_tokens` tokens (at least one
    prompt). Generation settings in the model's folder, such as sampling and repetition penalties, are not used.
    """
    ends = stop_tokens(tokenizer)
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = ends[0] if ends else 0  # any token: the mask hides it
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers gives it no types
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=padding
    )
    generator: Any = model
    model.generation_config = settings
    answers = [""] * len(prompts)
    with console.progress(len(prompts), "answers") as bar:
        for batch in batches_by_length([len(prompt) for prompt in prompts], max_new_tokens, batch_tokens):
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), longest), padding, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            output = generator.generate(ids, attention_mask=mask, generation_config=settings)
            for i, new in zip(batch, output[:, longest:].tolist(), strict=True):
                text: Any = tokenizer.decode(_until(new, ends), skip_special_tokens=True)
                answers[i] = text.strip()
            bar.advance(len(batch))
    return answers


def batches_by_length(lengths: Sequence[int], extra: int, batch_tokens: int) -> list[list[int]]:
    """Indices in batches, longest first, so that (longest + extra) x size is at most `batch_tokens` (or size is 1)."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room == 0:
            room = max(1, batch_tokens // (lengths[i] + extra))
            batches.append([])
        batches[-1].append(i)
        room -= 1
    return batches


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """`tokens` up to the first that ends an answer; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
