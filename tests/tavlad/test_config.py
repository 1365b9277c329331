"""Settings: what is wrong is named, with the nearest key and the remedy."""

import pytest

from tavlad.config import STAGE2, CodebookConfig, ModelConfig, StageConfig, parse


def test_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"unknown key model\.num_cluster: did you mean num_clusters\?"):
        parse(ModelConfig, {"num_cluster": 8}, "model")


def test_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"missing key stage1\.lr"):
        parse(StageConfig, {"epochs": 3}, "stage1")


@pytest.mark.parametrize("value", ["8", 8.5, True, None])
def test_wrong_type_is_an_error_and_never_converted(value: object) -> None:
    with pytest.raises(ValueError, match=r"model\.num_clusters = .*must be of type int"):
        parse(ModelConfig, {"num_clusters": value}, "model")


def test_whole_number_is_a_fine_float() -> None:
    assert parse(ModelConfig, {"alpha": 5}).alpha == 5.0


def test_choice_outside_the_list_names_the_list() -> None:
    with pytest.raises(ValueError, match=r"model\.temporal = 'lstm': must be one of 'sum', 'gru'"):
        parse(ModelConfig, {"temporal": "lstm"}, "model")


def test_field_out_of_range_is_named_with_its_table_once() -> None:
    with pytest.raises(ValueError, match=r"^stage2\.lr = -1\.0: must be above 0$"):
        parse(StageConfig, {"lr": -1.0}, "stage2", base=STAGE2)
    with pytest.raises(ValueError, match=r"^codebook\.frames = 0: must be at least 1$"):
        parse(CodebookConfig, {"frames": 0}, "codebook")


def test_fields_left_out_come_from_the_base() -> None:
    stage = parse(StageConfig, {"epochs": 3}, "stage2", base=STAGE2)
    assert (stage.epochs, stage.lr, stage.trunk, stage.vlad) == (3, 1e-4, "last-block", True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention": "none", "temporal": "sum"}, "actionvlad"),
        ({"attention": "none", "gru_width": 512}, "vlad-gru-512"),
        ({}, "ta-vlad"),
        ({"attention": "frozen-cam"}, "ta-vlad-frozen-cam"),
        ({"temporal": "sum"}, "ta-vlad-sum"),
        ({"gru_width": 128}, "ta-vlad-gru-128"),
    ],
)
def test_variants_have_the_names_of_table_1(changes: dict[str, object], name: str) -> None:
    assert parse(ModelConfig, changes).variant == name
