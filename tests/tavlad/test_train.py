"""The training loop, alone and over ranks, against steps written out by hand."""

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tavlad.checkpoint import TrainState, load_state, load_weights_into, save_checkpoint
from tavlad.clip import ClipBatch
from tavlad.config import StageConfig
from tavlad.model import TaVlad
from tavlad.optim import choose_trained, learning_rate
from tavlad.parallel import World
from tavlad.train import EpochReport, Listeners, StagePlan, fit
from tests.tavlad.tiny import CARD, CONFIG, STAGE1, STAGE2, TRAINING, TinyBatches, build_model

Weights = dict[str, Tensor]


def _run(model: TaVlad, number: Any = 1, stage: StageConfig = STAGE1, **options: Any) -> list[EpochReport]:
    reports: list[EpochReport] = []
    plan = StagePlan(number=number, stage=stage, training=TRAINING)
    fit(model, plan, TinyBatches(), TinyBatches(6), Listeners(on_epoch=reports.append), **options)
    return reports


def _weights(model: TaVlad) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _changed(before: Weights, after: Weights) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stage_1_trains_the_gru_and_the_classifier_alone() -> None:
    model = build_model()
    before = _weights(model)
    _run(model)
    assert {name.split(".")[0] for name in _changed(before, _weights(model))} == {"gru", "classifier"}


def test_stage_2_adds_the_last_blocks_convolutions_the_vlad_layer_and_the_trunks_classifier() -> None:
    model = build_model()
    before = _weights(model)
    _run(model, 2, STAGE2)
    changed = _changed(before, _weights(model))
    assert {"vlad.weight", "vlad.bias", "vlad.centres", "trunk.fc.weight"} < changed
    assert "trunk.fc.bias" not in changed, "no gradient reaches it, so none may be waited for"
    assert "trunk.layer4.0.downsample.0.weight" in changed
    trunk = {name for name in changed if name.startswith("trunk.") and not name.startswith("trunk.fc")}
    assert all(name.startswith("trunk.layer4") and "bn" not in name and "running" not in name for name in trunk)


def test_downsample_convolution_can_be_left_out_of_stage_2() -> None:
    model = build_model()
    stage = dataclasses.replace(STAGE2, trunk="last-block-without-downsample")
    choose_trained(model, stage)
    assert not model.trunk.get_parameter("layer4.0.downsample.0.weight").requires_grad
    assert model.trunk.get_parameter("layer4.0.conv1.weight").requires_grad


def test_learning_rate_halves_after_every_five_epochs() -> None:
    stage = StageConfig(epochs=12, lr=0.08)
    assert [learning_rate(stage, epoch) for epoch in (0, 4, 5, 9, 10)] == [0.08, 0.08, 0.04, 0.04, 0.02]


