"""Post-hoc averages of the weights: two are tracked during training, and any other is reconstructed from them.

Karras et al. (2024), https://arxiv.org/abs/2312.02696, section 3: step `k` has a weight proportional to `k ** gamma`,
so that an average always spans the same share of the training, given by its relative standard deviation: 0.1 is a
tenth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mnist_diffusion.errors import UserError
from mnist_diffusion.files import open_file, replace_bytes

TRACKED = (0.05, 0.1)
"""The relative standard deviations that are tracked, those of the paper."""
MAX_PLACES = 4000
FOLDER, FILE = "averages", re.compile(r"step-([1-9]\d*)\.safetensors")


def exponent(std: float) -> float:
    """The gamma of the power function of this relative standard deviation.

    It is `(gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)`, equation 123, solved for gamma as in algorithm 2.
    """
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


class PowerAverages:
    """The tracked averages of a network's weights.

    Args:
        network: its weights, in the order of `named_parameters`.
    """

    def __init__(self, network: nn.Module):
        self.names = [name for name, _ in network.named_parameters()]
        self.exponents = [exponent(std) for std in TRACKED]
        self.tracked = [[each.detach().clone() for each in network.parameters()] for _ in TRACKED]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Include the weights after a step; the first step is 1."""
        current = list(parameters)
        for gamma, average in zip(self.exponents, self.tracked, strict=True):
            torch._foreach_lerp_(average, current, 1 - (1 - 1 / step) ** (gamma + 1))

    def tensors(self) -> dict[str, Tensor]:
        """All averages, by `std/name`."""
        pairs = zip(TRACKED, self.tracked, strict=True)
        return {f"{std}/{name}": each for std, average in pairs for name, each in zip(self.names, average, strict=True)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore from [`tensors`]."""
        for name, average in self.tensors().items():
            average.copy_(tensors[name])

    def write(self, run: Path, step: int) -> None:
        """Save the averages of a step in the run folder."""
        (run / FOLDER).mkdir(exist_ok=True)
        contiguous = {name: each.cpu().contiguous() for name, each in self.tensors().items()}
        replace_bytes(run / FOLDER / f"step-{step}.safetensors", save(contiguous))


def coefficients(steps: Sequence[int], std: float) -> tuple[np.ndarray, float]:
    """Compute the coefficients that combine the saved averages into the average with this `std`.

    They sum to 1 and are a least-squares fit to the cumulative step weights of the target average. (If the network's
    parameters follow a random walk, the error of the average depends on these cumulative step weights.)

    Args:
        steps: increasing; both averages were saved after each.
        std: relative standard deviation of the target average.

    Returns:
        Coefficients `[len(steps), 2]`, one per saved average; and the largest error in the cumulative step weights.
    """
    last = steps[-1]
    # Up to a step, an average that ends at `end` has the share (step / end) ** (gamma + 1) of its weight.
    places = np.linspace(0, last, min(last, MAX_PLACES) + 1)
    known = [np.minimum(places / end, 1) ** (exponent(each) + 1) for end in steps for each in TRACKED]
    target = (places / last) ** (exponent(std) + 1)
    others = np.stack(known[:-1], axis=1) - known[-1][:, None]
    solution = np.linalg.lstsq(others, target - known[-1], rcond=None)[0]
    error = float(np.abs(others @ solution + known[-1] - target).max())
    return np.append(solution, 1 - solution.sum()).reshape(len(steps), len(TRACKED)), error


def prune_after_step(run: Path, step: int) -> None:
    """Remove the averages of later steps, which a resumed run trains again."""
    for path in (run / FOLDER).glob("*"):
        if (match := FILE.fullmatch(path.name)) and int(match[1]) > step:
            path.unlink()


def saved_steps(run: Path) -> list[int]:
    """The steps at which a run folder has averages, in rising order.

    Raises:
        UserError: there are none.
    """
    steps = sorted(int(match[1]) for path in (run / FOLDER).glob("*") if (match := FILE.fullmatch(path.name)))
    if not steps:
        raise UserError(f"{run} has no averages: train with --train.averages_every, such as '50 steps'")
    return steps


def reconstruct_ema(run: Path, std: float) -> tuple[dict[str, Tensor], float]:
    """Reconstruct the average of this relative standard deviation at the end of a run.

    Returns:
        The weights by name, float32, and the largest error in the cumulative weights of the steps.

    Raises:
        UserError: the folder has no averages, or one could not be read.
    """
    steps = saved_steps(run)
    shares, error = coefficients(steps, std)
    total: dict[str, Tensor] = {}
    for step, row in zip(steps, shares, strict=True):
        path = run / FOLDER / f"step-{step}.safetensors"
        try:
            open_file(path).close()  # a regular file
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                names = total.keys() | {key.partition("/")[2] for key in keys}
                if keys != {f"{each}/{name}" for each in TRACKED for name in names}:
                    raise ValueError("it lacks weights, or has others than the averages before it")
                for key in keys:
                    each, _, name = key.partition("/")
                    part = file.get_tensor(key).double() * row[TRACKED.index(float(each))]
                    if not torch.isfinite(part).all():
                        raise ValueError(f"{key} has values that are not finite")
                    total[name] = total[name] + part if name in total else part
        except (OSError, SafetensorError, ValueError, RuntimeError) as error_of_file:
            raise UserError(f"{path} could not be read: {error_of_file}") from error_of_file
    return {name: each.float() for name, each in total.items()}, error
