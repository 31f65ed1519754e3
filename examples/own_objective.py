"""Train with a loss of your own: here the pseudo-Huber loss, which is less sensitive to outliers than the squared
error.

python examples/own_objective.py
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mnist_diffusion import Config, train
from mnist_diffusion.method.distillation import pseudo_huber
from mnist_diffusion.method.noise import NoisingProcess
from mnist_diffusion.method.objective import Batch, Objective, diffusion_objective, prediction_errors


def huber_objective(config: Any, process: NoisingProcess, null_class: int | None) -> Objective:
    """Pseudo-Huber loss on the prediction; timesteps and label dropout are as the configuration says."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return pseudo_huber(prediction_errors(model, batch, process, null_class), c=0.1).mean(dim=(1, 2, 3))

    return replace(diffusion_objective(config, process, null_class), loss=loss, name="pseudo-Huber")


if __name__ == "__main__":
    train(Config.load("tiny"), objective=huber_objective)
