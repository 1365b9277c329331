"""Learning from features is learning from frames: the same batches, the same losses, without what is frozen."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from ray_jobs.feature_batches import FeatureBatches, PooledBatches, pooled_if_possible
from ray_jobs.features import Decision, Extractor, Rates, Workload, decide
from shards.features import FeatureSet
from shards.read import ClipLoader, LoaderOptions
from shards.store import open_store
from tavlad.config import STAGE2, ModelConfig, StageConfig, TrainingConfig
from tavlad.model import TaVlad
from tavlad.train import EpochReport, Listeners, StagePlan, fit
from tests.fixtures_sets import PackedSet

CROP, NUM_CLIPS = 64, 12
MODEL = ModelConfig(trunk="resnet18", weights="none", num_clusters=3, gru_width=5, alpha=5.0)
EPOCHS = 3
STAGES = {
    1: StageConfig(epochs=EPOCHS, lr=1e-2, features="always"),
    2: replace(STAGE2, epochs=EPOCHS, lr=1e-3, features="always"),
}
STAGE = STAGES[1]
_CPU = torch.device("cpu")


def _model(**changes: object) -> TaVlad:
    torch.manual_seed(0)
    config = replace(MODEL, **changes)  # type: ignore[arg-type]
    model = TaVlad(config, 3)
    if model.vlad is not None:
        model.vlad.initialise(torch.nn.functional.normalize(torch.rand_like(model.vlad.centres), dim=1), config.alpha)
    return model


def _features(store: object, precision: str, dtype: str, stage: int = 1) -> FeatureSet:
    shape = {"num_frames": 4, "size": 512, "height": 2, "width": 2}
    if stage == 2:
        shape |= {"size": 256, "height": 4, "width": 4, "activation_height": 2, "activation_width": 2}
    facts = {"name": "numbers", "map": "early" if stage == 2 else "pre_relu", "precision": precision, "dtype": dtype}
    return FeatureSet(open_store(str(store)), facts | shape)


def _extractor(model: TaVlad, features: FeatureSet) -> Extractor:
    return Extractor(model, torch.device("cpu"), str(features.facts["precision"]), features.kind)


def _loader(packed: PackedSet, part: Any, rank: int = 0, world: int = 1, num_views: int = 40) -> ClipLoader:
    training = part == "train"
    options = LoaderOptions(batch_size=5, seed=3, crop=CROP, augment=training, shuffle=training, num_views=num_views)
    return ClipLoader(packed.index, packed.store, 1, part, options, rank, world)


def _train(
    model: TaVlad, precision: Any, train: Any, test: Any, number: Any = 1
) -> tuple[list[EpochReport], list[float]]:
    """The reports, and the loss of each step summed over its clips."""
    reports: list[EpochReport] = []
    sums: list[float] = []
    losses: list[float] = []

    def end_epoch(report: EpochReport) -> None:
        reports.append(report)
        whole = report.metrics["train/loss"] * NUM_CLIPS
        losses.extend(after - before for before, after in pairwise([0.0, *sums, whole]))
        sums.clear()

    training = TrainingConfig(batch_size=5, precision=precision, crop=CROP)
    plan = StagePlan(number=number, stage=STAGES[number], training=training)
    listeners = Listeners(
        on_epoch=end_epoch, wants_state=lambda _: True, on_state=lambda state: sums.append(state.sums[0])
    )
    fit(model, plan, train, test, listeners)
    return reports, losses


@pytest.mark.parametrize(
    ("stage", "precision", "dtype", "attention", "tolerance"),
    [
        (1, "float32", "float32", "cam", 1e-5),
        (1, "float32", "float16", "cam", 1e-3),
        pytest.param(1, "bf16", "float16", "frozen-cam", 1e-3, marks=pytest.mark.slow),
        (1, "float32", "float32", "none", 1e-5),
        pytest.param(2, "float32", "float32", "cam", 1e-5, marks=pytest.mark.slow),
        pytest.param(2, "float32", "float16", "cam", 1e-3, marks=pytest.mark.slow),
        pytest.param(2, "bf16", "float16", "cam", 1e-3, marks=pytest.mark.slow),
        pytest.param(2, "float32", "float32", "frozen-cam", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_losses_and_scores_from_features_are_those_from_frames(
    packed: PackedSet,
    tmp_path: Any,
    stage: int,
    precision: str,
    dtype: str,
    attention: str,
    tolerance: float,
) -> None:
    clips = [_loader(packed, part) for part in ("train", "test")]
    from_frames, of_frames = _train(_model(attention=attention), precision, *clips, stage)
    model = _model(attention=attention)
    features = _features(tmp_path, precision, dtype, stage)
    extract = _extractor(model, features)
    batches = [FeatureBatches(loader, features, 1, extract) for loader in clips]
    from_features, of_features = _train(model, precision, *batches, stage)
    assert len(of_frames) == 3 * EPOCHS
    assert of_features == pytest.approx(of_frames, rel=tolerance)
    for frames, stored in zip(from_frames, from_features, strict=True):
        assert stored.metrics["test/top1"] == frames.metrics["test/top1"]
    learned, untrained = (each.trunk.last_block_convs()[0].weight for each in (model, _model(attention=attention)))
    assert torch.equal(learned, untrained) == (stage == 1)
    assert batches[1].num_computed == 6  # the test part once, in three evaluations


def test_batches_are_the_same_whatever_was_there_before(packed: PackedSet, tmp_path: Any) -> None:
    features = _features(tmp_path, "float32", "float16")
    extract = _extractor(_model(), features)
    batches = FeatureBatches(_loader(packed, "train"), features, 1, extract)
    computed = list(batches.epoch(2))
    assert batches.num_computed == 12
    read = list(batches.epoch(2))
    assert batches.num_computed == 12
    clips = list(_loader(packed, "train").epoch(2))
    for first, second, clip in zip(computed, read, clips, strict=True):
        assert first.keys == second.keys == clip.keys
        assert first.num_clips_in_global_batch == clip.num_clips_in_global_batch
        assert torch.equal(first.labels_B, clip.labels_B)
        assert torch.equal(first.features.maps_BTDHW, second.features.maps_BTDHW)
        assert first.features.activation_BTHW is not None
        assert second.features.activation_BTHW is not None
        assert torch.equal(first.features.activation_BTHW, second.features.activation_BTHW)
    resumed = list(batches.epoch(2, start_step=1))
    assert [batch.keys for batch in resumed] == [batch.keys for batch in read[1:]]


def test_features_that_expire_while_a_training_reads_them_are_computed_again(packed: PackedSet, tmp_path: Any) -> None:
    features = _features(tmp_path, "float32", "float16")
    extract = _extractor(_model(), features)
    batches = FeatureBatches(_loader(packed, "train", num_views=1), features, 1, extract)
    expected = [list(batches.epoch(2)) for _ in range(2)][1]
    assert batches.num_computed == 12
    for path in features.store.list("through/"):
        features.store.delete(path)
    for num_computed in (24, 24):  # and kept for the next epoch
        found = list(batches.epoch(2))
        assert batches.num_computed == num_computed
        for first, second in zip(expected, found, strict=True):
            assert first.keys == second.keys
            assert torch.equal(first.features.maps_BTDHW, second.features.maps_BTDHW)


def test_features_and_pooled_clips_are_computed_without_tf32(packed: PackedSet, tmp_path: Any) -> None:
    model, seen = _model(temporal="sum", attention="none"), dict[str, str]()
    assert model.vlad is not None
    for name, module in {"trunk": model.trunk.get_submodule("conv1"), "vlad": model.vlad}.items():
        module.register_forward_hook(
            lambda *_, name=name: seen.update({name: torch.backends.cudnn.conv.fp32_precision}) or None
        )
    features = _features(tmp_path, "float32", "float32")
    batches = FeatureBatches(_loader(packed, "train", num_views=1), features, 1, _extractor(model, features))
    pooled = pooled_if_possible(batches, model, STAGE)
    assert isinstance(pooled, PooledBatches)
    assert len(list(pooled.epoch(0))) == 3
    assert seen == {"trunk": "ieee", "vlad": "ieee"}


def test_ranks_share_what_either_computed(packed: PackedSet, tmp_path: Any) -> None:
    features = _features(tmp_path, "float32", "float16")
    extract = _extractor(_model(), features)
    ranks = [FeatureBatches(_loader(packed, "train", rank, 2, num_views=1), features, 1, extract) for rank in range(2)]
    for rank in ranks:
        list(rank.epoch(0))
    assert sum(rank.num_computed for rank in ranks) == 12
    for rank in ranks:  # another order: other clips come to a rank, in the only view there is
        list(rank.epoch(1))
    assert sum(rank.num_computed for rank in ranks) == 12


@pytest.mark.parametrize(
    ("temporal", "attention", "pca", "precision"),
    [("sum", "cam", 0, "bf16"), ("sum", "none", 3, "float32"), ("change", "none", 0, "float32")],
)
def test_losses_from_pooled_clips_are_those_from_features(
    packed: PackedSet,
    tmp_path: Any,
    temporal: str,
    attention: str,
    pca: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: list[list[EpochReport]] = []
    pooled = Counter[str]()
    plain_pool = TaVlad.pool
    for wrap in (lambda batches, _: batches, lambda batches, model: pooled_if_possible(batches, model, STAGE)):
        model = _model(temporal=temporal, attention=attention, descriptor_pca=pca)
        if model.pca is not None:
            torch.nn.init.orthogonal_(model.pca.components)
        features = _features(tmp_path, precision, "float16")
        extract = _extractor(model, features)
        parts = [FeatureBatches(_loader(packed, part, num_views=1), features, 1, extract) for part in ("train", "test")]
        monkeypatch.setattr(TaVlad, "pool", lambda *given: pooled.update(["clip"]) or plain_pool(*given))
        reports.append(_train(model, precision, *[wrap(part, model) for part in parts])[0])
    for one, other in zip(*reports, strict=True):
        assert other.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-5)
        assert other.scores is not None
        assert one.scores is not None
        torch.testing.assert_close(other.scores.probabilities, one.scores.probabilities, rtol=1e-4, atol=1e-5)
    assert pooled["clip"] == 18, "each clip once, in three epochs"


def test_what_learns_or_is_drawn_is_not_pooled(packed: PackedSet, tmp_path: Any) -> None:
    for changes in ({"temporal": "gru"}, {"temporal": "sum", "dropout_place": "frame"}):
        model = _model(**changes)
        features = _features(tmp_path, "float32", "float16")
        batches = FeatureBatches(_loader(packed, "train"), features, 1, _extractor(model, features))
        assert pooled_if_possible(batches, model, STAGE) is batches
    model = _model(temporal="sum")
    assert pooled_if_possible(batches, model, replace(STAGE, vlad=True)) is batches
    assert pooled_if_possible(batches, model, replace(STAGES[2], vlad=False)) is batches
    assert isinstance(pooled_if_possible(batches, model, STAGE), PooledBatches)


def test_pooled_batches_keep_no_more_than_they_may(packed: PackedSet, tmp_path: Any) -> None:
    model = _model(temporal="sum")
    features = _features(tmp_path, "float32", "float16")
    batches = FeatureBatches(_loader(packed, "train", num_views=1), features, 1, _extractor(model, features))
    clip_bytes = 3 * 512 * 4
    one, other = PooledBatches(batches, model), PooledBatches(batches, model, max_bytes=5 * clip_bytes)
    for epoch in range(2):
        for first, second in zip(one.epoch(epoch), other.epoch(epoch), strict=True):
            assert first.keys == second.keys
            assert torch.equal(first.pooled_BKD, second.pooled_BKD)
    assert (len(one._kept), len(other._kept)) == (12, 5)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("attention", ["cam", "frozen-cam"])
def test_rank_without_a_clip_still_gives_a_batch(packed: PackedSet, tmp_path: Any, stage: int, attention: str) -> None:
    features, model = _features(tmp_path, "float32", "float16", stage), _model(attention=attention)
    last = _loader(packed, "train", rank=0, world=4)  # 12 clips in batches of 5: two in the last, for ranks 1 and 3
    *_, batch = FeatureBatches(last, features, 1, _extractor(model, features)).epoch(0)
    assert batch.keys == ()
    assert model(batch.inputs(torch.device("cpu"))).shape == (1, 3)
    if stage == 1:
        model = _model(temporal="sum", attention=attention)
        *_, pooled = PooledBatches(FeatureBatches(last, features, 1, _extractor(model, features)), model).epoch(0)
        assert pooled.keys == ()
        assert model(pooled.inputs(_CPU)).shape == (1, 3)


def test_values_beyond_float16_are_told_not_stored(packed: PackedSet, tmp_path: Any) -> None:
    model = _model()
    with torch.no_grad():
        model.trunk.layer4[-1].bn2.weight.fill_(1e9)  # type: ignore[union-attr]
    features = _features(tmp_path, "float32", "float16")
    batches = FeatureBatches(_loader(packed, "train"), features, 1, _extractor(model, features))
    with pytest.raises(ValueError, match=r"features\.dtype = \"float32\""):
        list(batches.epoch(0))


LOAD = Workload(train_clips=100, test_clips=50, epochs=50, evaluations=50, num_views=8, train_present=0, test_present=0)
RATES = Rates(compute=0.5, write=0.01, read=0.01)


def test_auto_takes_features_where_they_save_more_than_they_cost() -> None:
    assert LOAD.from_frames == 7500
    assert LOAD.from_features == 849  # 8 views of 100 clips but for the odd one never drawn, and 50 centre views
    chosen = decide("auto", LOAD, RATES, 1_000_000, 50)
    assert chosen == Decision(
        use_features=True, reason="from features (0.85 GB): what is frozen takes about 8 min instead of 62 min"
    )
    slow_store = replace(RATES, read=0.6)
    assert not decide("auto", LOAD, slow_store, 1_000_000, 50).use_features
    assert decide("always", LOAD, slow_store, 1_000_000, 50).use_features
    one_epoch = replace(LOAD, epochs=1, evaluations=1)
    assert not decide("auto", one_epoch, RATES, 1_000_000, 50).use_features


def test_budget_is_kept_before_anything_is_computed() -> None:
    refused = decide("auto", LOAD, RATES, 1_000_000, 0.5)
    assert not refused.use_features
    assert "features.budget_gigabytes is 0.5" in refused.reason
    with pytest.raises(ValueError, match=r"would take 0.85 GB.*lower training.num_views"):
        decide("always", LOAD, RATES, 1_000_000, 0.5)
    there = replace(LOAD, train_present=800, test_present=50)
    assert there.from_features == 0
    assert decide("always", there, RATES, 1_000_000, 0.5).use_features
    more_views = replace(there, num_views=10, epochs=1)
    assert more_views.from_features == 20, "one view in five is new, though more views are stored than one epoch shows"
