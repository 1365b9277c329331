"""tavlad prepare: the archives of HMDB51 or UCF101 become a folder per action and checked split files."""

from pathlib import Path

from ray_jobs.console import Console
from shards.published_sets import PUBLISHED, Prepared, PublishedName, prepare_splits, prepare_videos


def prepare(name: PublishedName, archive: Path, folder: Path, splits: Path | None, console: Console) -> Prepared:
    """Unpack and count a published data set below `folder`, and say which command packs it. Twice is the same as once.

    Raises ValueError for an archive that is damaged, incomplete or another one, and for a missing rar program.
    """
    published = PUBLISHED[name]
    with console.progress("actions unpacked", published.num_actions) as advance:
        videos, num_videos = prepare_videos(published, archive, folder, advance)
    console.say(f"  {num_videos} videos of {published.num_actions} actions in {videos}")
    unpacked = prepare_splits(published, splits, folder, videos) if splits is not None else None
    if unpacked is None:
        console.say(f"  give --splits {published.splits_archive} too, or say where the split files are when packing")
    else:
        console.say(f"  three splits in {unpacked}: every video they name is there")
    console.say(f"pack it: tavlad pack {videos} --name {name} --layout {name} --splits {unpacked or 'SPLIT_FILES'}")
    return Prepared(videos=videos, splits=unpacked, num_actions=published.num_actions, num_videos=num_videos)
