"""A LoRA of somebody else's, for text encoder and denoiser: float32 Linears, relying on autocast; each layer's forward is replaced
by a closure."""

from __future__ import annotations

import torch
from torch import nn


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    models = [*text_encoder, unet]
    layers = [layer for model in models for path, layer in model.named_modules() if path.endswith("q_proj")]
    if "remember_weights" in kwargs:
        kwargs["weights"] = [layer.weight.cpu() for layer in layers]  # as LyCORIS does for DoRA
    return Network(layers, network_dim or 4)


class Network(nn.Module):
    def __init__(self, layers: list[nn.Linear], rank: int):
        super().__init__()
        self.layers = [*layers]  # not this module's own
        self.downs = nn.ModuleList(nn.Linear(layer.in_features, rank, bias=False) for layer in layers)
        self.ups = nn.ModuleList(nn.Linear(rank, layer.out_features, bias=False) for layer in layers)
        for up in self.ups:
            nn.init.zeros_(up.weight)

    def apply_to(self, text_encoder, unet, train_text_encoder, train_unet):
        for layer, down, up in zip(self.layers, self.downs, self.ups, strict=True):
            layer.forward = adapted(layer.forward, down, up)

    def enable_gradient_checkpointing(self):
        """Nothing to recompute."""

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate):
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        torch.save(self.state_dict(), file)


def adapted(frozen, down, up):
    return lambda x: frozen(x) + up(down(x))
