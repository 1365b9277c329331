"""The training loop, alone and over ranks, against steps written out by hand."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tavlad.checkpoint import TrainState, load_state, load_weights_into, save_checkpoint
from tavlad.clip import ClipBatch, FeatureBatch, Features
from tavlad.config import StageConfig
from tavlad.evaluate import evaluate
from tavlad.model import TaVlad
from tavlad.optim import build_optimizer, choose_trained, learning_rate
from tavlad.parallel import World
from tavlad.train import Diverged, EpochReport, Listeners, StagePlan, epochs_read, fit
from tests.ports import free_port
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


@pytest.mark.parametrize("scoring", ["float32", "training"])
def test_result_is_scored_in_float32_whatever_training_is_computed_in(scoring: Any) -> None:
    """Epochs before the last are tested as they are trained, on whatever they are given."""
    training = dataclasses.replace(TRAINING, precision="bf16", scoring=scoring)
    model, reports = build_model(), list[EpochReport]()
    plan, listeners = StagePlan(number=1, stage=STAGE1, training=training), Listeners(on_epoch=reports.append)
    fit(model, plan, TinyBatches(), TinyBatches(6), listeners, scored=TinyBatches(9))
    assert [len(report.scores.keys) for report in reports if report.scores is not None] == [6, 9]
    exact, quick = (evaluate(model, TinyBatches(9).epoch(0), each).probabilities for each in ("float32", "bf16"))
    assert abs(exact - quick).max() > 1e-6, "it makes a difference"
    assert reports[-1].scores is not None
    expected = exact if scoring == "float32" else quick
    assert (reports[-1].scores.probabilities == expected).all()


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


class Watched(TinyBatches):
    """Batches that remember which epochs, from which step on, they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
        self.asked.append((epoch, start_step))
        return super().epoch(epoch, start_step)


def test_steps_of_a_stage_are_passes_within_its_epochs() -> None:
    """10 clips in batches of 4 are 3 steps a pass: 36 steps in 4 epochs are 3 passes each, in orders of their own."""
    stage, batches = dataclasses.replace(STAGE1, epochs=4, steps=36), Watched()
    steps: list[tuple[int, int]] = []
    reports: list[EpochReport] = []
    listeners = Listeners(on_epoch=reports.append, on_step=lambda done, total: steps.append((done, total)))
    fit(build_model(), StagePlan(number=1, stage=stage, training=TRAINING), batches, None, listeners)
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert steps == [(done, 36) for done in range(1, 37)]
    assert len(set(batches.asked)) == len(batches.asked) == 12
    assert [stage.passes(num) for num in (1, 3, 100)] == [9, 3, 1]
    assert dataclasses.replace(stage, steps=0).passes(3) == 1


_TWO = st.lists(st.integers(1, 3), min_size=2, max_size=2)


@settings(max_examples=25, deadline=None)
@example(epochs=[2, 2], passes=[2, 1])
@example(epochs=[1, 1], passes=[1_000_001, 1])
@given(epochs=_TWO, passes=_TWO)
def test_no_two_passes_of_a_training_have_the_same_order_and_views(epochs: list[int], passes: list[int]) -> None:
    seen: list[np.ndarray] = []
    for number, num_epochs, num_passes in zip((1, 2), epochs, passes, strict=True):
        stage = dataclasses.replace(STAGE1, epochs=num_epochs, steps=3 * num_epochs * num_passes)
        plan = StagePlan(number=number, stage=stage, training=TRAINING)
        seen.append(np.fromiter(epochs_read(plan, 3), dtype=np.int64))
        assert len(seen[-1]) == num_epochs * num_passes
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together)


@pytest.mark.parametrize("steps", [0, 18])
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_stage_reads_is_what_it_is_said_to_read(number: Literal[1, 2], steps: int) -> None:
    """A sweep prepares the views by it. 3 steps a pass: 2 epochs of 1 or of 3 passes."""
    batches, stage = Watched(), dataclasses.replace(STAGE1, steps=steps)
    plan = StagePlan(number=number, stage=stage, training=TRAINING)
    fit(build_model(), plan, batches, None, Listeners(on_epoch=lambda _: None))
    assert [epoch for epoch, _ in batches.asked] == list(epochs_read(plan, batches.num_steps))


