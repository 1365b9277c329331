"""Recipes: what is wrong in a file is named with the file, and the same recipe has the same fingerprint."""

from pathlib import Path

import pytest

from ray_jobs.names import LEFT_OUT, fingerprint, first_fingerprint
from ray_jobs.recipe import Recipe, known_recipes, load_recipe
from tavlad.errors import UserError


def _write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_that_comes_with_the_package_loads(name: str) -> None:
    assert load_recipe(name, dataset="some-set").dataset == "some-set"


def test_recipe_of_the_paper_has_its_schedule() -> None:
    recipe = load_recipe("ta-vlad", dataset="hmdb51")
    assert (recipe.stage1.epochs, recipe.stage1.lr, recipe.stage2.epochs, recipe.stage2.lr) == (50, 1e-2, 30, 1e-4)
    assert (recipe.training.batch_size, recipe.training.adam_eps, recipe.training.weight_decay) == (32, 1e-4, 4e-5)
    assert (recipe.model.num_clusters, recipe.model.gru_width, recipe.model.alpha) == (64, 256, 1000.0)


@pytest.mark.parametrize(
    "name", ["actionvlad", "vlad-gru-512", "vlad-gru-256", "vlad-gru-128", "ta-vlad", "ta-vlad-frozen-cam", "consensus"]
)
def test_recipe_of_each_row_of_table_1_is_that_row_under_the_papers_schedule(name: str) -> None:
    recipe, paper = load_recipe(name, dataset="hmdb51"), load_recipe("ta-vlad", dataset="hmdb51")
    assert recipe.model.variant == name
    assert (recipe.stage1, recipe.training, recipe.codebook) == (paper.stage1, paper.training, paper.codebook)
    ours, papers = recipe.stage2, paper.stage2
    assert (ours.epochs, ours.lr, ours.trunk) == (papers.epochs, papers.lr, papers.trunk)
    assert (recipe.model.trunk, recipe.model.num_clusters) == ("resnet34", 64)


def test_part_of_a_stage_keeps_the_rest_of_the_papers_stage(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, 'dataset = "a"\n[stage2]\nepochs = 3'))
    assert (recipe.stage2.epochs, recipe.stage2.lr, recipe.stage2.vlad) == (3, 1e-4, True)


def test_unknown_key_names_file_table_and_nearest_key(tmp_path: Path) -> None:
    name = _write(tmp_path, 'dataset = "a"\n[stage1]\nepoch = 3')
    with pytest.raises(ValueError, match=r"mine\.toml: unknown key stage1\.epoch: did you mean epochs\?"):
        load_recipe(name)


def test_recipe_without_a_dataset_says_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml names no dataset: add dataset .* or give --dataset NAME"):
        load_recipe(_write(tmp_path, ""))


@pytest.mark.parametrize(("changes", "precision"), [([], "float32"), (["resources.gpus_per_worker=1"], "bf16")])
def test_precision_is_what_the_machine_is_quick_in_unless_said(
    monkeypatch: pytest.MonkeyPatch, changes: list[str], precision: str
) -> None:
    monkeypatch.setattr("ray_jobs.recipe.quick_precision", lambda _: "float32")
    assert load_recipe("ta-vlad", changes, "hmdb51").training.precision == precision
    assert load_recipe("ta-vlad", [*changes, "training.precision=bf16"], "hmdb51").training.precision == "bf16"


def test_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml is not TOML"):
        load_recipe(_write(tmp_path, "dataset = "))


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no recipe is named nothing: give a TOML file or one of .*ta-vlad"):
        load_recipe("nothing")


def test_changes_are_typed_as_in_the_file(tmp_path: Path) -> None:
    name = _write(tmp_path, 'dataset = "a"')
    recipe = load_recipe(name, ["stage1.lr=0.005", "model.temporal=sum", "training.augment=false"])
    assert (recipe.stage1.lr, recipe.model.temporal, recipe.training.augment) == (0.005, "sum", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage1.lr", r"--set stage1\.lr: write it as table\.key=value"),
        ("stage1.lr.x=1", r"stage1\.lr\.x=1: lr is a value|unknown key|must be"),
        ("stage1.lr=fast", r"stage1\.lr = 'fast': must be of type float"),
        ("training.seed=-1", r"training\.seed = -1: must be from 0 to 4294967295"),
        ("model.num_clusters=0", r"model\.num_clusters = 0: must be at least 1"),
    ],
)
def test_change_that_cannot_be_made_is_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(_write(tmp_path, 'dataset = "a"\n[stage1]\nlr = 0.1'), [change])


