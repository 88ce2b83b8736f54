"""``rayfm``: the command line. Each command is a few lines over the Python function of the same name.

Heavy imports (torch, Ray) happen inside the commands: ``rayfm --help`` answers in a fraction of a second.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rayfm.cli import checkpoints, labels, nearline, snapshots
from rayfm.cli.augment import augment
from rayfm.cli.plan import plan
from rayfm.cli.runs import RunFolder
from rayfm.cli.submit import submit
from rayfm.quiet import collect_less

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train large recommender teachers on Ray, let them label what their students see, distil the labels into "
    "the models that serve.",
)
config_app = typer.Typer(no_args_is_help=True, help="Inspect and check configurations.")
app.add_typer(config_app, name="config")
app.add_typer(snapshots.app, name="snapshots")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(labels.app, name="labels")
app.add_typer(nearline.app, name="nearline")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set seeds=[1,2,3]; @FILE lays a YAML file over all."
    ),
]
Data = Annotated[str | None, typer.Option("--data", metavar="FOLDER", help="Where the source's logs are.")]
Periods = Annotated[list[str] | None, typer.Option("--period", help="Only this period (may be given several times).")]


def _load(path: Path, overrides: list[str] | None, data: str | None) -> Any:
    from rayfm.quiet import quiet_libraries

    quiet_libraries()
    from rayfm.pipeline.config import load_config

    return load_config(path, overrides, data)


@app.command()
def run(
    config: ConfigFile,
    set_: Overrides = None,
    data: Data = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove a run of this name first.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with every new complete period, until SIGTERM or Ctrl-C.")
    ] = False,
) -> None:
    """Run the whole pipeline: prepare, train, label, distil, evaluate, report."""
    from rayfm.cli.display import Display, print_summary
    from rayfm.pipeline.stream import run as run_pipeline

    loaded = _load(config, set_, data)
    with Display(loaded) as display:
        result = run_pipeline(loaded, resume=resume, overwrite=overwrite, watch=display.update, follow=follow)
    if result.summary.get("metrics") or not follow:  # a run may be stopped before it has scored a test period
        print_summary(result.summary, result.seconds, result.report)
    if result.stopped:
        typer.echo(f"stopped; go on with: rayfm run {config} --resume --follow")


@app.command()
def prepare(config: ConfigFile, set_: Overrides = None, data: Data = None) -> None:
    """Bring raw logs into the example store: lanes, manifests, rejects."""
    from rayfm.cli.display import console, prepared_table
    from rayfm.pipeline.parts import prepare as prepare_examples

    console.print(prepared_table(prepare_examples(_load(config, set_, data))))


@app.command()
def train(
    config: ConfigFile,
    trainer: Annotated[
        list[str] | None, typer.Option("--trainer", help="A teacher or a group of students; by default all teachers.")
    ] = None,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Train teachers, or groups of students whose labels stand, through all prepared periods."""
    from rayfm.cli.display import console
    from rayfm.pipeline.parts import train as train_models

    for name, versions in train_models(_load(config, set_, data), trainer).items():
        console.print(f"{name}: trained; newest versions: {', '.join(versions)}")


