"""The rendered actions: what changes in each, and that within a pair only the order of the frames tells them apart."""

import numpy as np
import pytest
from numpy.typing import NDArray

from shards import scenes
from shards.scenes import MOTION_PAIR, PAIRS, draw_event, render_clip
from tavlad.clip import uniform_frame_indices

ACTIONS = [action for pair in (*PAIRS, MOTION_PAIR) for action in pair]


def vivid_share(frame_HWC: NDArray[np.uint8]) -> float:
    """The part of a frame whose pixels are as colourful as only the object is."""
    return float((np.ptp(frame_HWC.astype(int), axis=2) > 110).mean())


def dark_share(frame_HWC: NDArray[np.uint8]) -> float:
    """The part of a frame that is almost black, as outlines and open mouths are."""
    return float((frame_HWC.max(axis=2) < 45).mean())


def ends(action: str, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    frames_THWC = render_clip(action, [5, number])
    return frames_THWC[0], frames_THWC[-1]


@pytest.mark.parametrize("number", range(4))
def test_growing_object_takes_four_times_the_area_and_shrinking_the_reverse(number: int) -> None:
    (small, large), (large_first, small_last) = ends("grow", number), ends("shrink", number)
    assert vivid_share(large) > 2.5 * vivid_share(small) > 0.02
    assert vivid_share(large_first) > 2.5 * vivid_share(small_last) > 0.02


@pytest.mark.parametrize("number", range(4))
def test_object_appears_from_nothing_and_disappears_into_nothing(number: int) -> None:
    (nothing, star), (star_first, nothing_last) = ends("appear", number), ends("disappear", number)
    assert vivid_share(nothing) < 0.01 < 0.05 < vivid_share(star)
    assert vivid_share(nothing_last) < 0.01 < 0.05 < vivid_share(star_first)


@pytest.mark.parametrize("number", range(4))
def test_open_mouth_is_dark_inside(number: int) -> None:
    (closed, opened), (opened_first, closed_last) = ends("open", number), ends("close", number)
    assert dark_share(opened) > dark_share(closed) + 0.03
    assert dark_share(opened_first) > dark_share(closed_last) + 0.03


@pytest.mark.parametrize("number", range(4))
def test_circle_and_cross_change_places(number: int) -> None:
    """Where the cross's bars meet, the ring is hollow: only there a vivid colour comes or goes."""

    def centre_is_vivid(frame_HWC: NDArray[np.uint8]) -> bool:
        vivid_HW = np.ptp(frame_HWC.astype(int), axis=2) > 110
        rows, columns = vivid_HW.nonzero()
        row, column = round(rows.mean()), round(columns.mean())
        return bool(vivid_HW[row - 2 : row + 3, column - 2 : column + 3].mean() > 0.5)

    assert [centre_is_vivid(frame) for frame in ends("circle_then_cross", number)] == [False, True]
    assert [centre_is_vivid(frame) for frame in ends("cross_then_circle", number)] == [True, False]


@pytest.mark.parametrize("number", range(4))
def test_motion_pair_moves_right_and_left(number: int) -> None:
    def column(frame_HWC: NDArray[np.uint8]) -> float:
        return float((np.ptp(frame_HWC.astype(int), axis=2) > 110).nonzero()[1].mean())

    (start, end), (start_left, end_left) = ends("move_right", number), ends("move_left", number)
    assert column(end) > column(start) + 50
    assert column(end_left) < column(start_left) - 50


@pytest.mark.parametrize("num_samples", [8, 16, 25])
def test_sampled_frames_show_as_much_of_each_state_in_both_directions(num_samples: int) -> None:
    """The best threshold on how much of the second state is seen must not tell the direction: 50 % and chance."""
    rng = np.random.default_rng(0)
    seen: dict[bool, list[float]] = {False: [], True: []}
    for backwards, amounts in seen.items():
        for _ in range(4000):
            event = draw_event(rng, (0.1, 0.25), num_samples)
            frames = uniform_frame_indices(event.num_frames, num_samples)
            amounts.append(sum(event.progress(event.time(frame, backwards)) for frame in frames))
    forward, backward = np.sort(seen[False]), np.sort(seen[True])
    thresholds = np.concatenate([forward, backward])
    shares = [np.searchsorted(amounts, thresholds, "right") / len(amounts) for amounts in (forward, backward)]
    best_accuracy = 0.5 + np.abs(shares[0] - shares[1]).max() / 2
    assert best_accuracy < 0.52  # a plain reversal gives 0.58 at 16 samples; chance alone reaches about 0.513


def test_backward_clip_shows_the_sampled_frames_of_its_forward_one_in_reverse() -> None:
    """Where the number of samples divides the number of frames, the sampled times are exactly the same set."""
    rng = np.random.default_rng(0)
    event = next(event for event in iter(lambda: draw_event(rng, (0.2, 0.4), 16), None) if event.num_frames == 64)
    frames = uniform_frame_indices(64, 16)
    forward, backward = ([event.time(frame, backwards) for frame in frames] for backwards in (False, True))
    assert backward == forward[::-1]


@pytest.mark.parametrize("action", ACTIONS)
def test_clip_is_a_function_of_its_seed(action: str) -> None:
    first, again, other = (render_clip(action, [2, number], (64, 48)) for number in (0, 0, 1))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_clips_have_the_lengths_and_the_size_that_are_promised() -> None:
    lengths: list[int] = []
    for number in range(20):
        num_frames, height, width, channels = render_clip("appear", [number], (64, 48)).shape
        assert (height, width, channels) == (48, 64, 3)
        lengths.append(num_frames)
    assert scenes.NUM_FRAMES[0] <= min(lengths) < max(lengths) <= scenes.NUM_FRAMES[1]
    assert len(set(lengths)) > 5


def test_unknown_action_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'jump'.*grow, shrink, appear"):
        render_clip("jump", [0])
