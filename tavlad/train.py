"""The training loop of one stage. It has never heard of Ray: batches come in, reports go out."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from tavlad.ahead import batches_on
from tavlad.checkpoint import TrainState
from tavlad.clip import Batch
from tavlad.config import StageConfig, TrainingConfig
from tavlad.draws import seed_clips
from tavlad.errors import UserError
from tavlad.evaluate import evaluate
from tavlad.memory import keep_freed_memory
from tavlad.metrics import NotNumbers, Scores
from tavlad.model import TaVlad
from tavlad.optim import build_optimizer, choose_trained, learning_rate
from tavlad.parallel import ALONE, World, autocast
from tavlad.precision import exact_float32
from tavlad.reduction import TreeSum


class Diverged(UserError):
    """The loss, or what the model says of a clip, is no longer a number: these settings cannot be trained with."""


@runtime_checkable
class Batches(Protocol):
    """This rank's share of the batches of any epoch, in an order that only the epoch decides."""

    @property
    def num_steps(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Which stage to train, and how."""

    number: Literal[1, 2]
    stage: StageConfig
    training: TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What happened in one epoch, the same on every rank."""

    stage: int
    epoch: int
    """From 1, as people count."""
    num_epochs: int
    metrics: dict[str, float]
    """By path, such as "train/loss" and "test/top1" (0 to 1)."""
    scores: Scores | None
    """Of the test part, in epochs that evaluate it."""
    state: TrainState
    """For resuming after this epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listeners:
    """Whom the loop tells. Every rank calls them."""

    on_epoch: Callable[[EpochReport], None]
    on_step: Callable[[int, int], None] = field(default=lambda done, total: None)
    """Told the steps done and the steps in all of this stage."""
    wants_state: Callable[[int], bool] = field(default=lambda done: False)
    """Asked after each step but an epoch's last, with the steps done in this stage; every rank must answer alike."""
    on_state: Callable[[TrainState], None] = field(default=lambda state: None)
    """Given the state that was wanted; the next step changes the weights and the optimiser's tensors."""


def fit(
    model: TaVlad,
    plan: StagePlan,
    train: Batches,
    test: Batches | None,
    listeners: Listeners,
    resume: TrainState | None = None,
    world: World = ALONE,
    *,
    scored: Batches | None = None,
) -> None:
    """Train the model in place through one stage, from the step that `resume` names.

    Epochs are tested on `test`, in the precision of training; the last one on `scored` if it is given, in that of
    `training.scoring`.

    The loss of a step is the cross entropy (with label smoothing if asked for) averaged over the clips of the global
    batch, whatever the number of ranks and however unevenly they share it; the model's draws are a matter of the clip's
    place in that batch. So the number of ranks changes nothing but the order in which float32 values are added up, and
    with `world.virtual_ranks` not even that. Raises `Diverged`, on every rank at the same step, when the loss, or an
    output for a clip tested on, is no longer a number.
    """
    stage, number = plan.stage, plan.number
    keep_freed_memory(world.device)
    train = _Passes(train, number, stage.passes(train.num_steps))
    choose_trained(model, stage)
    training = plan.training
    model.speed(compile=training.compile, cuda_graphs=training.cuda_graphs, recompute=training.recompute)
    optimizer = build_optimizer(model, stage, plan.training)
    resume = resume or TrainState(stage=number, next_epoch=0, optimizer=optimizer.state_dict())
    assert resume.stage == number, "a state resumes its own stage"
    optimizer.load_state_dict(resume.optimizer)
    epochs = _Epochs(world.wrap(model), optimizer, plan, train, listeners, world, world.tree_sum(model))
    for epoch in range(resume.next_epoch, stage.epochs):
        metrics = epochs.run(epoch, resume if epoch == resume.next_epoch else None)
        scores = None
        is_last = epoch + 1 == stage.epochs
        try:
            if scored is not None and is_last:
                scores = evaluate(model, scored.epoch(0), training.scoring_precision, world)
            elif test is not None and (is_last or (epoch + 1) % training.evaluate_every == 0):
                scores = evaluate(model, test.epoch(0), training.precision, world)
        except NotNumbers as error:
            raise _diverged(str(error), plan, f"after epoch {epoch + 1}") from error
        if scores is not None:
            metrics |= scores.summary("test")
        report = EpochReport(
            stage=number,
            epoch=epoch + 1,
            num_epochs=stage.epochs,
            metrics=metrics,
            scores=scores,
            state=TrainState(stage=number, next_epoch=epoch + 1, optimizer=optimizer.state_dict()),
        )
        listeners.on_epoch(report)


def _diverged(what: str, plan: StagePlan, when: str) -> Diverged:
    return Diverged(f"{what} in stage {plan.number}, {when}: lower stage{plan.number}.lr (now {plan.stage.lr:g})")


@dataclass(frozen=True, kw_only=False, slots=True)
class _Epochs:
    """Runs the epochs of one stage."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: StagePlan
    train: Batches
    listeners: Listeners
    world: World
    tree_sum: TreeSum | None

    def run(self, epoch: int, resume: TrainState | None) -> dict[str, float]:
        """One pass over the training part, or what is left of it; returns its metrics over all ranks."""
        plan, world, listeners = self.plan, self.world, self.listeners
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(plan.stage, epoch)
        first = 0 if resume is None else resume.next_step
        # What was done before counts once: on the first rank.
        sums = _Sums(resume.sums if resume is not None and world.rank == 0 else None)
        started, num_before = time.perf_counter(), sums.clips
        self.model.train()
        batches = self.train.epoch(epoch, first)
        for step, batch in enumerate(batches_on(world.device, batches), start=first):
            loss = self._step(batch, epoch, step, sums)
            if not math.isfinite(loss):
                raise _diverged(f"the loss became {loss}", plan, f"epoch {epoch + 1}, step {step + 1}")
            done = epoch * self.train.num_steps + step + 1
            listeners.on_step(done, plan.stage.epochs * self.train.num_steps)
            if step + 1 < self.train.num_steps and listeners.wants_state(done):
                listeners.on_state(self._state(epoch, step + 1, sums))
        seconds = time.perf_counter() - started
        num_clips = world.sum(torch.tensor(sums.clips - num_before)).item()
        rates = {"clips_per_second": num_clips / seconds, "lr": self.optimizer.param_groups[0]["lr"]}
        return sums.over(world) | rates

    def _step(self, batch: Batch, epoch: int, step: int, sums: "_Sums") -> float:
        """One optimiser step; returns the loss, summed over the global batch's clips: every rank has to know when it is
        no longer a number, or those that do not would wait for the others in the next step."""
        world, seed = self.world, self.plan.training.seed
        # Ranks' gradients are averaged by DDP: times the world's size, over the global batch, they are the global mean.
        weight = (1 if self.tree_sum else world.size) / batch.num_clips_in_global_batch
        before = sums.loss
        self.optimizer.zero_grad(set_to_none=True)
        for share in world.shares(batch):
            # A draw is a function of the clip's place in the epoch, so that resuming needs no generator state. A blank
            # clip, in place of none, draws too.
            seeds = [draw_seed(seed, self.plan.number, epoch, step, position) for position in share.positions]
            seed_clips(self.model, seeds or [0])
            if share.batch.keys or self.tree_sum is None:
                _add_gradients(self.model, share.batch, self.plan.training, weight, sums)
            if self.tree_sum is not None:
                self.tree_sum.add(share.part, computed=bool(share.batch.keys))
        seed_clips(self.model, ())
        if self.tree_sum is not None:
            self.tree_sum.finish()
        self.optimizer.step()
        return world.sum(torch.tensor(sums.loss - before, dtype=torch.float64)).item()

    def _state(self, epoch: int, next_step: int, sums: "_Sums") -> TrainState:
        return TrainState(
            stage=self.plan.number,
            next_epoch=epoch,
            next_step=next_step,
            sums=tuple(sums.total(self.world)),
            optimizer=self.optimizer.state_dict(),
        )


class _Passes:
    """A stage's batches: an epoch is some passes over the training part, each in an order and with views of its own."""

    def __init__(self, batches: Batches, stage: int, passes: int) -> None:
        self._batches, self._stage, self._passes = batches, stage, passes

    @property
    def num_steps(self) -> int:
        return self._batches.num_steps * self._passes

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        first, start_step = divmod(start_step, self._batches.num_steps)
        for number in range(first, self._passes):
            drawn = _epoch_of_pass(self._stage, epoch * self._passes + number)
            yield from self._batches.epoch(drawn, start_step if number == first else 0)


def epochs_read(plan: StagePlan, steps_a_pass: int) -> Iterator[int]:
    """The epochs that `fit` asks its training batches for, when one pass over them has so many steps."""
    num_passes = plan.stage.epochs * plan.stage.passes(steps_a_pass)
    return (_epoch_of_pass(plan.number, done) for done in range(num_passes))


_PASSES_A_TURN = 1_000_000


def _epoch_of_pass(stage: int, passes_done: int) -> int:
    """The epoch, for the batches, of a stage's pass after so many others. The stages take turns, a million passes each,
    so that no pass of one has the order and the views of a pass of the other, however many there are."""
    turns_before, place = divmod(passes_done, _PASSES_A_TURN)
    return (stage + 2 * turns_before) * _PASSES_A_TURN + place


def draw_seed(seed: int, stage: int, epoch: int, step: int, position: int) -> int:
    """A generator seed of its own for each clip of a step's global batch, below 2^63."""
    text = f"{seed}/{stage}/{epoch}/{step}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class _Sums:
    """Sums over an epoch's clips on one rank; averaged only when printed."""

    def __init__(self, before: tuple[float, ...] | None = None) -> None:
        self.loss, self.correct, self.clips = before or (0.0, 0.0, 0.0)

    def total(self, world: World) -> list[float]:
        """Over all ranks."""
        return world.sum(torch.tensor([self.loss, self.correct, self.clips], dtype=torch.float64)).tolist()

    def over(self, world: World) -> dict[str, float]:
        """The epoch's metrics."""
        loss, correct, clips = self.total(world)
        return {"train/loss": loss / clips, "train/top1": correct / clips}


def _add_gradients(model: nn.Module, batch: Batch, training: TrainingConfig, weight: float, sums: _Sums) -> None:
    """Add the gradients of the clips' losses times `weight` to the parameters', and the clips to the sums."""
    device = next(model.parameters()).device
    num_clips = len(batch.keys)
    labels_B = batch.labels_B.to(device) if num_clips else torch.zeros(1, dtype=torch.int64, device=device)
    with autocast(device, training.precision):
        logits_BA = model(batch.inputs(device))
    losses_B = nn.functional.cross_entropy(
        logits_BA.float(), labels_B, reduction="none", label_smoothing=training.label_smoothing
    )
    loss_sum = losses_B.sum() * (num_clips > 0)
    with exact_float32():
        (loss_sum * weight).backward()
    sums.loss += loss_sum.item()
    sums.correct += int((logits_BA[:num_clips].argmax(dim=1) == labels_B[:num_clips]).sum())
    sums.clips += num_clips
