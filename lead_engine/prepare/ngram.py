"""Losses without a model: how well counts over the pool, and a sample's own instruction, predict its answer.

Two predictors of a response token t behind token v, in sample i. Counts c are over the response tokens (and pairs of
tokens) of all *other* samples: what i holds is taken off, so that no sample predicts itself. V is one more than the
largest token id:

    alone(t | v) = a_2 c(v, t) / c(v) + a_1 c(t) / c + a_0 / V
    given(t | v) = g_2 c_i(v, t) / c_i(v) + g_1 c_i(t) / c_i + g_0 alone(t | v)

c_i counts the sample's own tokens that are no response (instruction and template; of a conversation, all turns): a
cache of what is there to be copied (Kuhn and De Mori 1990). Where a divisor is 0, the term takes the next lower one's
value. The weights a and g are those under which the pool's response tokens are likeliest (deleted interpolation,
Jelinek and Mercer 1980), by EM over evenly spaced samples.

What this measures is how well the *pool* predicts an answer, not how well some base model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lead_engine.pool.store import TokenStore

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BLOCK_TOKENS = 1 << 20
"""Tokens looked at in one go: some 100 bytes each."""
FIT_TOKENS = 1 << 20
"""Tokens, about, to which the weights are fitted."""
EM_STEPS = 20


class Counts(NamedTuple):
    """How often each of some keys occurs."""

    keys: Ints  # [u], ascending
    counts: Ints  # [u]

    def of(self, keys: Ints) -> Ints:
        """int64, the shape of `keys`; 0 for those that never occur."""
        if not len(self.keys):
            return np.zeros(keys.shape, dtype=np.int64)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)


class Block(NamedTuple):
    """Some consecutive samples' tokens, of three kinds: responses, free tokens (no responses), pairs of free tokens.

    Every array of a `sample` numbers the block's samples from 0.
    """

    first: int  # the first sample's number in the pool
    num_samples: int
    sample: Ints  # [r], of every response token that counts
    before: Ints  # [r], the token before it
    token: Ints  # [r]
    free_sample: Ints  # [f], of every token that is no response
    free_token: Ints  # [f]
    pair_sample: Ints  # [m], of every pair whose second token is no response
    pair_before: Ints  # [m]
    pair_token: Ints  # [m]


class Pool(NamedTuple):
    """Counts over all response tokens of the pool."""

    token: Ints  # [V]
    before: Ints  # [V], how often a token stands before a response token
    pair: Counts

    @property
    def vocabulary(self) -> int:
        return len(self.token)


def ngram_scores(store: TokenStore) -> tuple[Tensor, Tensor, Tensor]:
    """(utility, given, alone), each fp32 [N], in nats; 0 for a sample without a response token, as a model's loss is.

    Means over a sample's response tokens of -log given(t | v), the same again, and of -log alone(t | v). Reads the
    store three times in blocks of `BLOCK_TOKENS`, on the CPU. Nothing is random.
    """
    pool = count_pool(store)
    blocks = list(_blocks(store, -(-store.num_tokens // FIT_TOKENS)))
    terms = [alone_terms(block, pool) for block in blocks]
    alone_weights = fit_weights(np.concatenate(terms, axis=1))
    cached = [given_terms(block, pool.vocabulary, alone_weights @ t) for block, t in zip(blocks, terms, strict=True)]
    given_weights = fit_weights(np.concatenate(cached, axis=1))
    del blocks, terms, cached  # some 100 bytes a token

    given_nll, alone_nll = np.zeros(store.num_samples), np.zeros(store.num_samples)
    for block in _blocks(store):
        p_alone = alone_weights @ alone_terms(block, pool)
        p_given = given_weights @ given_terms(block, pool.vocabulary, p_alone)
        samples = slice(block.first, block.first + block.num_samples)
        given_nll[samples] = _sample_means(block, -np.log(p_given))
        alone_nll[samples] = _sample_means(block, -np.log(p_alone))
    given = torch.from_numpy(given_nll).float()
    return given.clone(), given, torch.from_numpy(alone_nll).float()


def _sample_means(block: Block, values: Floats) -> Floats:
    """[num_samples]: the mean of `values` [r] over each sample's response tokens."""
    tokens = np.bincount(block.sample, minlength=block.num_samples).clip(min=1)
    means: Floats = np.bincount(block.sample, values, minlength=block.num_samples) / tokens
    return means


