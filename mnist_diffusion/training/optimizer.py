"""AdamW, or Muon for convolutions and matrices with AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mnist_diffusion.config import TrainConfig

MOMENTUM = 0.95
RMS_OF_ADAMW = 0.2
ITERATIONS = 5


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer that the configuration asks for, over all parameters of `network`."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    options["fused" if next(network.parameters()).is_cuda else "foreach"] = True
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **options)
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        groups[parameter.ndim > 1 and id(parameter) not in tables].append(parameter)
    return Muon([{"params": group, "orthogonal": orthogonal} for orthogonal, group in groups.items()], **options)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal` take steps of Muon instead: their momentum, made orthogonal.

    Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/. A convolution is a matrix with a row for each
    output channel. Steps are scaled to the size of AdamW's, so that both share learning rate and weight decay: Liu et
    al. (2025), https://arxiv.org/abs/2502.16982, equation 4. (`torch.optim.Muon` takes matrices alone, and works in
    bfloat16, which many CPUs compute slowly.)
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient; those that Muon moves lose theirs."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._orthogonal_step(group)
        super().step()  # passes by what has no gradient
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = self.state[parameter]
            if not state:  # AdamW expects a count of steps in every state that is loaded
                state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(parameter))
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
            direction = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
            rows, columns = direction.shape
            by_shape[rows, columns].append((parameter, direction))
            parameter.grad = None
        for shape, pairs in by_shape.items():
            updates = orthogonalised(torch.stack([direction for _, direction in pairs]))
            size = group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view(parameter.shape), alpha=size)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices `[N, R, C]` with their singular values brought near 1, between 0.7 and 1.2, by a quintic Newton-Schulz
    iteration with the coefficients of Jordan et al."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    found = matrices if wide else matrices.mT
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = 3.4445 * found + (2.0315 * gram @ gram - 4.7750 * gram) @ found
    return found if wide else found.mT
