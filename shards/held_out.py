"""A part of a split's training clips held out, to choose settings by: whole groups, and never a test clip."""

import hashlib
from collections import Counter
from dataclasses import replace

import pyarrow as pa

from shards.index import ClipTable, Index
from tavlad.errors import UserError


def held_out(index: Index, split: int, share: float, seed: int) -> Index:
    """The set as it looks to whoever chooses settings for `split`: its "test" part is held out of its training part.

    Of each action about `share` of the training clips are held out, whole groups at a time, and as far as groups allow
    some of every action are held out and some are left. The split's own test clips are in no part. A function of the
    clips' groups and actions and of `seed`, whatever their order. Raises ValueError where nothing can be held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}: choose one above 0 and below 1")
    train = index.clips(split, "train").table
    groups_of = {name: _Group(name) for name in set(train["group"].to_pylist())}
    for group, action in zip(train["group"].to_pylist(), train["action"].to_pylist(), strict=True):
        groups_of[group].clips[action] += 1
    chosen = _choose(list(groups_of.values()), share, seed)
    if not chosen:
        raise UserError(
            f"nothing can be held out of the training part of split {split} of {index.name!r}: each of its actions has "
            "clips of one group only; pack it with more groups (column `group` of the table layout)"
        )
    column = f"split{split}"
    table = index.clips_table.table
    parts = [
        {"train": "test" if group in chosen else "train"}.get(part, "unused")
        for part, group in zip(table[column].to_pylist(), table["group"].to_pylist(), strict=True)
    ]
    changed = table.set_column(table.schema.get_field_index(column), column, pa.array(parts))
    digest = hashlib.sha256(f"{index.fingerprint} held out of split {split}".encode())
    for group in sorted(chosen):
        digest.update(f"\n{group}".encode())
    return replace(index, clips_table=ClipTable.of(changed), fingerprint=digest.hexdigest())


class _Group:
    """One group's training clips, counted by action."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clips = Counter[str]()


def _choose(groups: list[_Group], share: float, seed: int) -> set[str]:
    """Names of the groups to hold out: action by action, the rarest first, in an order drawn by the seed."""
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group.name}".encode()).digest())
    total = sum((group.clips for group in groups), Counter[str]())
    held = Counter[str]()
    chosen: set[str] = set()
    for action in sorted(total, key=lambda name: (total[name], name)):
        wanted = max(1, round(share * total[action]))
        for group in order:
            if held[action] >= wanted:
                break
            leaves_some = all(held[each] + count < total[each] for each, count in group.clips.items())
            if group.name not in chosen and group.clips[action] and leaves_some:
                chosen.add(group.name)
                held.update(group.clips)
    return chosen
