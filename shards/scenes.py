"""What happens in the demo's rendered videos: pairs of actions, the second playing the first one's events backwards.

Both actions of a pair draw their events from the same distribution. So a model that looks at frames without their order
can tell the pairs apart, and can only guess within one.

What "backwards" must mean. Models see the T frames floor(i·n/T) of a video of n frames (tavlad.clip), which always
include the first frame and never the last, on average n/2T frames earlier than the middle. Played backwards about the
middle, a video would therefore show about one sampled frame more of its other state, and counting states would betray
the direction. The second action is played backwards about the mean of the sampled frames instead: then both directions
show the same states equally often.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shards import drawing
from shards.drawing import Colour, Picture, Pose, Shape
from tavlad.clip import uniform_frame_indices

PAIRS: tuple[tuple[str, str], ...] = (
    ("grow", "shrink"),
    ("appear", "disappear"),
    ("open", "close"),
    ("circle_then_cross", "cross_then_circle"),
)
"""Pairs of actions, the second the first played backwards."""
MOTION_PAIR: tuple[str, str] = ("move_right", "move_left")
"""No fair pair for VLAD, which sums over places: only where the object is changes. Rendered when asked."""

NUM_FRAMES = (30, 70)
"""Fewest and most frames of a video."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """When the change happens, in frames of the forward video; times may be fractions and lie outside 0..n."""

    num_frames: int
    middle: float
    duration: float
    turning_point: float
    """The time about which a backward video is reflected."""

    def time(self, frame: int, backwards: bool) -> float:
        """What time of the forward video a frame shows."""
        return self.turning_point - frame if backwards else float(frame)

    def progress(self, time: float) -> float:
        """0 before the change, 1 after it, smooth and symmetric in between."""
        x = min(1.0, max(0.0, (time - self.middle) / self.duration + 0.5))
        return x * x * (3 - 2 * x)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Actor:
    """The object an action is about: `x`, `y`, `speed_*` and `unit` (the frame's short side) in pixels."""

    x: float
    y: float
    speed_x: float
    speed_y: float
    angle: float
    spin: float
    """Radians a frame."""
    unit: float
    small: float
    large: float
    """Radii as parts of `unit`."""
    shape: Shape
    colour: Colour
    second_colour: Colour

    def pose(self, time: float, radius: float) -> Pose:
        """Where it stands at `time` frames after the middle of the video, with a radius in parts of `unit`."""
        return Pose(
            x=self.x + self.speed_x * time,
            y=self.y + self.speed_y * time,
            radius=radius * self.unit,
            angle=self.angle + self.spin * time,
        )


_INK: Colour = (18.0, 18.0, 22.0)


def _paint_outlined(picture: Picture, shape: Shape, pose: Pose, colour: Colour, opacity: float = 1.0) -> None:
    border = max(1.5, 0.07 * pose.radius)

    def wider(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        return shape(u, v) - np.float32(border / pose.radius)

    drawing.paint(picture, wider, pose, _INK, opacity)
    drawing.paint(picture, shape, pose, colour, opacity)


def _draw_growing(picture: Picture, actor: _Actor, time: float, progress: float) -> None:
    radius = actor.small + progress * (actor.large - actor.small)
    _paint_outlined(picture, actor.shape, actor.pose(time, radius), actor.colour)


def _draw_appearing(picture: Picture, actor: _Actor, time: float, progress: float) -> None:
    pose = actor.pose(time, actor.large)
    _paint_outlined(picture, drawing.star, pose, actor.colour, progress)
    drawing.paint(picture, drawing.disc, dataclasses.replace(pose, radius=0.3 * pose.radius), _INK, progress)


def _draw_opening(picture: Picture, actor: _Actor, time: float, progress: float) -> None:
    """A round head whose mouth opens, dark inside, with an eye."""
    pose = actor.pose(time, actor.large)
    half_angle = 0.04 + 1.06 * progress
    _paint_outlined(picture, drawing.disc, pose, _INK)
    drawing.paint(picture, drawing.disc_without_wedge(half_angle), pose, actor.colour)
    cos, sin = np.cos(pose.angle - 1.75), np.sin(pose.angle - 1.75)
    eye = Pose(x=pose.x + 0.58 * pose.radius * cos, y=pose.y + 0.58 * pose.radius * sin, radius=0.15 * pose.radius)
    drawing.paint(picture, drawing.disc, eye, _INK)


def _draw_swapping(picture: Picture, actor: _Actor, time: float, progress: float) -> None:
    pose = actor.pose(time, actor.large)
    _paint_outlined(picture, drawing.ring, pose, actor.colour, 1 - progress)
    _paint_outlined(picture, drawing.cross, pose, actor.second_colour, progress)


def _draw_moving(picture: Picture, actor: _Actor, time: float, progress: float) -> None:
    pose = actor.pose(time, 0.7 * actor.large)
    pose = dataclasses.replace(pose, x=pose.x + (progress - 0.5) * 0.7 * actor.unit)
    _paint_outlined(picture, actor.shape, pose, actor.colour)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Story:
    """How the two actions of a pair are drawn."""

    draw: Callable[[Picture, _Actor, float, float], None]
    durations: tuple[float, float]
    """Shortest and longest change, as parts of the video."""


_STORIES: dict[str, _Story] = {
    "grow": _Story(draw=_draw_growing, durations=(0.2, 0.4)),
    "appear": _Story(draw=_draw_appearing, durations=(0.1, 0.25)),
    "open": _Story(draw=_draw_opening, durations=(0.2, 0.4)),
    "circle_then_cross": _Story(draw=_draw_swapping, durations=(0.1, 0.25)),
    "move_right": _Story(draw=_draw_moving, durations=(0.4, 0.6)),
}


def render_clip(
    action: str, seed: Sequence[int], size: tuple[int, int] = (192, 144), num_samples: int = 16
) -> NDArray[np.uint8]:
    """The frames (T,H,W,3) of one video of an action, a function of the seed alone.

    `size` is width and height in pixels; the direction of time is hidden best from models that sample `num_samples`
    frames. ValueError: an action that cannot be rendered.
    """
    pair = next((pair for pair in (*PAIRS, MOTION_PAIR) if action in pair), None)
    if pair is None:
        known = ", ".join(name for pair in (*PAIRS, MOTION_PAIR) for name in pair)
        raise ValueError(f"Cannot render the action {action!r}: choose one of {known}.")
    story, backwards = _STORIES[pair[0]], action == pair[1]
    rng = np.random.default_rng([*seed])
    width, height = size
    event, actor = draw_event(rng, story.durations, num_samples), _draw_actor(rng, width, height)
    background_HWC = _draw_background(rng, height, width)
    movers = [_draw_distractor(rng, height, width) for _ in range(3)]
    brightness, period, phase = rng.uniform(0.02, 0.08), rng.uniform(20, 60), rng.uniform(0, 2 * np.pi)
    grain_HW = rng.standard_normal((height + 32, width + 32), np.float32) * np.float32(rng.uniform(2, 5))
    frames_THWC = np.empty((event.num_frames, height, width, 3), np.uint8)
    for number in range(event.num_frames):
        time = event.time(number, backwards)
        moment = time - event.turning_point / 2
        picture_HWC = background_HWC.copy()
        for shape, pose, colour, (speed_x, speed_y) in movers:
            moved = dataclasses.replace(pose, x=pose.x + speed_x * moment, y=pose.y + speed_y * moment)
            drawing.paint(picture_HWC, shape, moved, colour)
        story.draw(picture_HWC, actor, moment, event.progress(time))
        picture_HWC *= np.float32(1 + brightness * np.sin(2 * np.pi * time / period + phase))
        row, column = rng.integers(0, 32, 2)
        picture_HWC += grain_HW[row : row + height, column : column + width, None]
        np.clip(picture_HWC, 0, 255, out=picture_HWC)
        frames_THWC[number] = picture_HWC
    return frames_THWC


def draw_event(rng: np.random.Generator, durations: tuple[float, float], num_samples: int) -> Event:
    """A change of a length between `durations` (parts of the video), somewhere around the middle of what is sampled."""
    num_frames = int(rng.integers(NUM_FRAMES[0], NUM_FRAMES[1] + 1))
    mean_sample = float(np.mean(uniform_frame_indices(num_frames, num_samples)))
    return Event(
        num_frames=num_frames,
        # Symmetric about the middle of what is sampled: no state is longer in view than the other, in either direction.
        middle=mean_sample + rng.uniform(-0.18, 0.18) * num_frames,
        duration=rng.uniform(*durations) * num_frames,
        turning_point=2 * mean_sample,
    )


def _draw_actor(rng: np.random.Generator, width: int, height: int) -> _Actor:
    unit = float(min(width, height))
    hue = rng.uniform()
    shapes = (drawing.disc, drawing.square, drawing.triangle)
    return _Actor(
        x=width / 2 + rng.uniform(-0.1, 0.1) * unit,
        y=height / 2 + rng.uniform(-0.1, 0.1) * unit,
        speed_x=rng.uniform(-0.0015, 0.0015) * unit,
        speed_y=rng.uniform(-0.0015, 0.0015) * unit,
        angle=rng.uniform(0, 2 * np.pi),
        spin=rng.uniform(-0.012, 0.012),
        unit=unit,
        small=rng.uniform(0.125, 0.14),
        large=rng.uniform(0.26, 0.3),
        shape=shapes[rng.integers(len(shapes))],
        colour=drawing.vivid_colour(rng, hue),
        second_colour=drawing.vivid_colour(rng, hue + rng.uniform(0.3, 0.7)),
    )


_Distractor = tuple[Shape, Pose, Colour, tuple[float, float]]


def _draw_distractor(rng: np.random.Generator, height: int, width: int) -> _Distractor:
    """A small shape somewhere, of a greyish colour, with its speed in pixels a frame."""
    shapes = (drawing.disc, drawing.ring, drawing.square, drawing.triangle, drawing.cross)
    pose = Pose(
        x=rng.uniform(0, width),
        y=rng.uniform(0, height),
        radius=rng.uniform(0.03, 0.07) * min(width, height),
        angle=rng.uniform(0, 2 * np.pi),
    )
    speed_x, speed_y = rng.uniform(-0.8, 0.8, 2)
    return shapes[rng.integers(len(shapes))], pose, drawing.muted_colour(rng), (float(speed_x), float(speed_y))


def _draw_background(rng: np.random.Generator, height: int, width: int) -> Picture:
    picture_HWC = drawing.texture(rng, height, width)
    for _ in range(rng.integers(4, 9)):
        line = Pose(
            x=rng.uniform(0, width),
            y=rng.uniform(0, height),
            radius=rng.uniform(0.2, 0.6) * height,
            angle=rng.uniform(0, np.pi),
        )
        drawing.paint(picture_HWC, drawing.bar, line, drawing.muted_colour(rng), rng.uniform(0.3, 0.8))
    for _ in range(rng.integers(8, 17)):
        shape, pose, colour, _speed = _draw_distractor(rng, height, width)
        drawing.paint(picture_HWC, shape, pose, colour, rng.uniform(0.5, 1))
    return picture_HWC