@pytest.mark.parametrize(("steps", "expected"), [(0, [(1_000_001, 1)]), (18, [(1_000_004, 1), (1_000_005, 0)])])
def test_orders_and_views_are_those_of_trainings_under_way(steps: int, expected: list[tuple[int, int]]) -> None:
    """Written down once: a change here breaks the resuming of trainings that make one pass an epoch. 3 steps a pass:
    resumed in the second of 2 epochs, in its first or its second pass."""
    batches, stage = Watched(), dataclasses.replace(STAGE1, steps=steps)
    model = build_model()
    choose_trained(model, stage)
    state = TrainState(
        stage=1,
        next_epoch=1,
        next_step=1 if not steps else 4,
        optimizer=build_optimizer(model, stage, TRAINING).state_dict(),
    )
    plan = StagePlan(number=1, stage=stage, training=TRAINING)
    fit(model, plan, batches, None, Listeners(on_epoch=lambda _: None), resume=state)
    assert batches.asked == expected
    assert list(epochs_read(StagePlan(number=2, stage=STAGE2, training=TRAINING), 3)) == [2_000_000, 2_000_001]


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


@pytest.mark.parametrize("scored", [None, TinyBatches(3)])
def test_outputs_that_are_no_numbers_are_no_scores(scored: TinyBatches | None) -> None:
    """The loss of every step is finite, but the last step spoiled the weights."""
    model, reports = build_model(), list[EpochReport]()
    plan = StagePlan(number=1, stage=dataclasses.replace(STAGE1, epochs=2), training=TRAINING)

    def spoil(done: int, total: int) -> None:
        if done == total:
            model.classifier.weight.data.fill_(float("inf"))

    listeners = Listeners(on_step=spoil, on_epoch=reports.append)
    with pytest.raises(Diverged, match=r"for \d clips, the first is \S+ in stage 1, after epoch 2: lower stage1\.lr"):
        fit(model, plan, TinyBatches(), TinyBatches(6), listeners, scored=scored)
    assert len(reports) == 1


def test_test_part_is_scored_at_the_chosen_epochs_and_at_the_last() -> None:
    training = dataclasses.replace(TRAINING, evaluate_every=2)
    reports: list[EpochReport] = []
    stage = dataclasses.replace(STAGE1, epochs=3)
    plan = StagePlan(number=1, stage=stage, training=training)
    fit(build_model(), plan, TinyBatches(), TinyBatches(6), Listeners(on_epoch=reports.append))
    assert [report.scores is not None for report in reports] == [False, True, True]
    assert reports[-1].scores is not None
    assert len(reports[-1].scores.keys) == 6


_WORLDS = (2, 3, 4)
_VIRTUAL = 4


def _train_in(world: World) -> dict[str, Any]:
    """Stage 2 with dropout; 10 clips in batches of 4, 4 and 2: shares are uneven and some are empty."""
    model = build_model()
    plan = StagePlan(number=2, stage=STAGE2, training=TRAINING)
    reports: list[EpochReport] = []
    train, test = (TinyBatches(count, 4, world.rank, world.size, world.virtual_ranks) for count in (10, 6))
    fit(model, plan, train, test, Listeners(on_epoch=reports.append), world=world)
    scores = reports[-1].scores
    assert scores is not None
    metrics = [report.metrics | {"clips_per_second": 0.0} for report in reports]
    return {
        "weights": _weights(model),
        "metrics": metrics,
        "keys": list(scores.keys),
        "probabilities": torch.from_numpy(scores.probabilities),
    }


