"""What a stage trains, and with which optimiser and schedule (METHOD, "Training")."""

import torch
from torch import nn

from tavlad.config import StageConfig, TrainingConfig
from tavlad.model import TaVlad


def trained_modules(model: TaVlad, stage: StageConfig) -> list[nn.Module]:
    """The modules whose parameters the stage trains; every other parameter of the model is frozen."""
    modules: list[nn.Module] = [model.classifier]
    if model.gru is not None:
        modules.append(model.gru)
    if stage.vlad:
        modules.append(model.vlad)
    if stage.fc and model.config.attention == "cam":  # without attention no gradient reaches it
        modules.append(model.trunk.classifier)
    if stage.trunk != "frozen":
        modules.extend(model.trunk.last_block_convs(downsample=stage.trunk == "last-block"))
    return modules


def freeze_all_but(model: TaVlad, modules: list[nn.Module]) -> list[nn.Parameter]:
    """Let gradients reach these modules only; returns their parameters in a fixed order."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(model: TaVlad, stage: StageConfig, training: TrainingConfig) -> torch.optim.Adam:
    """Adam over what may learn; the VLAD layer's tensors have no weight decay."""
    vlad = {id(parameter) for parameter in model.vlad.parameters()}
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