@app.command()
def label(
    config: ConfigFile,
    teacher: Annotated[list[str] | None, typer.Option("--teacher", help="By default every teacher.")] = None,
    period: Periods = None,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Let teachers label prepared periods through their service, into the label store."""
    from rayfm.cli.display import console, label_table
    from rayfm.pipeline.parts import label as label_periods

    console.print(label_table(label_periods(_load(config, set_, data), teacher, period)))


app.command()(augment)
app.command()(plan)
app.command()(submit)


@app.command()
def evaluate(
    config: ConfigFile,
    model: Annotated[str, typer.Option("--model", help="Key of a published model, e.g. fm.none.1 (rayfm snapshots).")],
    period: Annotated[list[str], typer.Option("--period", help="Period to score (may be given several times).")],
    version: Annotated[str | None, typer.Option("--version", help="By default the newest.")] = None,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Score a published version on prepared periods."""
    from rayfm.cli.display import console, metric_table
    from rayfm.pipeline.parts import evaluate as evaluate_snapshot

    console.print(metric_table(evaluate_snapshot(_load(config, set_, data), model, tuple(period), version)))


@app.command()
def serve(
    config: ConfigFile,
    production: Annotated[
        bool, typer.Option("--production", help="Behind Ray Serve's HAProxy; needs a token and a firewall.")
    ] = False,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Serve a run's teachers and students over HTTP and gRPC, until stopped."""
    loaded = _load(config, set_, data)
    from rayfm.cli.serve import serve_and_show

    serve_and_show(loaded, production)


@app.command()
def tune(
    config: ConfigFile,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="KEY=SPACE",
            help="What to search, e.g. --param 'groups.students.dense.lr=loguniform(1e-4, 1e-2)'.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The student or teacher to tune.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Its variant.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task that is scored.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="ne (default), ne_train, logloss, rmse, auc.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trials in all.")] = None,
    concurrent: Annotated[int | None, typer.Option("--concurrent", help="Trials at once.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="tpe (default) or random.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget an earlier search for this model.")] = False,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Search config keys on Ray Tune, scored on the warm-up periods alone."""
    from rayfm.cli.display import console, ended_trial, print_search
    from rayfm.quiet import quiet_libraries

    quiet_libraries()
    from rayfm.pipeline.tune import load_search
    from rayfm.pipeline.tune import tune as search_values

    options = {"model": model, "variant": variant, "task": task, "metric": metric, "trials": trials}
    options |= {"concurrent": concurrent, "search": search}
    loaded = load_search(config, param, {key: value for key, value in options.items() if value is not None}, set_, data)
    wanted = loaded.tune.trials if loaded.tune is not None else 0
    console.print(f"tune [bold]{loaded.name}[/bold]  (starting Ray takes a while)")
    result = search_values(loaded, resume, overwrite, lambda records: console.print(ended_trial(records, wanted)))
    print_search(result, config)


@app.command()
def select(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a selection that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget an earlier selection of this name.")] = False,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Choose features by what they are worth on impressions and on considerations, on the warm-up periods."""
    loaded = _load(config, set_, data)
    from rayfm.cli.select import select_and_show

    select_and_show(loaded, resume, overwrite)


@app.command()
def report(run_dir: RunFolder) -> None:
    """Write report.html from what a run left, and print its table."""
    from rayfm.cli.display import print_summary
    from rayfm.pipeline.parts import write_report

    summary, path = write_report(run_dir)
    print_summary(summary, None, path)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="models, objectives, sources or tables; by default all.")] = "all",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="With models: count those of this pipeline.")
    ] = None,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """List the models, objectives and sources that a config can name, and the tables of `rayfm reproduce`."""
    if config is not None or what == "models":
        from rayfm.config import ConfigError
        from rayfm.quiet import quiet_libraries

        if what not in ("all", "models"):
            raise ConfigError(f"--config counts a pipeline's models; leave out {what!r}")
        quiet_libraries()
        from rayfm.cli.display import console
        from rayfm.cli.sizes import model_table, pipeline_table

        table, note = model_table() if config is None else pipeline_table(_load(config, set_, data))
        console.print(table)
        console.print(f"\n[dim]{note}")
        return
    from rayfm.cli.display import console, parts_table

    console.print(parts_table(what))


@app.command()
def reproduce(
    table: Annotated[list[str], typer.Argument(help="Tables, or all (rayfm list tables).", show_default=False)],
    source: Annotated[
        str | None, typer.Option("--source", help="A source's name or a pipeline's YAML file; by default each table's.")
    ] = None,
    data: Data = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Everything small: shows that it works, not what holds.")
    ] = False,
    seeds: Annotated[str, typer.Option("--seeds", help="Student seeds, separated by commas.")] = "1,2,3",
    folder: Annotated[Path, typer.Option("--folder", help="Where data and runs lie.")] = Path("runs/reproduce"),
) -> None:
    """Reproduce the papers' tables: their numbers beside ours, and how many of their signs held."""
    from rayfm.cli.reproduced import reproduce_and_show

    reproduce_and_show(table, source, data, quick, seeds, folder)


@app.command()
def simulate(
    experiment: Annotated[
        list[str] | None, typer.Argument(help="one-stage, two-stage, heads, adapter; by default all.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where figures go.")] = Path("runs/theory"),
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions: wide intervals.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
) -> None:
    """Simulate what the papers prove: bias of a cascade, heads and adapters, beside closed forms."""
    from rayfm.cli.theory import simulate_and_show

    simulate_and_show(experiment or [], folder, quick, seed)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Also check whether this fits.")] = None,
    set_: Overrides = None,
    data: Data = None,
) -> None:
    """Check versions, cores, memory, devices and Ray, and whether a config fits this machine."""
    from rayfm.cli.doctor import diagnose

    loaded = None if config is None else _load(config, set_, data)
    if not diagnose(loaded):
        raise typer.Exit(1)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of pipeline configs, for editors."""
    import json

    from rayfm.pipeline.config import PipelineConfig

    typer.echo(json.dumps(PipelineConfig.model_json_schema(by_alias=True), indent=2))


@config_app.command("check")
def config_check(config: ConfigFile, set_: Overrides = None, data: Data = None) -> None:
    """Validate a config and print it as resolved, defaults included."""
    import yaml

    loaded = _load(config, set_, data)
    from rayfm.pipeline.hints import hints

    typer.echo(yaml.safe_dump(loaded.dump(), sort_keys=False, width=120))
    for hint in hints(loaded):
        typer.echo(f"hint: {hint}", err=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one clear line for a user's error, a traceback with ``--debug``.

    Args:
        arguments: by default the process's own.

    Raises:
        SystemExit: always, with the exit code.
    """
    collect_less()
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        if os.environ.get("RAYFM_LOG_FORMAT") or os.environ.get("RAYFM_LOG_LEVEL"):
            from rayfm.operations.logs import configure

            configure()
        app([argument for argument in given if argument != "--debug"], prog_name="rayfm")
    except Exception as error:
        from rayfm.config.errors import RayfmError

        if debug or not isinstance(error, RayfmError):
            raise
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