def test_fingerprint_changes_with_what_is_computed_and_not_with_where(tmp_path: Path) -> None:
    name = _write(tmp_path, 'dataset = "a"')
    base = load_recipe(name).fingerprint(split=1)
    assert load_recipe(name, ["resources.workers=4"]).fingerprint(split=1) == base
    assert load_recipe(name, dataset="s3://elsewhere/a").fingerprint(split=1) == base
    assert load_recipe(name, ["training.seed=1"]).fingerprint(split=1) != base
    assert load_recipe(name).fingerprint(split=2) != base


FIRST_NAMES = [
    ("ta-vlad", ["training.precision=bf16"], "c07dda27a2f13111c3e8a08b349b85e9ed5ff33c5fc05679a08423c0d5299c53"),
    (
        "demo",
        ["model.temporal=sum", "training.precision=float32"],
        "27b533d32eda4f03d118f6bb24cde804b10ac4ce40a387fe28b9d5b52b646f81",
    ),
    (
        "small",
        ["training.precision=float32", "stage1.lr=0.005", "resources.workers=4"],
        "3e46cd301fd922607e3c507b9a0c941204a370a8915250b3dc42852a747f6fa3",
    ),
]
"""Recipes, and what the first version of names gave them."""


@pytest.mark.parametrize(("name", "changes", "digest"), FIRST_NAMES)
def test_first_names_are_still_known(name: str, changes: list[str], digest: str) -> None:
    recipe = load_recipe(name, changes, "mine")
    assert recipe.first_fingerprint(set="s", split=1, weights=recipe.model.weights, format=2) == digest


def test_every_field_that_decides_a_result_says_what_names_leave_out() -> None:
    recipe = load_recipe("ta-vlad", dataset="mine")
    missing = recipe.decisive().keys() - LEFT_OUT.keys()
    assert not missing, "give each a line in names.toml, with the value that means what was done before"


def test_new_field_renames_nothing_and_its_other_values_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = load_recipe("ta-vlad", dataset="mine").decisive()
    before = fingerprint(fields, {"split": 1}), first_fingerprint(fields, {"split": 1})
    monkeypatch.setitem(LEFT_OUT, "training.new", "as before")
    as_before, otherwise = fields | {"training.new": "as before"}, fields | {"training.new": "otherwise"}
    assert (fingerprint(as_before, {"split": 1}), first_fingerprint(as_before, {"split": 1})) == before
    assert fingerprint(otherwise, {"split": 1}) != before[0]
    assert first_fingerprint(otherwise, {"split": 1}) is None, "which could not say it"


def test_field_that_is_gone_leaves_first_names_known() -> None:
    fields = load_recipe("ta-vlad", dataset="mine").decisive()
    fewer = {name: value for name, value in fields.items() if name != "training.cuda_graphs"}
    assert first_fingerprint(fewer, {}) == first_fingerprint(fields, {})
    assert fingerprint(fewer, {}) == fingerprint(fields, {})


def test_pixels_of_nvjpeg_have_a_name_of_their_own_and_make_no_features() -> None:
    def load(*changes: str) -> Recipe:
        return load_recipe("ta-vlad", [*changes, "resources.gpus_per_worker=1"], dataset="hmdb51")

    exact, quick = load(), load("training.decoder=nvjpeg")
    assert exact.fingerprint(split=1) != quick.fingerprint(split=1)
    assert exact.names_features(exact.stage1)
    assert not quick.names_features(quick.stage1)
    with pytest.raises(UserError, match=r'nvjpeg": features are made of libjpeg'):
        load("training.decoder=nvjpeg", "stage1.features=always")
    with pytest.raises(UserError, match="needs GPUs"):
        load_recipe("ta-vlad", ["training.decoder=nvjpeg"], dataset="hmdb51")
