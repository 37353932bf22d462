"""Losses without a model: how well counts of tokens and pairs of tokens over the pool, and a sample's own instruction, predict its answer.

Two predictors of a response token t behind token v, in sample i. Counts are over the response tokens of all *other* samples (what i holds
is taken off, so that no sample predicts itself), V is one more than the largest token id:

    alone(t | v) = a_2 c(v, t) / c(v) + a_1 c(t) / c + a_0 / V
    given(t | v) = g_2 c_i(v, t) / c_i(v) + g_1 c_i(t) / c_i + g_0 alone(t | v)

c_i counts the sample's own tokens that are no response (instruction and template; of a conversation, all turns): a cache of what is there
to be copied (Kuhn and De Mori 1990). Where a divisor is 0, the term takes the next lower one's value. The weights a and g are those under
which the pool's response tokens are likeliest (deleted interpolation, Jelinek and Mercer 1980), by EM over evenly spaced samples.

What this measures is how well the *pool* predicts an answer, not how well some base model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lead_engine.pool.store import TokenStore

BLOCK_TOKENS = 1 << 20
"""Tokens looked at in one go: some 100 bytes each."""
FIT_TOKENS = 1 << 20
"""Tokens, about, to which the weights are fitted."""
EM_STEPS = 20


class Counts(NamedTuple):
    """How often each of some keys occurs."""

    keys: np.ndarray  # int64 [u], ascending
    counts: np.ndarray  # int64 [u]

    def of(self, keys: np.ndarray) -> np.ndarray:
        """int64, the shape of `keys`; 0 for those that never occur."""
        if not len(self.keys):
            return np.zeros(keys.shape, dtype=np.int64)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)


class Block(NamedTuple):
    """Some consecutive samples' tokens; all int64. Samples are counted from `first`; a pair is first token * V + second."""

    first: int  # number of the first sample
    size: int  # samples
    sample: np.ndarray  # [r], of every response token that counts
    before: np.ndarray  # [r], the token before it
    token: np.ndarray  # [r]
    free_sample: np.ndarray  # [f], of every token that is no response
    free_token: np.ndarray  # [f]
    pair_sample: np.ndarray  # [m], of every pair whose second token is no response
    pair_before: np.ndarray  # [m]
    pair_token: np.ndarray  # [m]


class Pool(NamedTuple):
    """Counts over all response tokens of the pool."""

    token: np.ndarray  # int64 [V]
    before: np.ndarray  # int64 [V], how often a token stands before a response token
    pair: Counts

    @property
    def vocabulary(self) -> int:
        return len(self.token)


