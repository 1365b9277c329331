"""Fixtures of this room."""

from tests.mlflow_server import mlflow_server  # noqa: F401