def test_last_short_batch_weighs_by_its_clips_in_the_reported_loss() -> None:
    model = build_model(dataclasses.replace(CONFIG, dropout=0.0))
    stage = dataclasses.replace(STAGE1, epochs=1, lr=1e-12)  # as good as no learning: the loss is that of the start
    frozen = build_model(dataclasses.replace(CONFIG, dropout=0.0)).eval()
    losses: list[float] = []
    for batch in TinyBatches().epoch(0):
        with torch.no_grad():
            logits = frozen(batch.frames_BTCHW)
        losses += torch.nn.functional.cross_entropy(logits, batch.labels_B, reduction="none").tolist()
    (report,) = _run(model, stage=stage)
    assert len(losses) == 10
    assert report.metrics["train/loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_training_again_gives_the_same_weights_to_the_bit() -> None:
    first, second = build_model(), build_model()
    _run(first)
    _run(second)
    assert not _changed(_weights(first), _weights(second))


@pytest.mark.parametrize(("number", "stage"), [(1, STAGE1), (2, STAGE2)])
def test_run_resumed_after_an_epoch_ends_with_the_same_weights_to_the_bit(
    tmp_path: Path, number: Literal[1, 2], stage: StageConfig
) -> None:
    plan = StagePlan(number=number, stage=stage, training=TRAINING)

    def save(report: EpochReport) -> None:
        save_checkpoint(tmp_path / f"epoch{report.epoch}", whole, CARD, report.state)

    whole = build_model()
    fit(whole, plan, TinyBatches(), None, Listeners(on_epoch=save))
    resumed = build_model(seed=1)
    load_weights_into(resumed, tmp_path / "epoch1")
    state = load_state(tmp_path / "epoch1")
    fit(resumed, plan, TinyBatches(), None, Listeners(on_epoch=lambda _: None), resume=state)
    assert not _changed(_weights(whole), _weights(resumed))


@pytest.mark.parametrize("done", [1, 2, 5])
def test_run_resumed_after_any_step_ends_with_the_same_weights_and_metrics(tmp_path: Path, done: int) -> None:
    plan = StagePlan(number=2, stage=STAGE2, training=TRAINING)  # 3 steps an epoch
    expected, found = {}, {}

    def keep(state: TrainState) -> None:
        save_checkpoint(tmp_path / "step", whole, CARD, state)

    whole, resumed = build_model(), build_model(seed=1)
    keeping = Listeners(
        on_epoch=lambda report: expected.update({report.epoch: report.metrics}),
        wants_state=lambda steps: steps == done,
        on_state=keep,
    )
    fit(whole, plan, TinyBatches(), None, keeping)
    load_weights_into(resumed, tmp_path / "step")
    state = load_state(tmp_path / "step")
    assert (state.next_epoch, state.next_step) == divmod(done, 3)
    resuming = Listeners(on_epoch=lambda report: found.update({report.epoch: report.metrics}))
    fit(resumed, plan, TinyBatches(), None, resuming, resume=state)
    assert not _changed(_weights(whole), _weights(resumed))
    for epoch, metrics in found.items():
        for name in ("train/loss", "train/top1", "lr"):
            assert metrics[name] == expected[epoch][name]


def test_steps_of_a_stage_are_passes_within_its_epochs() -> None:
    """10 clips in batches of 4 are 3 steps a pass: 36 steps in 4 epochs are 3 passes each, in orders of their own."""
    stage = dataclasses.replace(STAGE1, epochs=4, steps=36)
    asked: list[int] = []

    class Watched(TinyBatches):
        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
            asked.append(epoch)
            return super().epoch(epoch, start_step)

    steps: list[tuple[int, int]] = []
    reports: list[EpochReport] = []
    listeners = Listeners(on_epoch=reports.append, on_step=lambda done, total: steps.append((done, total)))
    fit(build_model(), StagePlan(number=1, stage=stage, training=TRAINING), Watched(), None, listeners)
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert steps == [(done, 36) for done in range(1, 37)]
    assert len(set(asked)) == len(asked) == 12
    assert [stage.passes(num) for num in (1, 3, 100)] == [9, 3, 1]
    assert dataclasses.replace(stage, steps=0).passes(3) == 1


def test_label_smoothing_is_that_of_the_written_out_loss() -> None:
    training = dataclasses.replace(TRAINING, label_smoothing=0.2)
    model = build_model(dataclasses.replace(CONFIG, dropout=0.0))
    stage = dataclasses.replace(STAGE1, epochs=1, lr=1e-12)  # as good as no learning
    reports: list[EpochReport] = []
    plan = StagePlan(number=1, stage=stage, training=training)
    fit(model, plan, TinyBatches(), None, Listeners(on_epoch=reports.append))
    losses: list[float] = []
    frozen = build_model(dataclasses.replace(CONFIG, dropout=0.0)).eval()
    for batch in TinyBatches().epoch(0):
        with torch.no_grad():
            logs_BA = frozen(batch.frames_BTCHW).log_softmax(dim=1)
        for label, logs_A in zip(batch.labels_B.tolist(), logs_BA, strict=True):
            target_A = torch.full((len(logs_A),), 0.2 / len(logs_A))
            target_A[label] += 0.8
            losses.append(-float((target_A * logs_A).sum()))
    assert reports[0].metrics["train/loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_consensus_trains_its_classifier_then_the_last_block() -> None:
    config = dataclasses.replace(CONFIG, attention="none", temporal="consensus")
    model = build_model(config)
    before = _weights(model)
    _run(model)
    assert {name.split(".")[0] for name in _changed(before, _weights(model))} == {"classifier"}
    _run(model, 2, STAGE2)
    changed = {name for name in _changed(before, _weights(model)) if name.startswith("trunk.")}
    assert changed
    assert all(name.startswith("trunk.layer4") for name in changed)


def test_loss_that_is_no_number_stops_with_the_place_and_the_remedy() -> None:
    model = build_model()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss became nan in stage 1, epoch 1, step 1: lower stage1\.lr"):
        _run(model)


def test_test_part_is_scored_at_the_chosen_epochs_and_at_the_last() -> None:
    training = dataclasses.replace(TRAINING, evaluate_every=2)
    reports: list[EpochReport] = []
    stage = dataclasses.replace(STAGE1, epochs=3)
    plan = StagePlan(number=1, stage=stage, training=training)
    fit(build_model(), plan, TinyBatches(), TinyBatches(6), Listeners(on_epoch=reports.append))
    assert [report.scores is not None for report in reports] == [False, True, True]
    assert reports[-1].scores is not None
    assert len(reports[-1].scores.keys) == 6


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = build_model(dataclasses.replace(CONFIG, dropout=0.0))
    plan = StagePlan(number=2, stage=STAGE2, training=TRAINING)
    reports: list[EpochReport] = []
    train, test = TinyBatches(10, 4, rank, world), TinyBatches(6, 4, rank, world)
    fit(model, plan, train, test, Listeners(on_epoch=reports.append), world=World.current())
    scores = reports[-1].scores
    assert scores is not None
    result = {"weights": _weights(model), "metrics": [report.metrics for report in reports], "keys": list(scores.keys)}
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _spawn(target: Callable[..., None], world: int, *arguments: Any) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=target, args=(rank, world, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_each_batch_train_as_one_does(tmp_path: Path, world: int) -> None:
    # 10 clips in batches of 4, 4 and 2: with 3 ranks the shares are uneven and one is empty.
    alone = build_model(dataclasses.replace(CONFIG, dropout=0.0))
    reports = _run(alone, 2, STAGE2)
    _spawn(_rank, world, _free_port(), str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name, tensor in _weights(alone).items():
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name]), "ranks stay equal to the bit"
        torch.testing.assert_close(results[0]["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    for metrics, report in zip(results[0]["metrics"], reports, strict=True):
        assert metrics["train/loss"] == pytest.approx(report.metrics["train/loss"], rel=1e-4)
        assert metrics["test/top1"] == pytest.approx(report.metrics["test/top1"])
    assert results[0]["keys"] == [f"clip{row}" for row in range(6)], "every clip is scored once"


def test_clip_batch_checks_itself() -> None:
    with pytest.raises(AssertionError, match="one label and one key a clip"):
        ClipBatch(
            frames_BTCHW=torch.zeros(2, 1, 3, 4, 4, dtype=torch.uint8),
            labels_B=torch.zeros(2, dtype=torch.int64),
            keys=("only one",),
            num_clips_in_global_batch=2,
        )
