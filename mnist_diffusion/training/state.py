"""The state of training: weights, their average and the optimizer, and one update of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from mnist_diffusion.config import RunConfig
from mnist_diffusion.data.dataset import ImageData, draw_batch
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.diffusion.network import PatchedUNet, patch_size_of
from mnist_diffusion.diffusion.objective import Batch, Objective
from mnist_diffusion.run_folder.checkpoint import Checkpoint, CheckpointError, optimizer_state, restore_optimizer
from mnist_diffusion.run_folder.metrics import NOISE_LEVELS
from mnist_diffusion.seeds import mixed_seed
from mnist_diffusion.training.averages import PowerAverages
from mnist_diffusion.training.optimizer import build_optimizer


class TrainState:
    """A network in training, with its average and its optimizer.

    Args:
        config: the run.
        accelerator: device, precision and processes.
        data: the images.
        unet: the network, its weights as they start.
        objective: what it learns.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, data: ImageData, unet: UNet2DModel, objective: Objective
    ):
        self.config, self.accelerator, self.data, self.objective = config, accelerator, data, objective
        unet.to(accelerator.device)
        if config.train.channels_last:
            unet.to(memory_format=torch.channels_last)
        self.averaged_unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.ema = EMAModel(unet.parameters(), decay=config.train.ema_decay, foreach=True)
        self.averages = None if config.train.averages_every is None else PowerAverages(unet)
        self.unet, patches = unet, patch_size_of(unet, channels=data.channels)
        optimizer = build_optimizer(unet, config.train)
        model = PatchedUNet(unet, patches)
        if config.train.compile:
            model.compile(**({"mode": "reduce-overhead"} if accelerator.device.type == "cuda" else {}))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.averaged_model = PatchedUNet(self.averaged_unet, patches).eval()
        # The first step whose loss or gradient was not finite, -1 for none: read when the run reports or saves.
        self.first_bad_step = torch.tensor(-1, device=accelerator.device)
        # Summed loss and count of images by noise level, since it was last read.
        self.by_noise = torch.zeros(2, NOISE_LEVELS, device=accelerator.device)

    def update(self, step: int, learning_rate: float) -> dict[str, Tensor]:
        """Make one optimizer update, the one after `step` others.

        If `train.on_non_finite` is `skip`, an update whose loss or gradient is not finite on any process leaves
        weights, average and optimizer as they were.

        Returns:
            Scalars on the device: `loss`, this process's mean, and `grad_norm` before clipping; `skipped`, 0 or 1,
            if such updates are skipped.
        """
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        share, rank = config.data.batch_size // accelerator.num_processes, accelerator.process_index
        mine = slice(rank * share, (rank + 1) * share)
        images, labels = draw_batch(self.data.train, config.data, seed=config.train.seed, step=step, part=mine)
        # Drawn for the global batch, so that what an image gets does not depend on the number of processes.
        shape = (config.data.batch_size, *images.shape[1:])
        draws = self.objective.draw(shape, seed=config.train.seed, step=step, device=accelerator.device)
        batch = self._batch(images, labels, *(each[mine] for each in draws))
        losses: list[Tensor] = []
        micro_batches = config.train.gradient_accumulation_steps
        size = share // micro_batches
        self.model.train()
        for micro in range(micro_batches):
            part, last = batch[micro * size : (micro + 1) * size], micro == micro_batches - 1
            torch.manual_seed(mixed_seed(config.train.seed, "dropout", step, micro, rank))
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.objective.loss(self.model, part)
                accelerator.backward(loss.mean() / micro_batches)
            self._count_by_noise(loss.detach(), part.timesteps)
            losses.append(loss.detach().mean())
        measured = {"loss": torch.stack(losses).mean()}
        limit = math.inf if config.train.max_grad_norm is None else config.train.max_grad_norm
        measured["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), limit).detach()
        bad = self._is_bad(measured)
        self.first_bad_step = torch.where((self.first_bad_step < 0) & bad, step + 1, self.first_bad_step)
        skipped = False
        if config.train.on_non_finite == "skip":
            skipped = bool(accelerator.reduce(bad.float(), reduction="sum"))
            measured["skipped"] = torch.tensor(float(skipped), device=accelerator.device)
        if not skipped or accelerator.scaler is not None:  # a gradient scaler skips by itself, and must be told
            self.optimizer.step()
        if not skipped:
            self._update_average(step + 1)
        if self.averages is not None:
            self.averages.update(self.unet.parameters(), step + 1)
        self.optimizer.zero_grad()
        return measured

    def _count_by_noise(self, losses: Tensor, timesteps: Tensor) -> None:
        """Add losses `[b]` to those of their noise levels."""
        levels = timesteps * NOISE_LEVELS // self.objective.num_timesteps
        self.by_noise[0].index_add_(0, levels, losses.float())
        self.by_noise[1].index_add_(0, levels, torch.ones_like(losses, dtype=torch.float32))

    def take_loss_by_noise(self) -> list[float | None] | None:
        """Mean loss since the last call at each tenth of the timesteps, the least noisy first, over all processes.

        None if the objective has fewer than ten timesteps; None for a tenth that no image fell into.
        """
        if self.objective.num_timesteps < NOISE_LEVELS:
            return None
        sums, counts = self.accelerator.reduce(self.by_noise, reduction="sum").tolist()
        self.by_noise = torch.zeros_like(self.by_noise)
        pairs = zip(sums, counts, strict=True)
        return [total / count if count and math.isfinite(total) else None for total, count in pairs]

    def _is_bad(self, measured: Mapping[str, Tensor]) -> Tensor:
        """Whether loss or gradient is not finite; the loss alone with a gradient scaler, which may overflow."""
        names = ("loss", "grad_norm") if self.accelerator.scaler is None else ("loss",)
        return ~torch.isfinite(torch.stack([measured[name] for name in names])).all()

    def _batch(self, images: Tensor, labels: Tensor, *draws: Tensor) -> Batch:
        images, labels = (each.to(self.accelerator.device, non_blocking=True) for each in (images, labels))
        return Batch(to_model_range(images), labels, *draws)

    def _update_average(self, steps_done: int) -> None:
        if steps_done <= self.config.train.ema_start_step:
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.unet.parameters()]
        else:
            self.ema.step(self.unet.parameters())

    def average(self) -> UNet2DModel:
        """The network with the averaged weights, in evaluation mode; it is another copy than the one being trained."""
        self.ema.copy_to(self.averaged_unet.parameters())
        return self.averaged_unet

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Loss of the averaged weights on held-out images: the same images with the same draws each time.

        The batch size does not depend on the run, so that runs can be compared.
        """
        self.average()
        train, device, total = self.config.train, self.accelerator.device, 0.0
        chosen = self.data.test.spread(train.num_eval_images)
        for index, (images, labels) in enumerate(zip(*(each.split(500) for each in chosen), strict=True)):
            draws = self.objective.draw(tuple(images.shape), seed=train.seed, step=index, device=device, held_out=True)
            batch = self._batch(images, labels, *draws)
            total += float(self.objective.loss(self.averaged_model, batch).mean()) * len(images)
        return total / len(chosen[1])

    def passes(self, count: int) -> None:
        """A forward and a backward pass over `count` images of the first batch, which changes nothing."""
        images, labels = draw_batch(self.data.train, self.config.data, seed=0, step=0, part=slice(0, count))
        draws = self.objective.draw(tuple(images.shape), seed=0, step=0, device=self.accelerator.device)
        self.model.train()
        with self.accelerator.no_sync(self.model):
            self.accelerator.backward(self.objective.loss(self.model, self._batch(images, labels, *draws)).mean())
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def _scaler_state(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def _restore_scaler(self, state: dict[str, Any] | None) -> None:
        if self.accelerator.scaler is not None and state is not None:
            self.accelerator.scaler.load_state_dict(state)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything to resume from: tensors by file and name, and what JSON holds."""
        moments, groups = optimizer_state(self.optimizer)
        names = [name for name, _ in self.unet.named_parameters()]
        average = dict(zip(names, self.ema.shadow_params, strict=True))
        tensors = {"unet": dict(self.unet.state_dict()), "ema": average, "optimizer": moments}
        if self.averages is not None:
            tensors["averages"] = self.averages.tensors()
        steps = self.ema.optimization_step
        return tensors, {"optimizer_groups": groups, "ema_step": steps, "grad_scaler": self._scaler_state()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint.

        Raises:
            CheckpointError: it has no averages to go on with.
        """
        tensors = checkpoint.tensors
        if self.averages is not None:
            if "averages" not in tensors:
                asked = f"train.averages_every={self.config.train.averages_every!r}"
                raise CheckpointError(f"{asked} needs averages from the first step on, and {checkpoint.path} has none")
            self.averages.restore(tensors["averages"])
        self.unet.load_state_dict(tensors["unet"])
        with torch.no_grad():
            for (name, _), shadow in zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True):
                shadow.copy_(tensors["ema"][name])
        self.ema.optimization_step = checkpoint.state["ema_step"]
        restore_optimizer(self.optimizer.optimizer, tensors["optimizer"], checkpoint.state["optimizer_groups"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.train.weight_decay
        self._restore_scaler(checkpoint.state["grad_scaler"])
