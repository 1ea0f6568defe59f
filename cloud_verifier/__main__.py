"""The command `cloud-verifier`."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cloud_verifier.config import DEFAULTS, CloudConfig, load_cloud_config
from cloud_verifier.engines import Progress as ReportProgress
from cloud_verifier.engines import Target, load_target
from shared.config import ConfigError
from shared.engine import EngineError
from shared.logs import configure_logs

# Read by gRPC when it is imported, which `serve` does: it would write its own many lines beside ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

app = typer.Typer(
    name="cloud-verifier",
    help="Hosts the target model and decides what the text is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_COST_ROWS = (1, 8, 16)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file; what it leaves out has its default.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port to listen on; port 0 takes a free one.")] = None,
    model: Annotated[str | None, typer.Option(help="File, folder, package:NAME or hub name of the target.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (exact), bfloat16, or stored (llama_cpp).")] = None,
    self_decode: Annotated[str | None, typer.Option(help="Decode without drafts: off, idle or always.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the target; 0 takes all.")] = None,
) -> None:
    """Load the target model and serve it until SIGINT or SIGTERM. Options win over the file."""
    overrides = {
        "server.address": address,
        "target.model": model,
        "target.dtype": dtype,
        "speculation.self_decode": self_decode,
        "target.threads": threads,
    }
    settings = load_cloud_config(config, environ=os.environ, overrides=overrides)
    configure_logs(settings.log.level, settings.log.format)
    from cloud_verifier.server import ListenError, check_address

    try:
        check_address(settings.server.address)  # now, not after a minute of loading
        with _progress() as report:
            target = load_target(settings.target, report)
        asyncio.run(_serve(settings, target))
    except ListenError as error:
        where = "--address" if address else f"server.address in {config or DEFAULTS}"
        raise ConfigError(f"{error} ({where})") from error


@app.command()
def profile(
    config: Annotated[Path | None, typer.Option(help="YAML file; what it leaves out has its default.")] = None,
) -> None:
    """Measure what a step costs, thoroughly, and keep it: `serve` uses it for this model, engine and machine."""
    settings = load_cloud_config(config, environ=os.environ, overrides={})
    configure_logs(settings.log.level, settings.log.format)
    from cloud_verifier.admin import timings_table
    from cloud_verifier.engines.cost import CostKey, profile_cost, store_cost

    with _progress() as report:
        target = load_target(settings.target, report)
        timings = profile_cost(target.engine, lambda done: report("profiling", done))
    file = store_cost(CostKey.of(settings.target), settings.target.cache_dir, timings)
    console = Console()
    console.print(timings_table(timings))
    typer.echo(f"stored in {file}")


@app.command()
def sessions(
    config: Annotated[Path | None, typer.Option(help="YAML file that the verifier serves with.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port of the verifier, if not the configured one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    watch: Annotated[float | None, typer.Option(min=0.1, help="Show again every so many seconds.")] = None,
) -> None:
    """List the sessions that a running verifier serves."""
    settings = load_cloud_config(config, environ=os.environ, overrides={})
    configure_logs(settings.log.level, settings.log.format)
    from cloud_verifier.admin import show_sessions

    with suppress(KeyboardInterrupt):  # the way to end --watch
        show_sessions(settings.server, address, as_json, watch)


@app.command("config")
def print_config() -> None:
    """Print every setting with its default and its meaning: a start for a file of your own."""
    typer.echo(DEFAULTS.read_text(encoding="utf-8"), nl=False)


async def _serve(settings: CloudConfig, target: Target) -> None:
    from cloud_verifier.serve import serving

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with serving(settings, target) as verifier:
        typer.echo(f"listening on {verifier.address} ({_summary(settings, target)})")
        told = asyncio.create_task(stopped.wait())
        await asyncio.wait({verifier.running, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if verifier.running.done():
            verifier.running.result()


def _summary(settings: CloudConfig, target: Target) -> str:
    """What is served and what it was measured to take."""
    from cloud_verifier.engines.cost import HasCost

    engine = target.engine
    costs = "/".join(f"{engine.cost_ms(rows):.0f}" for rows in _COST_ROWS)
    rows = "/".join(map(str, _COST_ROWS))
    origin = f" ({engine.cost.origin})" if isinstance(engine, HasCost) and engine.cost else ""
    cache = f"{settings.target.kv_cache_mb} MB cache of {engine.limits.cache_tokens} tokens"
    return f"{target.model}, {target.dtype}, {rows} rows cost {costs} ms{origin}, {cache}"


@contextmanager
def _progress() -> Iterator[ReportProgress]:
    """Shows on stderr how the loading goes: a bar on a terminal, else a line for each stage."""
    console = Console(stderr=True)
    if not console.is_terminal:
        shown: set[str] = set()

        def report_line(stage: str, _: float | None) -> None:
            if stage not in shown:
                shown.add(stage)
                typer.echo(f"{stage} ...", err=True)

        yield report_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=None)

        def report_bar(stage: str, fraction: float | None) -> None:
            progress.update(bar, description=stage, completed=fraction or 0, total=None if fraction is None else 1)

        yield report_bar


def main() -> None:
    """Run the command; what a user can put right is one line on stderr and exit code 2."""
    try:
        app()
    except (ConfigError, EngineError, OSError) as error:
        typer.echo(f"cloud-verifier: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
