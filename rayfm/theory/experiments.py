"""The experiments of ``rayfm simulate``: what each computes, prints and draws.

matplotlib is imported where something is drawn, so that listing the experiments costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayfm.config import ConfigError, nearest
from rayfm.theory import adapter, heads, selection
from rayfm.theory.order_statistics import approximate_order_statistics, exact_order_statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0b84d8", "#e07b00", "#12a06f", "#c4529b", "#7a5fd0")
NOISES = ((0.5, 0.25), (1.0, 0.5), (2.0, 1.0))
"""(sigma_1, sigma_2) of the curves, in standard deviations of the true values."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What an experiment found."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    says: str
    """What to read from it, in a sentence or two."""
    panels: tuple[Callable[[Axes], None], ...]
    """Each draws on a pair of axes of its own."""


def one_stage(quick: bool, seed: int) -> Finding:
    """UKDSL section 3.1: a model's choices promise more than they hold."""
    worlds = [selection.Candidates(n=100, sigma_1=noise) for noise in (0.0, 0.5, 1.0, 2.0)]
    exact, approximate = exact_order_statistics(100), approximate_order_statistics(100)
    world = worlds[2]
    simulated = selection.simulate(world, range(1, 101), repetitions=2000 if quick else 20_000, seed=seed)
    best = selection.expected_value(worlds[0], exact)[:10].mean()
    rows = []
    for rank in (1, 2, 5, 10, 50, 100):
        promised, held = (
            of(world, exact)[rank - 1] for of in (selection.expected_prediction, selection.expected_value)
        )
        by_eq_1 = selection.expected_prediction(world, approximate)[rank - 1]
        found, half = simulated.value.cal_10[rank - 1], simulated.half.cal_10[rank - 1]
        expected = selection.closed_form(world, [rank]).cal_10[0]
        row = (by_eq_1, promised, held, promised - held)
        rows.append((str(rank), *(f"{v:.3f}" for v in row), f"{expected:.4f}", f"{found:.4f} ± {half:.4f}"))
    returns = [float(selection.expected_value(other, exact)[:10].mean() / best) for other in worlds]

    def promises(axes: Axes) -> None:
        ranks = np.arange(1, 101)
        for colour, other in zip(COLOURS, worlds, strict=False):
            label = f"error {other.sigma_1:g}"
            axes.plot(ranks, selection.expected_prediction(other, exact), color=colour, label=label)
            axes.plot(ranks, selection.expected_value(other, exact), color=colour, linestyle="--")
        axes.set(xscale="log", xlabel="rank by prediction", ylabel="CPM", title="Predicted (line) and true (dashed)")
        axes.legend(frameon=False)

    def bias(axes: Axes) -> None:
        ranks = np.arange(1, 101)
        for colour, other in zip(COLOURS, worlds, strict=False):
            axes.plot(ranks, selection.expected_bias(other, exact), color=colour, label=f"error {other.sigma_1:g}")
        axes.axhline(0, color="#8a8f98", linewidth=0.8)
        axes.set(xscale="log", xlabel="rank by prediction", ylabel="predicted - true", title="Bias by rank")

    return Finding(
        "one-stage",
        "UKDSL Eq. 1: an unbiased model is biased on what it picks (n = 100, error 1)",
        ("rank", "Eq. 1", "exact", "true", "bias", "calibration of the top", "simulated"),
        tuple(rows),
        "The first ranks are overrated, the last underrated, and both average out over all candidates. The noisier "
        f"the model, the less its ten choices are worth: {', '.join(f'{r:.1%}' for r in returns)} of the best possible "
        f"at errors {', '.join(f'{w.sigma_1:g}' for w in worlds)}.",
        (promises, bias),
    )


