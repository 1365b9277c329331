"""Batches on their way to a GPU while it computes the one before."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tavlad.clip import Batch, ClipBatch, PooledBatch


def batches_on(device: torch.device, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches on the device. To a GPU each is copied by a stream of its own during the step before it; that the
    copy does not wait for itself needs page-locked memory (`pin_memory`)."""
    if device.type != "cuda":
        yield from batches
        return
    source, stream = iter(batches), torch.cuda.Stream(device)

    def start() -> tuple[Batch, Batch] | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch, batch.to(device)  # what is copied from lives as long as the copy

    under_way = start()
    while under_way is not None:
        _, batch = under_way
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in _tensors(batch):
            tensor.record_stream(computing)  # its memory is free again when the step is done, not when it is dropped
        under_way = start()
        yield batch


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, ClipBatch):
        return [batch.frames_BTCHW, batch.labels_B]
    if isinstance(batch, PooledBatch):
        return [batch.pooled_BKD, batch.labels_B]
    maps, activation, _ = batch.features
    return [batch.labels_B, maps, *([] if activation is None else [activation])]