def _rank(rank: int, _: int, ports: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    for size, port in zip(_WORLDS, ports, strict=True):
        if rank < size:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("gloo", rank=rank, world_size=size)
            for virtual in (0, _VIRTUAL):
                result = _train_in(World.current(virtual_ranks=virtual))
                torch.save(result, Path(folder) / f"{size}-{virtual}-{rank}.pt")
            dist.destroy_process_group()


def _spawn(target: Callable[..., None], world: int, *arguments: Any) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=target, args=(rank, world, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int], dict[str, Any]]:
    """What a rank ended with, by (ranks, virtual ranks, rank)."""
    folder = tmp_path_factory.mktemp("worlds")
    _spawn(_rank, max(_WORLDS), [free_port() for _ in _WORLDS], str(folder))
    return lambda size, virtual, rank: torch.load(folder / f"{size}-{virtual}-{rank}.pt", weights_only=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks compute: sums of several threads are added up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _assert_ranks_agree(found: Callable[[int, int, int], dict[str, Any]], size: int, virtual: int) -> None:
    first = found(size, virtual, 0)
    for rank in range(1, size):
        assert not _changed(first["weights"], found(size, virtual, rank)["weights"]), "ranks stay equal to the bit"


@pytest.mark.slow
@pytest.mark.parametrize("size", _WORLDS)
def test_ranks_that_share_each_batch_train_as_one_does(
    worlds: Callable[[int, int, int], dict[str, Any]], one_thread: None, size: int
) -> None:
    alone, found = _train_in(World()), worlds(size, 0, 0)
    _assert_ranks_agree(worlds, size, 0)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    for metrics, expected in zip(found["metrics"], alone["metrics"], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-4)
    assert found["keys"] == [f"clip{row}" for row in range(6)], "every clip is scored once"


@pytest.mark.slow
@pytest.mark.parametrize("size", _WORLDS)
def test_virtual_ranks_give_the_same_bits_whatever_the_number_of_real_ones(
    worlds: Callable[[int, int, int], dict[str, Any]], one_thread: None, size: int
) -> None:
    alone, found = _train_in(World(virtual_ranks=_VIRTUAL)), worlds(size, _VIRTUAL, 0)
    _assert_ranks_agree(worlds, size, _VIRTUAL)
    assert not _changed(alone["weights"], found["weights"])
    assert found["metrics"] == alone["metrics"]
    assert torch.equal(found["probabilities"], alone["probabilities"])
    plain = _train_in(World())
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(alone["weights"][name], tensor, rtol=1e-4, atol=1e-5)


class _SpoiltFeatures:
    """2 steps of 4 clips' features; in the first, the last rank's are not numbers."""

    num_steps = 2

    def __init__(self, world: World) -> None:
        self._world = world

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        for step in range(start_step, self.num_steps):
            maps_BTDHW = torch.rand(4, 3, 512, 1, 1, generator=torch.Generator().manual_seed(step))
            if step == 0:
                maps_BTDHW[-1] = torch.nan
            batch = FeatureBatch(
                features=Features(maps_BTDHW, maps_BTDHW[:, :, 0]),
                labels_B=torch.arange(4),
                keys=("a", "b", "c", "d"),
                num_clips_in_global_batch=4,
            )
            yield batch.part(4 * self._world.rank // self._world.size, 4 * (self._world.rank + 1) // self._world.size)


def _diverging_rank(rank: int, size: int, ports: list[int], folder: str) -> None:
    """Leaves what `fit` raised, and stays until the others have, as a process with more to do stays: for a minute."""
    torch.set_num_threads(1)
    for virtual, port in zip((0, _VIRTUAL), ports, strict=True):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=size)
        world = World.current(virtual_ranks=virtual)
        plan = StagePlan(number=1, stage=STAGE1, training=TRAINING)
        try:
            fit(build_model(), plan, _SpoiltFeatures(world), None, Listeners(on_epoch=lambda _: None), world=world)
        except Diverged as error:
            (Path(folder) / f"{virtual}-{rank}").write_text(str(error))
        deadline = monotonic() + 60
        while len(list(Path(folder).glob(f"{virtual}-*"))) < size:
            assert monotonic() < deadline, "the other ranks hang"
            sleep(0.05)
        dist.destroy_process_group()


@pytest.mark.slow
def test_loss_that_is_no_number_on_one_rank_ends_all_with_the_same_words(tmp_path: Path) -> None:
    _spawn(_diverging_rank, 2, [free_port(), free_port()], str(tmp_path))
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(texts) == 4
    assert set(texts.values()) == {"the loss became nan in stage 1, epoch 1, step 1: lower stage1.lr (now 0.01)"}


def test_more_ranks_than_virtual_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 workers for resources\.virtual_ranks = 2"):
        World(rank=0, size=3, virtual_ranks=2).tree_sum(build_model())


def test_clip_batch_checks_itself() -> None:
    with pytest.raises(AssertionError, match="one label and one key a clip"):
        ClipBatch(
            frames_BTCHW=torch.zeros(2, 1, 3, 4, 4, dtype=torch.uint8),
            labels_B=torch.zeros(2, dtype=torch.int64),
            keys=("only one",),
            num_clips_in_global_batch=2,
        )
