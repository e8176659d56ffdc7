"""charlieoneill11/sae-circuits (arXiv 2405.12522): the autoencoder of head outputs, and the scores of its codes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from attnlab.hub.official import official
from attnlab.lens.circuits.autoencoder import (
    SparseAutoencoder,
    node_scores,
    roc_auc,
    train_step,
    unique_codes,
    unique_pairs,
)

_NAMES = {
    "tied_bias": "bias",
    "encoder.1.weight": "encoder",
    "encoder.1.bias": "encoder_bias",
    "decoder.0.weight": "decoder",
}


@official("charlieoneill11/sae-circuits", "SparseAutoencoder", ours=SparseAutoencoder)
class HeadAutoencoder:
    """Its state holds the shared bias three times."""

    @staticmethod
    def rename(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_NAMES[name]: value for name, value in params.items() if name in _NAMES}

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> tuple[SparseAutoencoder, dict[str, Any]]:
        features, dim = params["encoder.1.weight"].shape
        module = SparseAutoencoder(dim, features)
        module.load_state_dict(HeadAutoencoder.rename(params))
        module.normalise_()
        return module, arguments

    @staticmethod
    def run(module: tuple[SparseAutoencoder, dict[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        (model, arguments), x = module, inputs["heads"]
        sparsity, layers = arguments["lam"], arguments["layers"]
        rebuilt, features = model(x)
        loss = model.loss(x, sparsity)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named = dict(zip(parameters, gradients, strict=True))

        trained = deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameters(), lr=arguments["lr"])
        for _ in range(2):
            train_step(trained, optimizer, x, sparsity)

        codes = model.codes(x)
        positive, negative = codes.chunk(2)
        nodes = node_scores(positive, negative)
        return {
            "learned": features,
            "decoded": rebuilt,
            "loss": loss,
            **{f"grad.{theirs}": named[ours] for theirs, ours in _NAMES.items()},
            "loss_after_2_adam": trained.loss(x, sparsity),
            "codes": codes,
            "unique_pos": unique_codes(positive, negative).view(layers, -1),
            "unique_neg": unique_codes(negative, positive).view(layers, -1),
            "unique_pos_norm": unique_codes(positive, negative, normalise=True).view(layers, -1),
            "node_pred": nodes,
            "node_pred_across_layer": node_scores(positive, negative, layers=layers),
            "edge_unique": unique_pairs(positive, negative),
            "edge_unique_norm": unique_pairs(positive, negative, normalise=True),
            "roc_auc": torch.tensor(roc_auc(nodes, inputs["ground_truth"])),
        }
