"""A feature set is named by all that its maps depend on; one of something else is told by the field that differs."""

import dataclasses
from typing import Any, get_args

import pytest

from infra.site import Site
from ray_jobs.console import Console
from ray_jobs.features import feature_set, fill_features, may_use_features
from ray_jobs.recipe import Recipe, change_recipe
from shards.features import FeatureSet, require_same
from shards.store import S3Access
from tavlad.clip import FeatureKind
from tavlad.config import FeatureConfig, ModelConfig, TrainingConfig
from tavlad.model import TaVlad
from tests.fixtures_sets import PackedSet

SITE = Site(
    name="nowhere",
    ray_address="127.0.0.1:1",
    ray_dashboard="http://127.0.0.1:1",
    s3=S3Access(endpoint_url="http://127.0.0.1:1", access_key="a", secret_key="b", region="us-east-1"),
    bucket="tavlad",
    mlflow_uri="http://127.0.0.1:1",
)
RECIPE = Recipe(
    dataset="numbers",
    model=ModelConfig(trunk="resnet18", weights="none", num_clusters=3, gru_width=5),
    training=TrainingConfig(crop=64, precision="bf16"),
    features=FeatureConfig(),
)


def _set_of(packed: PackedSet, kind: FeatureKind = "last", **changes: dict[str, Any]) -> FeatureSet:
    recipe = change_recipe(RECIPE, changes)
    return feature_set(SITE, recipe, packed.index, TaVlad(recipe.model, 3), "resnet18 none", kind)


def test_sets_of_the_two_kinds_have_the_shapes_of_their_maps(packed: PackedSet) -> None:
    last, early = (_set_of(packed, kind) for kind in get_args(FeatureKind))
    assert (last.kind, early.kind) == ("last", "early")
    assert (last.shape, last.activation_shape) == ((4, 512, 2, 2), (4, 2, 2))
    assert (early.shape, early.activation_shape) == ((4, 256, 4, 4), (4, 0, 0))
    with_frozen_trunk = _set_of(packed, "early", model={"attention": "frozen-cam"})
    assert with_frozen_trunk.activation_shape == (4, 2, 2)
    assert with_frozen_trunk.entry_bytes == 2 * 4 * 256 * 4 * 4 + 4 * 4 * 2 * 2
    # The paper's trunk and size: what docs/GUIDE says a clip view takes.
    paper = _set_of(packed, "early", model={"trunk": "resnet34"}, training={"crop": 224})
    assert paper.entry_bytes * 25 / 4 == pytest.approx(2.5e6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": {"precision": "float32"}}, "precision (bf16, not float32)"),
        ({"training": {"crop": 96}}, "crop (64, not 96), height (2, not 3), width (2, not 3)"),
        ({"training": {"subset": 0.5}}, "subset (1.0, not 0.5)"),
        ({"training": {"seed": 4}}, "weights (resnet18 none seed 0, not resnet18 none seed 4)"),
        ({"features": {"dtype": "float32"}}, "dtype (float16, not float32)"),
        ({"model": {"descriptor": "post_relu"}}, "map (pre_relu, not post_relu)"),
        ({"kind": "early"}, "map (pre_relu, not early)"),
    ],
)
def test_what_differs_is_named(packed: PackedSet, changes: dict[str, Any], field: str) -> None:
    found, wanted = _set_of(packed), _set_of(packed, **changes)
    assert found.store.uri != wanted.store.uri
    with pytest.raises(ValueError, match="they differ in") as caught:
        require_same(found.facts, wanted.facts, found.store.uri)
    assert f"differ in {field}" in str(caught.value)


@pytest.mark.parametrize("fact", ["views", "dataset", "weights"])
def test_view_policy_data_set_and_trunk_are_among_what_is_compared(packed: PackedSet, fact: str) -> None:
    facts = _set_of(packed).facts
    with pytest.raises(ValueError, match=rf"differ in {fact} \(other, not {facts[fact]}"):
        require_same({**facts, fact: "other"}, facts, "somewhere")


