from pathlib import Path

import numpy as np
import pytest
import torch

from tavlad.checkpoint import ModelCard, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.model import TaVlad
from tavlad.predict import Prediction, Predictor, table

CONFIG = ModelConfig(trunk="efficientnet_lite0", weights="none", num_clusters=4, gru_width=8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    actions = ("clap", "jump", "wave")
    card = ModelCard(model=CONFIG, actions=actions, num_frames=3, short_side=40, crop=32, precision="float32")
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(directory, TaVlad(CONFIG, len(actions)), card)
    return directory


def random_frames(num_clips: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_clips)
    return torch.randint(0, 256, (num_clips, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_a_batch_is_predicted_as_its_clips_are(directory: Path) -> None:
    predictor = Predictor(directory, batch_size=2)
    frames = random_frames(5)
    together = predictor.predict_frames(frames)
    alone = np.concatenate([predictor.predict_frames(frames[clip : clip + 1]) for clip in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    assert together.shape == (5, 3)


def test_frames_the_model_was_not_made_for_are_refused(directory: Path) -> None:
    predictor = Predictor(directory)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 3, 30, 32\): this model takes .*\(clips, 3, 3, 32, 32\)"):
        predictor.predict_frames(random_frames(1)[..., :30, :])
    with pytest.raises(ValueError, match=r"shape \(0, 3, 3, 32, 32\)"):
        predictor.predict_frames(random_frames(1)[:0])


def test_a_table_names_the_most_probable_actions_first() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    rows = table(probabilities, ("a.avi", "b.avi"), ("clap", "jump", "wave"), top=2)
    assert rows == [
        Prediction(video="a.avi", rank=1, action="jump", probability=0.5),
        Prediction(video="a.avi", rank=2, action="wave", probability=0.3),
        Prediction(video="b.avi", rank=1, action="clap", probability=0.4),
        Prediction(video="b.avi", rank=2, action="wave", probability=0.4),
    ]
    assert len(table(probabilities, ("a.avi", "b.avi"), ("clap", "jump", "wave"), top=9)) == 6
    with pytest.raises(ValueError, match="top is 0"):
        table(probabilities, ("a.avi", "b.avi"), ("clap", "jump", "wave"), top=0)
