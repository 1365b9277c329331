"""Scoring a model on the clips of one part of a split, over any number of ranks."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from tavlad.ahead import batches_on
from tavlad.clip import Batch
from tavlad.errors import UserError
from tavlad.memory import keep_freed_memory
from tavlad.metrics import Scores
from tavlad.model import TaVlad
from tavlad.parallel import ALONE, World, autocast


@torch.no_grad()
def evaluate(
    model: TaVlad,
    batches: Iterable[Batch],
    precision: str,
    world: World = ALONE,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Every rank's clips scored and gathered: each rank returns the scores of all clips, ordered by key.

    `on_batch` is told how many clips of the whole part are done.
    """
    model.eval()
    device = next(model.parameters()).device
    keep_freed_memory(device)
    keys: list[str] = []
    labels: list[torch.Tensor] = []
    probabilities: list[torch.Tensor] = []
    num_done = 0
    for batch in batches_on(device, batches):
        for share in world.shares(batch):
            if share.batch.keys:
                with autocast(device, precision):
                    logits_BA = model(share.batch.inputs(device))
                keys.extend(share.batch.keys)
                labels.append(share.batch.labels_B.cpu())
                probabilities.append(logits_BA.float().softmax(dim=1).cpu())
        num_done += batch.num_clips_in_global_batch
        if on_batch is not None:
            on_batch(num_done)
    own = (keys, torch.cat(labels).numpy(), torch.cat(probabilities).numpy()) if keys else None
    parts = [part for part in world.gather(own) if part is not None]
    all_keys = [key for part in parts for key in part[0]]
    if not all_keys:
        raise UserError("there are no clips to score: this part of the split is empty")
    order = sorted(range(len(all_keys)), key=all_keys.__getitem__)
    return Scores(
        keys=tuple(all_keys[row] for row in order),
        labels=np.concatenate([part[1] for part in parts])[order],
        probabilities=np.concatenate([part[2] for part in parts])[order],
    )
