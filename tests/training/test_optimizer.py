"""Muon beside torch's own, and AdamW for what is no matrix."""

import torch
from torch import nn

from mnist_diffusion.config import ModelConfig, TrainConfig
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.training.optimizer import build_optimizer


def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adamw() -> None:
    model = ModelConfig(block_out_channels=(8, 16), norm_num_groups=4)
    networks = [build_unet(model, image_size=8, channels=1, num_classes=3) for _ in range(2)]
    ours, theirs = (dict(network.named_parameters()) for network in networks)
    optimizer = build_optimizer(networks[0], TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1))
    matrices = {name for name, each in theirs.items() if each.ndim > 1 and name != "class_embedding.weight"}
    flat = {name: nn.Parameter(theirs[name].detach().flatten(1).clone()) for name in matrices}
    rest = [each for name, each in theirs.items() if name not in matrices]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon(flat.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in ours.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad, theirs[name].grad = gradient, gradient.clone()
            if name in matrices:
                flat[name].grad = gradient.flatten(1).clone()
        for each in (optimizer, adamw, muon):
            each.step()
    for name, parameter in ours.items():
        if name in matrices:  # torch's works in bfloat16
            torch.testing.assert_close(parameter.flatten(1), flat[name], atol=2e-3, rtol=0)
            assert (parameter.flatten(1) - flat[name]).norm() < 0.03 * (parameter - theirs[name]).norm()
        else:
            assert torch.equal(parameter, theirs[name])
