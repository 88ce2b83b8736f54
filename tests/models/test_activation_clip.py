from __future__ import annotations

import pytest
import torch
from model_batches import SCHEMA, TASKS, random_batch, small_config, small_model
from torch import nn

from rayfm.config import ConfigError
from rayfm.export.served import export_model
from rayfm.models import build_model
from rayfm.models.activations import clip_activations
from rayfm.models.mlp import MLP


def test_a_clipped_relu_by_hand() -> None:
    layers = nn.Sequential(nn.Identity(), nn.ReLU())
    assert clip_activations(layers, 2.0) == 1
    x = torch.tensor([-1.0, 0.5, 1.5, 3.0], requires_grad=True)
    out = layers(x)
    assert out.tolist() == [0.0, 0.5, 1.5, 2.0]
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0], "no gradient beyond the limits"


def test_every_layer_of_a_model_is_clipped() -> None:
    """Weights a thousand times too large: without the limit a representation is in the thousands."""
    clipped, free = (small_model("dcnv2", activation_clip=clip) for clip in (3.0, None))
    for model in (clipped, free):
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, MLP):
                    for weight in part.parameters():
                        weight.mul_(1000.0)
    seen: list[float] = []
    for part in clipped.modules():
        if isinstance(part, nn.Hardtanh):
            part.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().max())))
    assert not any(isinstance(part, nn.ReLU) for part in clipped.modules())
    clipped(random_batch())
    assert len(seen) == 2, "one for each hidden layer"
    assert max(seen) == 3.0
    assert float(free(random_batch()).representation.detach().max()) > 1000


def test_it_neither_adds_nor_renames_a_parameter() -> None:
    clipped, free = (small_model("deepfm", activation_clip=clip) for clip in (6.0, None))
    assert list(clipped.state_dict()) == list(free.state_dict())


def test_the_served_model_is_clipped_too() -> None:
    config = small_config("dlrm", activation_clip=0.05)
    model = build_model(config, SCHEMA, TASKS, seed=3).eval()
    served = export_model(config, SCHEMA, TASKS, model.state_dict())
    free = export_model(small_config("dlrm"), SCHEMA, TASKS, model.state_dict())
    batch = random_batch()
    with torch.no_grad():
        expected = model(batch).logits
    for task, logit in served.logits(batch).items():
        torch.testing.assert_close(logit, expected[task])
        assert not torch.allclose(free.logits(batch)[task], expected[task]), "at this limit it makes a difference"


def test_a_model_without_activations_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation_clip: fm has no ReLU to clip; leave the key out"):
        small_model("fm", activation_clip=6.0)
