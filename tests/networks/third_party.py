"""A network module as somebody else might write it: the protocol's required part, and of the optional calls only ``prepare_network``."""

from __future__ import annotations

import torch
from torch import nn


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    return Bias(multiplier)


class Bias(nn.Module):
    """Adds one trained number to what the first Linear gives."""

    def __init__(self, multiplier: float):
        super().__init__()
        self.multiplier = multiplier
        self.shift = nn.Parameter(torch.zeros(()))

    def prepare_network(self, args):
        assert args.network_module == "tests.networks.third_party" and args.gradient_accumulation_steps == 1

    def apply_to(self, text_encoder, unet, train_text_encoder, train_unet):
        layer = next(module for module in unet.modules() if isinstance(module, nn.Linear))
        frozen = layer.forward
        layer.forward = lambda x: frozen(x) + self.shift * self.multiplier

    def load_weights(self, file):
        return self.load_state_dict(torch.load(file, weights_only=True))

    def enable_gradient_checkpointing(self):
        """Nothing to recompute."""

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate):
        return [{"params": [self.shift], "lr": unet_lr or learning_rate}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        torch.save(self.state_dict(), file)
