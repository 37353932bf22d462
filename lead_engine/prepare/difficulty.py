"""From scores to difficulty, drops, clusters and tasks."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor

from lead_engine.base.errors import UserError


def difficulty(with_instruction: Tensor, alone: Tensor) -> Tensor:
    """mean NLL(answer | instruction) / mean NLL(answer): fp32 [n], the ratio of LEAD's coarse stage (arXiv 2505.07437).

    Where the answer alone costs nothing (NLL 0), no instruction can help: the ratio counts as 1.
    """
    return torch.where(alone > 0, with_instruction / alone.clamp(min=1e-12), torch.ones_like(alone))


def cluster_by_difficulty(ratio: Tensor, dropped: Tensor, clusters: int, seed: int) -> tuple[Tensor, list[float]]:
    """1-D k-means of the ratios that were kept.

    Returns (cluster int64 [n], easiest first, the last one where dropped; mean ratio of each cluster). Raises UserError
    if there are fewer different ratios than clusters.
    """
    kept = ratio[~dropped].double().numpy()
    different = len(np.unique(kept))
    if different < clusters:
        reason = f"the {len(kept)} kept samples have only {different} different difficulties; ask for fewer"
        raise UserError(f"--clusters {clusters}: {reason}")
    fit = KMeans(n_clusters=clusters, n_init=10, random_state=seed).fit(kept[:, None])
    order = np.argsort(fit.cluster_centers_[:, 0])
    rank = np.empty(clusters, dtype=np.int64)  # k-means numbers its clusters in no order
    rank[order] = np.arange(clusters)
    cluster = torch.full((len(ratio),), clusters - 1)
    cluster[~dropped] = torch.from_numpy(rank[fit.labels_])
    return cluster, fit.cluster_centers_[order, 0].tolist()


def tasks_by_name(names: list[str]) -> tuple[Tensor, list[str]]:
    """Tasks from the records' `dataset` field, in alphabetical order; records without one are the task "unnamed"."""
    named = [name or "unnamed" for name in names]
    order = sorted(set(named))
    place = {name: i for i, name in enumerate(order)}
    return torch.tensor([place[name] for name in named]), order


def tasks_by_topic(means: Tensor, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Tasks by k-means of mean hidden states, fp32 [n, H], scaled to length 1.

    Raises UserError if there are fewer samples than tasks.
    """
    if len(means) < count:
        raise UserError(f"--tasks {count}: the pool has only {len(means)} samples")
    directions = torch.nn.functional.normalize(means, dim=1).numpy()
    labels = MiniBatchKMeans(n_clusters=count, n_init=5, random_state=seed, batch_size=4096).fit_predict(directions)
    return torch.from_numpy(labels.astype(np.int64)), [f"topic-{i}" for i in range(count)]