def test_float32_of_a_gpu_is_not_what_was_computed_in_tf32(packed: PackedSet) -> None:
    """Names of what processors computed stay: they are found again."""
    on_gpu = {"resources": {"gpus_per_worker": 1.0}}
    facts = [_set_of(packed, training={"precision": "float32"}, **changes).facts for changes in ({}, on_gpu)]
    assert [each["precision"] for each in facts] == ["float32", "float32 without TF32"]
    assert _set_of(packed, **on_gpu).facts == _set_of(packed).facts, "bf16 is bf16"


def test_features_of_timms_trunks_are_not_those_that_lost_activations(packed: PackedSet) -> None:
    pytest.importorskip("timm")
    facts = dict(_set_of(packed, model={"trunk": "timm:resnet18"}).facts)
    assert facts.pop("trunk_form") == 2
    assert facts == _set_of(packed).facts, "and other trunks' keep their names"


def test_what_the_head_makes_of_the_maps_is_not(packed: PackedSet) -> None:
    changes: dict[str, Any] = {"model": {"num_clusters": 8, "gru_width": 3, "attention": "none", "alpha": 7.0}}
    assert _set_of(packed).facts == _set_of(packed, **changes).facts
    assert _set_of(packed, "early").facts == _set_of(packed, "early", **changes).facts


def test_trunk_that_is_not_cut_has_no_features_for_a_stage_that_trains_it(packed: PackedSet) -> None:
    model = {"trunk": "squeezenet1_1"}
    with pytest.raises(ValueError, match=r'model\.trunk = "squeezenet1_1" is not cut below its last block'):
        _set_of(packed, "early", model=model)
    for wanted, of_stage in {"never": (False, False), "auto": (True, False), "always": (True, True)}.items():
        recipe = change_recipe(RECIPE, {"model": model, "stage1": {"features": wanted}, "stage2": {"features": wanted}})
        untrained = TaVlad(recipe.model, 3)
        stages = (recipe.stage1, recipe.stage2)
        assert tuple(may_use_features(recipe, stage, untrained) for stage in stages) == of_stage
        other = change_recipe(recipe, {"model": {"trunk": "resnet18"}})
        assert may_use_features(other, other.stage2, TaVlad(other.model, 3)) == (wanted != "never")
    video = {"trunk": "r3d_18", "attention": "none", "temporal": "conv3d"}
    with pytest.raises(ValueError, match=r'features of model\.trunk = "r3d_18" are not kept: it joins frames'):
        _set_of(packed, model=video)


@pytest.mark.parametrize("trained", [{"trunk": "last-block"}, {"trunk": "last-block-without-downsample"}, {"fc": True}])
def test_frozen_stage_after_one_that_trained_the_trunk_has_no_features(trained: dict[str, Any]) -> None:
    """They would be named by the weights that training began with."""
    frozen = {"trunk": "frozen", "fc": False, "vlad": False}
    with pytest.raises(ValueError, match=r'stage2: .* stage 1 trains the trunk .* set stage2\.features = "never"'):
        change_recipe(RECIPE, {"stage1": trained, "stage2": frozen | {"features": "always"}})
    recipe = change_recipe(RECIPE, {"stage1": trained | {"features": "auto"}, "stage2": frozen | {"features": "auto"}})
    model = TaVlad(recipe.model, 3)
    assert not may_use_features(recipe, recipe.stage2, model)
    with pytest.raises(ValueError, match="stage 1 trains the trunk"):
        fill_features(SITE, recipe, 1, None, Console(), recipe.stage2)
    assert may_use_features(recipe, recipe.stage1, model), "of what is below the last block"
    below = change_recipe(recipe, {"stage2": {"fc": True}})
    assert may_use_features(below, below.stage2, model)
    untouched = change_recipe(recipe, {"stage1": {"epochs": 0}})
    assert may_use_features(untouched, untouched.stage2, model)


def test_kind_is_what_the_stage_does_not_train() -> None:
    stage = RECIPE.stage2
    assert RECIPE.stage1.feature_kind == "last"
    assert stage.feature_kind == "early"
    assert dataclasses.replace(stage, trunk="frozen").feature_kind == "early", "its classifier makes the attention"
    assert dataclasses.replace(stage, trunk="frozen", fc=False).feature_kind == "last"
