"""`edge-agent`: the command line of the edge."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: a lost link is our business to report

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from edge_agent.config import DEFAULTS, EdgeConfig, load_edge_config
from edge_agent.display import JsonLines, Screen
from edge_agent.engines import load_draft
from edge_agent.setup import make_agent, make_request, make_settings
from edge_agent.texts import FEWEST_TOKENS, PROBE_TOKENS
from shared.config import ConfigError
from shared.core.effects import Finished, Refused
from shared.core.settings import OnDisconnect
from shared.engine import EngineError
from shared.logs import configure_logs
from shared.runtimes.hub import resolve_model

app = typer.Typer(
    help="Draft on this device, let the verifier decide.", no_args_is_help=True, pretty_exceptions_enable=False
)

EXIT_MISTAKE = 2  # configuration, model, prompt
EXIT_REFUSED = 3  # the verifier will not serve us
EXIT_LINK = 4  # the verifier was lost, and the settings say to end the answer then


@app.callback()
def _root() -> None:
    """Draft on this device, let the verifier decide."""


@app.command()
def config() -> None:
    """Print every setting with its default and its meaning, as a file to start from."""
    typer.echo(DEFAULTS.read_text(encoding="utf-8"), nl=False)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    config: Annotated[Path | None, typer.Option(help="YAML file; `edge-agent config` prints one.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Address of the verifier, host:port.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the text at any temperature.")] = None,
    cloud_only: Annotated[bool, typer.Option("--cloud-only", help="No drafts: the verifier streams.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Never dial: the draft model answers alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: tokens, then statistics.")] = False,
) -> None:
    """Answer one prompt and stream the text."""
    overrides = {
        "verifier.address": verifier,
        "generation.max_new_tokens": max_new_tokens,
        "sampling.temperature": temperature,
        "sampling.seed": seed,
        "speculation.enabled": False if cloud_only else None,
    }
    settings = load_edge_config(config, environ=os.environ, overrides=overrides)
    configure_logs(settings.log.level, settings.log.format)
    raise typer.Exit(asyncio.run(_answer(settings, _read_prompt(prompt), local, as_json)))


def _read_prompt(argument: str) -> str:
    try:
        text = sys.stdin.read() if argument == "-" else argument
        text.encode()  # Python turns bytes of an argument that are not UTF-8 into surrogates
    except UnicodeError as error:
        raise ConfigError("the prompt is not UTF-8 text; convert it first, for example with iconv") from error
    return text


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file; `edge-agent config` prints one.")] = None,
    verifier: Annotated[str | None, typer.Option(help="Address of the verifier, host:port.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text of your own to try, instead of ours; again for more.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=FEWEST_TOKENS, help="Of each answer: as many as yours usually have.")
    ] = PROBE_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the settings, models and link; say what to expect, and what to change. About a minute."""
    from edge_agent.doctor import examine, failed_configuration
    from edge_agent.doctor_report import show_diagnosis

    try:
        settings = load_edge_config(config, environ=os.environ, overrides={"verifier.address": verifier})
    except ConfigError as error:
        diagnosis = failed_configuration(error)
    else:
        configure_logs("error", settings.log.format)
        with Console(stderr=True).status("examining"):
            diagnosis = asyncio.run(examine(settings, prompt or (), max_new_tokens))
    show_diagnosis(diagnosis, as_json)
    raise typer.Exit(0 if diagnosis.is_sound else EXIT_MISTAKE)


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help="GGUF file, Hugging Face folder, package:NAME or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    to: Annotated[
        Literal["onnx", "gguf"], typer.Option("--format", help="onnx needs no compiler on the device; gguf is 8 bits.")
    ] = "onnx",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to measure it with.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a draft of a model; say how often it is right and how long a token takes. Half a minute for a small one."""
    from edge_agent.prepare import prepare as prepare_draft

    path = resolve_model(model, "model")
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"preparing {path.name}", total=None)
        prepared = prepare_draft(
            path,
            to,
            out,
            threads,
            lambda stage, done: bar.update(task, description=stage, total=1, completed=done or 0),
        )
    if as_json:
        typer.echo(json.dumps({**asdict(prepared), "path": str(prepared.path)}))
        return
    typer.echo(f"{prepared.path}: {prepared.size_bytes / 1e6:.0f} MB, right for {prepared.acceptance:.1%} of the full "
               f"model's tokens, {prepared.draft_ms:.1f} ms a token on {threads} thread(s)")  # fmt: skip
    engine = "onnx" if to == "onnx" else "llama_cpp"
    typer.echo(f"use it with: draft: {{engine: {engine}, model: {prepared.path}}}")


async def _answer(config: EdgeConfig, prompt: str, local: bool, as_json: bool) -> int:
    if local and not config.draft.can_write:
        raise ConfigError(f"--local needs a draft that can write; draft.engine {config.draft.engine} only copies")
    path = resolve_model(config.draft.model, "draft.model")
    with Console(stderr=True).status(f"loading {path.name}"):
        loaded = load_draft(config.draft, path)
    request = make_request(config, loaded, prompt)
    agent = make_agent(config, loaded, offline=local)
    display = JsonLines(loaded.model) if as_json else Screen(loaded.model)
    goes_on = make_settings(config).on_disconnect is OnDisconnect.CONTINUE
    code, complaint = 0, ""
    try:
        async for event in agent.answer(request):
            match event:
                case Refused(detail=detail):
                    then = "what followed is local and unverified" if goes_on else "the answer ends here"
                    code, complaint = EXIT_REFUSED, f"the verifier refused: {detail}; {then}"
                case Finished(error=error) if error and not code:
                    code, complaint = EXIT_LINK, f"{error}; the answer ends here (link.on_disconnect: fail)"
            display.show(event)
        report = agent.report()
        display.finish(report)
        if not (code or local or report["num_steps"] or report["messages_down"]):
            complaint = f"no verifier was reached at {config.verifier.address}; the answer is local and unverified"
    finally:
        await agent.close()
        if complaint:  # not before: it would stand in the middle of a line of text
            _complain(complaint)
    return code


def _complain(what: str) -> None:
    typer.echo(f"edge-agent: {what}", err=True)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        app()
    except (ConfigError, EngineError, OSError) as error:
        _complain(" ".join(str(error).split()))
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
