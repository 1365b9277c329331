"""Fixtures of this room."""

from tests.fixtures_verbs import lab, packed_clips, real_videos, trained  # noqa: F401
