"""Clippy (Tang et al. 2023, Algorithm 1), by hand, in a training that needs it, and through checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import write_store
from pydantic import ValidationError
from torch import nn

from rayfm.models.base import MODELS
from rayfm.training.clippy import ClippyAdagrad, ClippyAdam, clip_factors
from rayfm.training.config import ClippyConfig, DenseOptimizer, TableOptimizer
from rayfm.training.learner import LearnerConfig
from rayfm.training.loop import TrainingLoop
from rayfm.training.optim import dense_optimizer
from rayfm.training.spec import TrainerSpec


def parameter(values: list[float], gradient: list[float]) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values))
    made.grad = torch.tensor(gradient)
    return made


@pytest.mark.parametrize(
    ("value", "update", "expected"),
    [
        ([1.0, -2.0], [0.1, 0.1], 1.0),  # limits 0.51 and 1.01: neither binds
        ([1.0, -2.0], [1.02, 0.1], 0.5),  # 0.51 / 1.02
        ([1.0, -2.0], [1.02, -10.1], 0.1),  # 1.01 / 10.1 binds, whatever the sign
        ([0.0, 4.0], [0.04, 0.0], 0.25),  # at 0 only the absolute part is left; an element that stays has no say
        ([0.0], [0.0], 1.0),
    ],
)
def test_the_factor_is_the_tightest_element_s(value: list[float], update: list[float], expected: float) -> None:
    (factor,) = clip_factors([torch.tensor(value)], [torch.tensor(update)], relative=0.5, absolute=0.01)
    assert float(factor) == pytest.approx(expected, rel=1e-6)


def test_one_step_of_adagrad_with_clippy() -> None:
    """G = g^2 = (9, 16), so r = g / sqrt(G) = (1, -1); rate 2 moves (2, -2); limits 0.51 and 1.01: sigma 0.255."""
    weight = parameter([1.0, -2.0], [3.0, -4.0])
    ClippyAdagrad([weight], lr=2.0, eps=1e-12).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 - 0.255 * 2.0, -2.0 + 0.255 * 2.0]))


def test_the_second_step_divides_by_both_gradients() -> None:
    """The sum takes up the whole gradient, however short the step: G = 9 + 16 = 25, r = 4 / 5, unclipped at 0.1."""
    weight = parameter([1.0], [3.0])
    optimizer = ClippyAdagrad([weight], lr=2.0, eps=1e-12)
    optimizer.step()
    after = weight.item()
    assert after == pytest.approx(1.0 - 0.51)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.tensor([4.0])
    optimizer.step()
    assert weight.item() == pytest.approx(after - 0.1 * 0.8)


def test_one_step_of_adam_with_clippy() -> None:
    """Adam's first step is the sign of the gradient times the rate: (2, -2), and sigma is 0.51 / 2."""
    weight = parameter([1.0, -2.0], [3.0, -4.0])
    ClippyAdam([weight], lr=2.0, eps=1e-12).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.49, -1.49]))


def test_each_tensor_has_a_factor_of_its_own() -> None:
    clipped, free = parameter([1.0], [1.0]), parameter([100.0], [1.0])
    ClippyAdagrad([clipped, free], lr=2.0, eps=1e-12).step()
    assert clipped.item() == pytest.approx(1.0 - 0.51)
    assert free.item() == pytest.approx(98.0)


@pytest.mark.parametrize(("clipped", "plain"), [(ClippyAdagrad, torch.optim.Adagrad), (ClippyAdam, torch.optim.Adam)])
def test_within_the_limits_it_is_the_base_method_to_the_last_bit(clipped: type, plain: type) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(50, generator=generator), torch.randn(20, 50, generator=generator)
    found = []
    for kind in (clipped, plain):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=1e-4, foreach=True)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_a_parameter_without_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(2))
    ClippyAdagrad([weight], lr=1.0).step()
    assert torch.equal(weight.detach(), torch.ones(2))


