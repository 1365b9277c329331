"""What settings are chosen by: whole groups of the training part, and never a test clip."""

from collections import Counter

import pyarrow as pa
import pytest

from shards.held_out import held_out
from shards.index import SCHEMA, Index, make_index


def _index(groups: dict[str, list[tuple[str, str]]]) -> Index:
    """Clips of split 1 by group: (action, part)."""
    actions = sorted({action for clips in groups.values() for action, _ in clips})
    rows = [
        {"key": f"{group}-{number}", "action": action, "label": actions.index(action), "split1": part, "group": group}
        | {"sha256": f"{group}{number}"}
        for group, clips in groups.items()
        for number, (action, part) in enumerate(clips)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return make_index(name="set", actions=actions, packing={}, num_frames=4, plan="", rows=table)


def _keys(index: Index, part: str) -> set[str]:
    return set(index.clips(1, part).keys())  # type: ignore[arg-type]


ACTORS = {
    f"actor{number}": [(action, "train" if number < 8 else "test") for action in ("bend", "jump", "wave")]
    for number in range(12)
}


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_of_train_are_held_out_and_no_test_clip_is_seen(seed: int) -> None:
    index = _index(ACTORS)
    seen = held_out(index, 1, 0.25, seed)
    learned, held = _keys(seen, "train"), _keys(seen, "test")
    assert learned | held == _keys(index, "train")
    assert not learned & held
    groups = [{key.partition("-")[0] for key in keys} for keys in (learned, held)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 2, "a quarter of eight actors"
    assert Counter(seen.clips(1, "test").labels_N.tolist()) == {0: 2, 1: 2, 2: 2}
    assert seen.fingerprint != index.fingerprint, "a codebook of these clips is another one"


def test_held_out_part_is_a_function_of_groups_and_seed() -> None:
    index, reversed_rows = _index(ACTORS), _index(dict(reversed(ACTORS.items())))
    held = [_keys(held_out(index, 1, 0.25, seed), "test") for seed in range(6)]
    assert held[0] == _keys(held_out(index, 1, 0.25, 0), "test")
    assert held[0] == _keys(held_out(reversed_rows, 1, 0.25, 0), "test")
    assert len({frozenset(keys) for keys in held}) > 1


def test_every_action_keeps_a_clip_to_learn_from() -> None:
    """`rare` has two groups, `lone` one: of the first one is held out, of the second none."""
    groups = {f"g{number}": [("common", "train")] * 2 for number in range(6)}
    groups |= {"r1": [("rare", "train")], "r2": [("rare", "train")], "l": [("lone", "train")], "t": [("lone", "test")]}
    for seed in range(8):
        seen = held_out(_index(groups), 1, 0.9, seed)
        assert {"common", "lone", "rare"} == set(seen.clips(1, "train").table["action"].to_pylist())
        assert {"common", "rare"} == set(seen.clips(1, "test").table["action"].to_pylist())


def test_one_group_an_action_is_refused() -> None:
    index = _index({"a": [("bend", "train")] * 3, "b": [("jump", "train")] * 3, "t": [("jump", "test")]})
    with pytest.raises(ValueError, match="clips of one group only"):
        held_out(index, 1, 0.25, 0)
