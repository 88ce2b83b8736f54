"""One run of FuxiCTR: ``PYTHON -m benchmarks.others.fuxictr_side prepare|train CASE [SEED LR]``, CASE as JSON.

PYTHON has FuxiCTR, and need not have rayfm. Encoding, data loader, layers, training loop, optimiser, clipping and
metrics are FuxiCTR's own. Two things are not. Its two models lie in the model zoo of its repository, not in its
package, and give each dense feature an embedding; ours are put together of the same layers, with rayfm's inputs, so
that both sides compute the same. And nothing is evaluated or loaded between the last step and the held-out rows.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.preprocess.build_dataset import init_ray
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from torch import Tensor, nn

from benchmarks.others.phases import say

LABEL = "click"
PREFETCH = 1
"""Batches that its loader reads ahead; by default."""


class Processor(FeatureProcessor):  # type: ignore[misc]
    """The encoder, with a logarithm of the dense features, which it then scales to [0, 1] itself, and lists as text."""

    def log1p(self, name: str) -> pl.Expr:
        return (pl.col(name) + 1.0).log()

    def joined(self, name: str) -> pl.Expr:
        return pl.col(name).cast(pl.List(pl.String)).list.join("^").fill_null("")


def processor(case: dict[str, Any]) -> FeatureProcessor:
    """The encoder of a case."""
    columns: list[dict[str, Any]] = []
    for column in case["columns"]:
        if column["kind"] == "dense":
            scaled = {"preprocess": f"log1p({column['name']})", "normalizer": "MinMaxScaler"}
            columns.append({"dtype": "float", "type": "numeric", **scaled})
        elif column["kind"] == "sparse":
            columns.append({"dtype": column["type"], "type": "categorical"})
        else:
            # Averaged, as rayfm's lists are. Its own way to a list's text leaves nulls, which its tokenizer refuses.
            columns.append({"dtype": "list", "type": "sequence", "preprocess": f"joined({column['name']})"})
        columns[-1] |= {"name": column["name"], "active": True}
    label = {"name": LABEL, "active": True, "dtype": "float"}
    return Processor(columns, label, dataset_id="fuxictr", data_root=case["data"])


class Inputs(BaseModel):  # type: ignore[misc]
    """What both models share: the embeddings, and the values of the dense features beside them."""

    def __init__(self, feature_map: FeatureMap, case: dict[str, Any], learning_rate: float) -> None:
        super().__init__(
            feature_map, model_id=case["model"], verbose=0, metrics=["AUC", "logloss"], model_root=case["data"]
        )
        self.embedding_layer = FeatureEmbedding(feature_map, case["embedding_dim"])
        self.embedded = [name for name, spec in feature_map.features.items() if spec["type"] != "numeric"]
        self.dense = [name for name, spec in feature_map.features.items() if spec["type"] == "numeric"]
        self.input_dim = len(self.embedded) * case["embedding_dim"] + len(self.dense)
        self.build(feature_map, case)
        self.compile("adam", "binary_crossentropy", learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def build(self, feature_map: FeatureMap, case: dict[str, Any]) -> None:
        """Make the layers."""
        raise NotImplementedError

    def flat(self, X: dict[str, Tensor], embeddings_BFE: Tensor) -> Tensor:
        """The embeddings of the ids side by side, then the dense features: ``[B, I]``."""
        dense = [X[name].float().view(-1, 1) for name in self.dense]
        return torch.cat([embeddings_BFE.flatten(1), *dense], dim=1)

    def eval_step(self) -> None:
        """Called after an epoch's last step; training ends here."""
        say("stop", "train", self.trained_rows)
        self.save_weights(self.checkpoint)  # which `fit` loads


class DCNv2(Inputs):
    """The parallel structure."""

    def build(self, feature_map: FeatureMap, case: dict[str, Any]) -> None:
        for name in self.dense:
            del self.embedding_layer.embedding_layer.embedding_layers[name]  # not read
        self.crossnet = CrossNetV2(self.input_dim, case["cross_layers"])
        self.deep = MLP_Block(self.input_dim, case["hidden"])
        self.fc = nn.Linear(self.input_dim + case["hidden"][-1], 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        X = self.get_inputs(inputs)
        x_BI = self.flat(X, self.embedding_layer(X))
        logits = self.fc(torch.cat([self.crossnet(x_BI), self.deep(x_BI)], dim=1))
        return {"y_pred": self.output_activation(logits)}


class DeepFM(Inputs):
    """The machine has a factor vector for each dense feature; the MLP reads its value."""

    def build(self, feature_map: FeatureMap, case: dict[str, Any]) -> None:
        self.fm = FactorizationMachine(feature_map)
        self.deep = MLP_Block(self.input_dim, case["hidden"], output_dim=1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        X = self.get_inputs(inputs)
        vectors = self.embedding_layer.embedding_layer(X)
        factors_BFE = torch.stack([vectors[name] for name in (*self.dense, *self.embedded)], dim=1)
        x_BI = self.flat(X, factors_BFE[:, len(self.dense) :])
        return {"y_pred": self.output_activation(self.fm(X, factors_BFE) + self.deep(x_BI))}


MODELS = {"dcnv2": DCNv2, "deepfm": DeepFM}


def prepare(case: dict[str, Any]) -> None:
    """Build the vocabularies on the training part and encode both parts."""
    init_ray()
    data = Path(case["data"])
    say("start", "prepare")
    build_dataset(
        processor(case),
        train_data=str(data / "train"),
        valid_data=str(data / "test"),
        data_format="parquet",
        data_block_size=case["block_rows"],
    )
    say("stop", "prepare", sum(case["rows"].values()))
    say("result", "{}")


def train(case: dict[str, Any], seed: int, learning_rate: float) -> None:
    """One epoch over the training part in its order, then the held-out part."""
    seed_everything(seed)
    encoded = Path(case["data"]) / "fuxictr"
    feature_map = FeatureMap("fuxictr", str(encoded))
    feature_map.load(str(encoded / "feature_map.json"), {"embedding_dim": case["embedding_dim"]})
    model: Any = MODELS[case["model"]](feature_map, case, learning_rate)
    model.trained_rows = case["rows"]["train"]
    suffix = "" if case["block_rows"] else ".parquet"
    loaders = RankDataLoader(
        feature_map,
        stage="train",
        train_data=str(encoded / f"train{suffix}"),
        valid_data=str(encoded / f"valid{suffix}"),
        batch_size=case["batch"],
        shuffle=False,
        data_format="parquet",
        num_workers=PREFETCH,
    )
    say("start", "train")
    model.fit(loaders[0], epochs=1)
    say("start", "predict")
    found = model.evaluate(loaders[1])
    say("stop", "predict", case["rows"]["test"])
    tables = sum(p.numel() for n, p in model.named_parameters() if "embedding_layer" in n)
    result = {
        "auc": found["AUC"],
        "logloss": found["logloss"],
        "table_parameters": tables,
        "dense_parameters": sum(p.numel() for p in model.parameters()) - tables,
    }
    say("result", json.dumps(result))


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    case = json.loads(sys.argv[2])
    if sys.argv[1] == "prepare":
        prepare(case)
    else:
        train(case, int(sys.argv[3]), float(sys.argv[4]))


if __name__ == "__main__":
    main()