def test_the_config_says_which_optimiser() -> None:
    weight = nn.Parameter(torch.ones(2))

    def made(**config: object) -> torch.optim.Optimizer:
        return dense_optimizer([weight], DenseOptimizer.model_validate(config))

    assert type(made()) is torch.optim.Adam
    assert type(made(type="adagrad")) is torch.optim.Adagrad
    assert type(made(clippy={})) is ClippyAdam
    clippy = made(type="adagrad", initial_accumulator=0.1, clippy={"relative": 0.25, "absolute": 0.5})
    assert isinstance(clippy, ClippyAdagrad)
    assert (clippy.relative, clippy.absolute) == (0.25, 0.5)
    assert clippy.defaults["initial_accumulator_value"] == 0.1
    assert ClippyConfig() == ClippyConfig(relative=0.5, absolute=0.01), "the paper's values"


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad", "sgd"])
def test_fused_tables_cannot_be_clipped(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"clippy does not go with {kind}, whose fused kernel"):
        TableOptimizer.model_validate({"type": kind, "clippy": {}})
    assert TableOptimizer.model_validate({"type": "adam", "clippy": {}}).clippy == ClippyConfig()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "adagrad", "betas": (0.5, 0.9)}, "betas is of adam, and the type is adagrad"),
        ({"initial_accumulator": 0.1}, "initial_accumulator is of adagrad, and the type is adam"),
        ({"clippy": {"absolute": 0.0}}, "greater than 0"),
    ],
)
def test_keys_of_the_other_method_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DenseOptimizer.model_validate(config)


# -- in a training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), list(runs.PERIODS), impressions=2000).root


def deep(store: Path, run_dir: Path, **training: object) -> TrainerSpec:
    """A deep multi-task model: six hidden layers shared by a classification and a regression."""
    config = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": 8, "hidden": [64] * 6})
    learner = LearnerConfig(model_name="deep", variant="none", seed=1, model=config, tasks=("click", "watch"))
    return runs.spec(store, run_dir, learner, **training).model_copy(update={"replicates": 0})


def dense(clippy: dict | None, **changes: object) -> dict:
    return {"type": "adagrad", "lr": 10.0, "initial_accumulator": 0.1, "clippy": clippy, **changes}


def test_at_a_rate_where_adagrad_diverges_clippy_learns(store: Path, tmp_path: Path) -> None:
    """Same seed, same data, same rate. By section 2 of Khani et al. this is what Clippy is for."""
    found = {}
    for name, clippy in (("plain", None), ("clippy", {})):
        spec = deep(store, tmp_path / name, dense=dense(clippy))
        runs.train_here(spec)
        losses = runs.losses(spec)
        found[name] = {
            task: [losses[period, f"deep.none.1/supervised/{task}"] for period in runs.PERIODS]
            for task in ("click", "watch")
        }
    assert min(found["plain"]["click"]) > 1e6, "a coin toss costs 0.693"
    assert min(found["plain"]["watch"]) > 1e6
    click, watch = found["clippy"]["click"], found["clippy"]["watch"]
    assert click[-1] < click[0] < 0.70, "better than a coin toss, and getting better"
    assert click[-1] < 0.69
    assert watch[-1] < watch[0] < 2.0


def test_one_and_two_workers_take_the_same_steps(store: Path, tmp_path: Path) -> None:
    """Dense layers and a replicated table: the factors are of the reduced gradients, so the same on every rank."""

    def spec(name: str, clippy: dict | None) -> TrainerSpec:
        table = {"type": "adam", "lr": 0.1, "clippy": clippy}
        made = deep(store, tmp_path / name, dense=dense(clippy, lr=0.1), table_overrides={"user": table})
        return made.model_copy(update={"periods": runs.PERIODS[:2]})

    tight = {"relative": 0.05, "absolute": 0.001}
    one, two, free = spec("one", tight), spec("two", tight), spec("free", None)
    runs.train_here(one)
    runs.train_here(free)
    runs.train_on(two, 2)
    expected, found, unclipped = runs.losses(one), runs.losses(two), runs.losses(free)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
        assert unclipped[key] != pytest.approx(value, rel=1e-2), "the limits bind"


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_a_killed_training_takes_up_the_optimisers_state(store: Path, tmp_path: Path, kind: str) -> None:
    options = {"dense": {"type": kind, "lr": 0.05, "clippy": {}}, "checkpoint_every": 10}
    unbroken = deep(store, tmp_path / "unbroken", **options)
    runs.train_here(unbroken)
    broken = deep(store, tmp_path / "broken", **options)

    class Killed(BaseException):
        pass

    steps = iter(range(45))

    def report(self: TrainingLoop, period: str, step: int, of: int, phase: str) -> None:
        if phase == "train" and next(steps, None) is None:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_report", report)
        with pytest.raises(Killed):
            runs.train_here(broken)
    assert not (broken.folder / "periods" / f"{runs.PERIODS[1]}.json").exists()
    runs.train_here(broken)
    assert runs.losses(broken) == pytest.approx(runs.losses(unbroken), rel=1e-6)
