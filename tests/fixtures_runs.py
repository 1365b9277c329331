"""Trainings that look finished to MLflow, without having trained: what its pages are tested with."""

import math
from pathlib import Path

import torch

from infra.site import Site
from ray_jobs.plan import TrainingPlan
from ray_jobs.provenance import this_code
from ray_jobs.recipe import load_recipe
from ray_jobs.run_records import RunRecords
from ray_jobs.served_model import stage_code
from shards.index import SCHEMA, make_index
from shards.store import S3Access
from tavlad.checkpoint import ModelCard, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.model import TaVlad
from tavlad.registry import Registered, register

ACTIONS = ("bend", "jack", "wave2")


def record_training(tracking_uri: str, folder: Path, dataset: str, temporal: str, *, seed: int) -> Registered:
    """One training's runs as `tavlad train` leaves them, of made-up numbers, and its registered model."""
    s3 = S3Access(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key="b")
    site = Site(
        name="local",
        ray_address="127.0.0.1:9",
        ray_dashboard="http://127.0.0.1:9",
        s3=s3,
        bucket="tavlad",
        mlflow_uri=tracking_uri,
        state=folder,
    )
    recipe = load_recipe("demo", [f"model.temporal={temporal}", "stage1.epochs=6", "stage2.epochs=3"], dataset)
    index = make_index(name=dataset, actions=ACTIONS, packing={}, num_frames=8, plan="plan", rows=SCHEMA.empty_table())
    plan = TrainingPlan(
        site_name="local",
        recipe=recipe,
        split=1,
        dataset_uri=f"s3://tavlad/datasets/{dataset}",
        dataset_name=dataset,
        dataset_fingerprint=index.fingerprint,
        name=f"{dataset}-split1-{recipe.model.variant}-{seed:010x}",
        uri=f"s3://tavlad/runs/{dataset}",
    )
    with RunRecords(site, plan, index, (this_code(),)) as records:
        top1 = 0.0
        for stage, epochs in ((1, 6), (2, 3)):
            for epoch in range(1, epochs + 1):
                moment = epoch + (6 if stage == 2 else 0)
                top1 = 1 - math.exp(-moment / (4 + seed))
                metrics = {"train/loss": 2 * math.exp(-moment / 5), "train/top1": top1 + 0.02, "test/top1": top1}
                more = {"test/top5": 1.0, "test/mean_class": top1 - 0.01, "clips_per_second": 12.0 + seed}
                records.log_epoch({"stage": stage, "epoch": epoch, **metrics, **more})
        run_id = records.parent.run_id()
        checkpoint = folder / f"checkpoint-{seed}"
        model = ModelConfig(trunk="efficientnet_lite0", weights="none", num_clusters=2, gru_width=4)
        card = ModelCard(model=model, actions=ACTIONS, num_frames=8, short_side=96, crop=64, precision="float32")
        torch.manual_seed(seed)
        save_checkpoint(checkpoint, TaVlad(model, len(ACTIONS)), card)
        registered = register(
            tracking_uri,
            checkpoint,
            run_id=run_id,
            name=f"tavlad-{dataset}-split1",
            tags={"variant": recipe.model.variant, "dataset": dataset, "dataset_fingerprint": index.fingerprint},
            accuracy=top1,
            code=stage_code(folder / f"code-{seed}", model),
        )
        records.finish()
        return registered
