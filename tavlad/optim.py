"""What a stage trains, and with which optimiser and schedule (METHOD, "Training")."""

import torch

from tavlad.config import StageConfig, TrainingConfig
from tavlad.model import TaVlad


def choose_trained(model: TaVlad, stage: StageConfig) -> None:
    """Let gradients reach what the stage trains, and nothing else."""
    model.requires_grad_(False)
    for module in (model.classifier, model.gru, model.lstm, *([model.vlad] if stage.vlad else [])):
        if module is not None:
            module.requires_grad_(True)
    if stage.fc and model.config.attention == "cam":
        # Its bias only helps to choose the winning class: no gradient reaches it.
        model.trunk.classifier.weight.requires_grad_(True)
    if stage.trunk != "frozen":
        for conv in model.trunk.last_block_convs(downsample=stage.trunk == "last-block"):
            conv.requires_grad_(True)


def build_optimizer(model: TaVlad, stage: StageConfig, training: TrainingConfig) -> torch.optim.Adam:
    """Adam over what may learn; the VLAD layer's tensors have no weight decay."""
    vlad = set[int]() if model.vlad is None else {id(parameter) for parameter in model.vlad.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if id(each) not in vlad], "weight_decay": training.weight_decay},
        {"params": [each for each in trained if id(each) in vlad], "weight_decay": 0.0},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=stage.lr, eps=training.adam_eps)


def learning_rate(stage: StageConfig, epoch: int) -> float:
    """The rate of an epoch, from 0: multiplied by `decay_factor` after every `decay_every` epochs.

    A function of the epoch, so that a resumed run needs no schedule state.
    """
    return stage.lr * stage.decay_factor ** (epoch // stage.decay_every)
