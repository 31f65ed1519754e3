"""AdamW, or Muon for convolutions and matrices with AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        directions = []
        for parameter in moved:
            state = self.state[parameter]
            if not state:  # AdamW expects a count of steps in every state that is loaded
                state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(parameter))
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            directions.append(parameter.grad.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's
            parameter.grad = None
        for parameter, update in zip(moved, orthogonalised(directions), strict=True):
            size = group["lr"] * RMS_OF_ADAMW * max(update.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update.view(parameter.shape), alpha=size)


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices `[R, C]`, each of its own size, with their singular values brought near 1, between 0.7 and 1.2.

    A quintic Newton-Schulz iteration with the coefficients of Jordan et al., `X <- (a + b G + c G G) X` with the Gram
    matrix `G = X X'` of the smaller side. Its factors are polynomials of the first `G`, which commute: they are
    multiplied up without `X`, and in one batch for all matrices whose `G` has the same size.
    """
    wide = [each if each.shape[0] <= each.shape[1] else each.mT for each in matrices]
    wide = [each / each.norm().clamp(min=1e-7) for each in wide]
    grams: dict[int, list[Tensor]] = defaultdict(list)
    for each in wide:
        grams[len(each)].append(each @ each.mT)
    factors = {side: iter(_newton_schulz(torch.stack(batch))) for side, batch in grams.items()}
    products = [next(factors[len(each)]) @ each for each in wide]
    return [each if each.shape == matrix.shape else each.mT for each, matrix in zip(products, matrices, strict=True)]


def _newton_schulz(gram: Tensor) -> Tensor:
    """The product of the iteration's factors for Gram matrices `[N, R, R]`."""
    total = identity = torch.eye(gram.shape[-1]).to(gram)
    for iteration in range(ITERATIONS):
        factor = 3.4445 * identity + (2.0315 * gram - 4.7750 * identity) @ gram
        total = factor @ total
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return total