def ngram_scores(store: TokenStore) -> tuple[Tensor, Tensor, Tensor]:
    """(utility, given, alone), each fp32 [N]: means over a sample's response tokens of -log given(t | v), the same again, and of
    -log alone(t | v), in nats; 0 for a sample without a response token that counts (as a model's loss is).

    Reads the store three times in blocks of `BLOCK_TOKENS`, on the CPU. Nothing is random.
    """
    pool = count_pool(store)
    blocks = list(_blocks(store, -(-store.num_tokens // FIT_TOKENS)))
    terms = [alone_terms(block, pool) for block in blocks]
    alone_weights = fit_weights(np.concatenate(terms, axis=1))
    given = [
        given_terms(block, pool.vocabulary, alone_weights @ term) for block, term in zip(blocks, terms, strict=True)
    ]
    given_weights = fit_weights(np.concatenate(given, axis=1))
    del blocks, terms, given

    out = np.zeros((2, store.num_samples))
    for block in _blocks(store):
        alone = alone_weights @ alone_terms(block, pool)
        given = given_weights @ given_terms(block, pool.vocabulary, alone)
        place = slice(block.first, block.first + block.size)
        tokens = np.bincount(block.sample, minlength=block.size).clip(min=1)
        for row, probability in zip(out, (given, alone), strict=True):
            row[place] = np.bincount(block.sample, -np.log(probability), minlength=block.size) / tokens
    given_nll, alone_nll = torch.from_numpy(out).float()
    return given_nll.clone(), given_nll, alone_nll


def count_pool(store: TokenStore) -> Pool:
    """Counts over the pool's response tokens; the table of pairs is the only part that grows with the pool."""
    size = store.max_token_id + 1
    token, before = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    pair, fresh = _counts(np.zeros(0, dtype=np.int64)), []
    for block in _blocks(store):
        token += np.bincount(block.token, minlength=size)
        before += np.bincount(block.before, minlength=size)
        fresh.append(_counts(block.before * size + block.token))
        if sum(len(table.keys) for table in fresh) > len(
            pair.keys
        ):  # merging no sooner keeps all merges together linear
            pair, fresh = _merged([pair, *fresh]), []
    return Pool(token, before, _merged([pair, *fresh]))


def alone_terms(block: Block, pool: Pool) -> np.ndarray:
    """fp64 [3, r]: 1 / V, c(t) / c and c(v, t) / c(v) of every response token, without its own sample's counts."""
    size = pool.vocabulary
    pair = block.before * size + block.token
    own_tokens = np.bincount(block.sample, minlength=block.size)[block.sample]
    none = np.full(len(pair), 1 / size)
    one = _ratio(
        pool.token[block.token] - _repeats(block.sample * size + block.token), pool.token.sum() - own_tokens, none
    )
    of_before = pool.before[block.before] - _repeats(block.sample * size + block.before)
    two = _ratio(pool.pair.of(pair) - _repeats(block.sample * size**2 + pair), of_before, one)
    return np.stack([none, one, two])


def given_terms(block: Block, size: int, alone: np.ndarray) -> np.ndarray:
    """fp64 [3, r]: alone(t | v), c_i(t) / c_i and c_i(v, t) / c_i(v) of every response token; alone: fp64 [r], size: V."""
    free = np.bincount(block.free_sample, minlength=block.size)[block.sample]
    token = _counts(block.free_sample * size + block.free_token)
    before = _counts(block.pair_sample * size + block.pair_before)
    pair = _counts((block.pair_sample * size + block.pair_before) * size + block.pair_token)
    one = _ratio(token.of(block.sample * size + block.token), free, alone)
    context = block.sample * size + block.before
    return np.stack([alone, one, _ratio(pair.of(context * size + block.token), before.of(context), one)])


def fit_weights(terms: np.ndarray) -> np.ndarray:
    """fp64 [k], summing to 1: the mixture of k predictors under which what happened is likeliest, by EM; uniform where nothing happened.

    terms: fp64 [k, n], the probability of each of n events under each predictor; no event impossible under all of them.
    """
    weights = np.full(len(terms), 1 / len(terms))
    if not terms.shape[1]:
        return weights
    for _ in range(EM_STEPS):
        share = weights[:, None] * terms
        weights = (share / share.sum(axis=0)).mean(axis=1)
    return weights


def _blocks(store: TokenStore, every: int = 1) -> Iterator[Block]:
    """The pool in order. every: only of samples 0, every, 2 * every, ... are there tokens."""
    offsets = store.offsets.cpu().numpy()
    start = 0
    while start < store.num_samples:
        end = max(start + 1, int(np.searchsorted(offsets, offsets[start] + BLOCK_TOKENS, side="right")) - 1)
        low, high = int(offsets[start]), int(offsets[end])
        token = store.tokens[low:high].cpu().numpy().astype(np.int64)
        response = store.response[low:high].cpu().numpy()
        sample = np.repeat(np.arange(end - start), np.diff(offsets[start : end + 1]))
        before, second = np.roll(token, 1), np.ones(len(token), dtype=bool)
        second[offsets[start:end] - low] = False
        wanted = (sample + start) % every == 0
        counts, free, pair = wanted & response & second, wanted & ~response, wanted & ~response & second
        yield Block(
            start,
            end - start,
            sample[counts],
            before[counts],
            token[counts],
            sample[free],
            token[free],
            sample[pair],
            before[pair],
            token[pair],
        )
        start = end


def _counts(keys: np.ndarray) -> Counts:
    return Counts(*np.unique(keys, return_counts=True))


def _merged(tables: list[Counts]) -> Counts:
    keys, place = np.unique(np.concatenate([table.keys for table in tables]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([table.counts for table in tables]), minlength=len(keys))
    return Counts(keys, counts.astype(np.int64))  # sums of integers in fp64 are exact up to 2**53


def _repeats(keys: np.ndarray) -> np.ndarray:
    """int64, the shape of `keys`: how often each occurs among them."""
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[place]


def _ratio(count: np.ndarray, total: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    return np.where(total > 0, count / np.maximum(total, 1), otherwise)
