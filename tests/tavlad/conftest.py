"""Fixtures of this room."""

from tests.fixtures_models import real_clips, small_model  # noqa: F401
from tests.mlflow_server import mlflow_server  # noqa: F401