def count_pool(store: TokenStore) -> Pool:
    """Counts over the pool's response tokens; the table of pairs is the only part that grows with the pool."""
    vocabulary = store.max_token_id + 1
    token, before = np.zeros(vocabulary, dtype=np.int64), np.zeros(vocabulary, dtype=np.int64)
    pair = _counts(np.zeros(0, dtype=np.int64))
    fresh: list[Counts] = []  # of blocks that are not merged into `pair` yet
    for block in _blocks(store):
        token += np.bincount(block.token, minlength=vocabulary)
        before += np.bincount(block.before, minlength=vocabulary)
        fresh.append(_counts(block.before * vocabulary + block.token))
        # Merging only when the table at least doubles keeps the work of all merges together linear.
        if sum(len(table.keys) for table in fresh) > len(pair.keys):
            pair, fresh = _merged([pair, *fresh]), []
    return Pool(token, before, _merged([pair, *fresh]))


def alone_terms(block: Block, pool: Pool) -> Floats:
    """[3, r]: 1 / V, c(t) / c and c(v, t) / c(v) of every response token, without its own sample's counts."""
    v = pool.vocabulary
    pair = block.before * v + block.token
    none = np.full(len(pair), 1 / v)
    # `_repeats` of keys that begin with the sample: how often a token's own sample has the same.
    own_tokens = np.bincount(block.sample, minlength=block.num_samples)[block.sample]
    of_token = pool.token[block.token] - _repeats(block.sample * v + block.token)
    one = _ratio(of_token, pool.token.sum() - own_tokens, none)
    of_before = pool.before[block.before] - _repeats(block.sample * v + block.before)
    of_pair = pool.pair.of(pair) - _repeats(block.sample * v**2 + pair)
    return np.stack([none, one, _ratio(of_pair, of_before, one)])


def given_terms(block: Block, vocabulary: int, alone: Floats) -> Floats:
    """[3, r]: alone(t | v), c_i(t) / c_i and c_i(v, t) / c_i(v) of every response token. alone: [r]."""
    v = vocabulary
    free = np.bincount(block.free_sample, minlength=block.num_samples)[block.sample]
    token = _counts(block.free_sample * v + block.free_token)
    before = _counts(block.pair_sample * v + block.pair_before)
    pair = _counts((block.pair_sample * v + block.pair_before) * v + block.pair_token)
    one = _ratio(token.of(block.sample * v + block.token), free, alone)
    context = block.sample * v + block.before
    two = _ratio(pair.of(context * v + block.token), before.of(context), one)
    return np.stack([alone, one, two])


def fit_weights(terms: Floats) -> Floats:
    """[k], summing to 1: the mixture of k predictors under which what happened is likeliest, by EM.

    Uniform where nothing happened. terms [k, n]: the probability of each of n events under each predictor; no event is
    impossible under all of them.
    """
    weights = np.full(len(terms), 1 / len(terms))
    if not terms.shape[1]:
        return weights
    for _ in range(EM_STEPS):
        share = weights[:, None] * terms
        weights = (share / share.sum(axis=0)).mean(axis=1)
    return weights


def _blocks(store: TokenStore, every: int = 1) -> Iterator[Block]:
    """The pool in order. every: blocks hold tokens of the samples 0, every, 2 * every, ... alone."""
    offsets = store.offsets.cpu().numpy()
    start = 0
    while start < store.num_samples:
        end = max(start + 1, int(np.searchsorted(offsets, offsets[start] + BLOCK_TOKENS, side="right")) - 1)
        low, high = int(offsets[start]), int(offsets[end])
        token = store.tokens[low:high].cpu().numpy().astype(np.int64)
        response = store.response[low:high].cpu().numpy()
        sample = np.repeat(np.arange(end - start), np.diff(offsets[start : end + 1]))
        before = np.roll(token, 1)
        has_before = np.ones(len(token), dtype=bool)
        has_before[offsets[start:end] - low] = False  # a sample's first token
        wanted = (sample + start) % every == 0
        free = wanted & ~response
        counts, pair = wanted & response & has_before, free & has_before
        yield Block(
            first=start,
            num_samples=end - start,
            sample=sample[counts],
            before=before[counts],
            token=token[counts],
            free_sample=sample[free],
            free_token=token[free],
            pair_sample=sample[pair],
            pair_before=before[pair],
            pair_token=token[pair],
        )
        start = end


def _counts(keys: Ints) -> Counts:
    return Counts(*np.unique(keys, return_counts=True))


def _merged(tables: list[Counts]) -> Counts:
    keys, place = np.unique(np.concatenate([table.keys for table in tables]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([table.counts for table in tables]), minlength=len(keys))
    return Counts(keys, counts.astype(np.int64))  # sums of integers in fp64 are exact up to 2**53


def _repeats(keys: Ints) -> Ints:
    """int64, the shape of `keys`: how often each occurs among them."""
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    repeats: Ints = counts[place]
    return repeats


def _ratio(count: Ints, total: Ints, otherwise: Floats) -> Floats:
    """count / total; `otherwise` where the total is 0."""
    return np.where(total > 0, count / np.maximum(total, 1), otherwise)