def two_stage(quick: bool, seed: int) -> Finding:
    """UKDSL section 3.2, Fig. 2: calibration of two stages on what the first passes on."""
    worlds = [selection.Candidates(n=1000, sigma_1=first, sigma_2=second) for first, second in NOISES]
    k = [10, 20, 50, 100, 200, 500, 1000]
    found = [selection.simulate(world, k, 100 if quick else 1000, seed) for world in worlds]
    expected = [selection.closed_form(world, k) for world in worlds]
    rows = []
    for world, value, form in zip(worlds, found, expected, strict=True):
        for place in (0, 3, 6):
            measured = [
                f"{getattr(value.value, name)[place]:.4f} ± {getattr(value.half, name)[place]:.4f}"
                for name in ("cal_12", "cal_10", "cal_20")
            ]
            rows.append(
                (f"{world.sigma_1:g}, {world.sigma_2:g}", str(k[place]), f"{form.cal_10[place]:.4f}", *measured)
            )

    def panel(name: str, title: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for colour, world, value, form in zip(COLOURS, worlds, found, expected, strict=False):
                label = f"errors {world.sigma_1:g}, {world.sigma_2:g}"
                axes.plot(k, getattr(form, name), color=colour, linewidth=1)
                half = 2 * getattr(value.half, name)
                axes.errorbar(k, getattr(value.value, name), half, color=colour, fmt="o", markersize=3, label=label)
            axes.axhline(1, color="#8a8f98", linewidth=0.8)
            axes.set(xscale="log", xlabel="k1", ylabel="calibration", title=title)

        return draw

    titles = {"cal_12": "a) cal(1, 2)", "cal_10": "b) cal(1, 0)", "cal_20": "c) cal(2, 0)"}

    def together(axes: Axes) -> None:
        for colour, value in zip(COLOURS, found, strict=False):
            for name, style in (("cal_12", "-"), ("cal_10", ":"), ("cal_20", "--")):
                axes.plot(k, getattr(value.value, name), style, color=colour)
        axes.axhline(1, color="#8a8f98", linewidth=0.8)
        axes.set(xscale="log", xlabel="k1", title="d) a) line, b) dotted, c) dashed")

    def with_legend(axes: Axes) -> None:
        panel("cal_12", titles["cal_12"])(axes)
        axes.legend(frameon=False)

    return Finding(
        "two-stage",
        "UKDSL Eq. 2 and Fig. 2: calibration on the first stage's choice (n = 1000)",
        ("errors", "k1", "closed form", "cal(1,2)", "cal(1,0)", "cal(2,0)"),
        tuple(rows),
        "Where the first stage picks, it overrates, and more the fewer it passes on; the second stage, which did not "
        "pick, is calibrated there, so that its predictions can correct the first. Lines are closed forms.",
        (with_legend, panel("cal_10", titles["cal_10"]), panel("cal_20", titles["cal_20"]), together),
    )


def separate_heads(quick: bool, seed: int) -> Finding:
    """ExFM theorem 3.1: a single head keeps its teachers' bias, an auxiliary head does not."""
    teachings = [
        heads.Teaching(units=units, truth_weight=truth, steps=1000 if quick else 6000)
        for units, truth in ((2, 0.5), (4, 0.5), (4, 0.25))
    ]
    found = [heads.descend(teaching, seed) for teaching in teachings]
    rows = tuple(
        (
            str(t.units - 1), f"{t.truth_weight:g}", f"{heads.single_head_bias(t):.4f}", f"{d.single[-1]:.4f}",
            f"{d.auxiliary[-1]:.2g}",
        )
        for t, d in zip(teachings, found, strict=True)
    )  # fmt: skip

    def panel(teaching: heads.Teaching, descent: heads.Descent, first: bool) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            axes.plot(descent.single, color=COLOURS[1], label="one head")
            axes.plot(descent.auxiliary, color=COLOURS[0], label="auxiliary heads")
            axes.axhline(heads.single_head_bias(teaching), color="#8a8f98", linestyle="--", label="closed form")
            title = f"teachers: {teaching.units - 1}, weight of the truth: {teaching.truth_weight:g}"
            axes.set(xlabel="step", yscale="log", ylim=(1e-6, 3), title=title)
            if first:
                axes.set_ylabel("distance from the truth")
                axes.legend(frameon=False)

        return draw

    panels = tuple(panel(t, d, i == 0) for i, (t, d) in enumerate(zip(teachings, found, strict=True)))
    return Finding(
        "heads",
        "ExFM theorem 3.1: where a student ends whose teachers are off by mu = 0.5",
        ("teachers", "weight of the truth", "one head, closed form", "one head", "auxiliary heads"),
        rows,
        "One head fits the mixture of labels and keeps its bias for ever. With a head for each label, the serving head "
        "goes on to the truth: the teachers' heads hold what is wrong with the teachers.",
        panels,
    )


def student_adapter(quick: bool, seed: int) -> Finding:
    """ExFM theorem 3.2: what the student adapter gains, and how it depends on alpha."""
    drifts = [adapter.Drift(inputs=64, adapter=units) for units in (4, 16)]
    outside = dataclasses.replace(drifts[0], outside=6.0)
    alpha = [0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0]
    repetitions = 30 if quick else 300
    found = [adapter.measure(drift, alpha, repetitions, seed) for drift in (*drifts, outside)]
    fine = np.geomspace(0.05, 100, 100)
    rows = []
    for drift, measured in zip((*drifts, outside), found, strict=True):
        for place in (0, 3, 4, 7):
            rows.append(
                (
                    f"{drift.inputs}, {drift.adapter}", f"{drift.outside:g}", f"{alpha[place]:g}",
                    f"{adapter.expected_gain(drift, np.array(alpha))[place]:.3f}",
                    f"{measured.gain[place]:.3f} ± {measured.gain_half[place]:.3f}",
                    f"{adapter.papers_gain(drift):.3f}", f"{adapter.largest_gain(drift):.3f}",
                )
            )  # fmt: skip

    def gains(axes: Axes) -> None:
        for colour, drift, measured in zip(COLOURS, drifts, found, strict=False):
            label = f"d = {drift.inputs}, s = {drift.adapter}"
            axes.plot(fine, adapter.expected_gain(drift, fine), color=colour, linewidth=1)
            axes.errorbar(
                alpha[1:], measured.gain[1:], measured.gain_half[1:], color=colour, fmt="o", markersize=3, label=label
            )
            axes.axhline(adapter.papers_gain(drift), color=colour, linestyle="--", linewidth=0.8)
            axes.axhline(adapter.largest_gain(drift), color=colour, linestyle=":", linewidth=0.8)
        axes.set(xscale="log", xlabel="alpha", ylabel="error without / with adapter")
        axes.set_title("Gain; (d/s)^(1/4) dashed, (d/s)^(1/2) dotted")
        axes.legend(frameon=False)

    def lost(axes: Axes) -> None:
        for colour, drift, measured, label in (
            (COLOURS[0], drifts[0], found[0], "all of the drift is learnable"),
            (COLOURS[3], outside, found[2], f"{outside.outside:g} of it is not"),
        ):
            axes.plot(fine, adapter.expected_error(drift, fine), color=colour, linewidth=1)
            axes.errorbar(
                alpha[1:], measured.error[1:], measured.half[1:], color=colour, fmt="o", markersize=3, label=label
            )
        axes.set(xscale="log", xlabel="alpha", ylabel="|w_V - w|", title="Drift beyond the adapter's reach")
        axes.legend(frameon=False)

    return Finding(
        "adapter",
        "ExFM theorem 3.2: error without the student adapter over the error with it",
        ("d, s", "unlearnable", "alpha", "closed form", "measured", "(d/s)^1/4", "(d/s)^1/2"),
        tuple(rows),
        "The gain grows with alpha towards (d/s)^(1/2); the paper's (d/s)^(1/4), a ratio of bounds, is passed on the "
        "way. Where much of the drift is beyond the adapter, a large alpha makes the student worse than none.",
        (gains, lost),
    )


EXPERIMENTS: dict[str, Callable[[bool, int], Finding]] = {
    "one-stage": one_stage,
    "two-stage": two_stage,
    "heads": separate_heads,
    "adapter": student_adapter,
}


def simulate(
    names: tuple[str, ...], folder: str | Path, quick: bool = False, seed: int = 0
) -> list[tuple[Finding, Path]]:
    """Run experiments and draw each into ``<folder>/<name>.png``.

    Args:
        names: of the experiments; none: all.
        folder: made where it is not there.
        quick: with few repetitions.
        seed: of the draws.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"no experiment {name!r}{nearest(name, list(EXPERIMENTS))}")
    found = []
    for name in names or tuple(EXPERIMENTS):
        finding = EXPERIMENTS[name](quick, seed)
        found.append((finding, draw(finding, Path(folder) / f"{name}.png")))
    return found


def draw(finding: Finding, path: Path) -> Path:
    """Draw an experiment's panels side by side, at most two in a row where there are four."""
    from matplotlib.figure import Figure

    count = len(finding.panels)
    columns = 2 if count in (2, 4) else count
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-count // columns)), layout="constrained")
    for position, panel in enumerate(finding.panels):
        axes = figure.add_subplot(-(-count // columns), columns, position + 1)
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
