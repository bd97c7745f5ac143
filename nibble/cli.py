"""The `nibble` command. Each command imports what it needs when it runs: `nibble chat` loads no launcher.

Exit codes: 0 done, 1 it failed, 2 the command, an option or a NIBBLE_ variable is wrong, 130 interrupted. A failure
that somebody at the terminal can do something about is one line on stderr, never a traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="nibble",
    help="An OpenAI-compatible service for 4-bit language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_KINDS = "A GGUF file, a directory (Hugging Face's or converted), or an id on the Hugging Face hub"
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help=f"{MODEL_KINDS}. Default: a small demo model."),
]
ModelArgument = Annotated[Path, typer.Argument(help=f"{MODEL_KINDS}.")]


@app.command()
def serve(
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one. [default: 8000]")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. [default: its file name]")
    ] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. [default: 1]")] = None,
) -> None:
    """Serve a model on this machine. Options not given come from NIBBLE_ variables."""
    from nibble.service.launcher.errors import LaunchError
    from nibble.service.launcher.serve import serve as run_service
    from nibble.service.launcher.settings import LauncherSettings
    from nibble.service.settings import SettingsError

    options = {
        "model_dir": model,
        "host": host,
        "port": port,
        "model_name": model_name,
        "num_workers": num_workers,
    }
    given = {name: value for name, value in options.items() if value is not None}
    try:
        run_service(LauncherSettings.from_environment(**given))
    except SettingsError as error:
        _fail(str(error), exit_code=2)
    except LaunchError as error:
        _fail(str(error))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="The model's name. [default: the service's first]")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    api_keys: Annotated[
        str | None, typer.Option("--api-key", envvar="NIBBLE_API_KEYS", help="The service's API key.", show_envvar=True)
    ] = None,
) -> None:
    """Chat with a running service in the terminal."""
    from nibble.chat import ChatClient, ChatError, ChatOptions, run_chat

    api_key = (api_keys or "").split(",")[0].strip() or None
    try:
        client = ChatClient(url, model, ChatOptions(temperature, max_tokens), api_key)
        run_chat(client, system)
    except ChatError as error:
        _fail(str(error))


@app.command()
def convert(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The native checkpoint directory to make.")],
) -> None:
    """Convert a model to the native format. `nibble serve` does this by itself and keeps the result."""
    from rich.console import Console

    from nibble.engine.checkpoint.errors import CheckpointError
    from nibble.engine.checkpoint.resolve import convert_model
    from nibble.service.hub_model import HubModelError, local_model
    from nibble.service.launcher.model import progress_bar

    _require_absent(output)
    try:
        with progress_bar(Console(stderr=True)) as report:
            convert_model(local_model(model, report), output, report)
    except (CheckpointError, HubModelError) as error:
        _fail(str(error))


@app.command()
def prepare(
    output: Annotated[Path, typer.Argument(help="The link to make. What is fetched and converted lies beside it.")],
    model: ModelOption = None,
) -> None:
    """Fetch and convert a model if need be, and make a link to it, for a gateway and workers that start then."""
    from rich.console import Console

    from nibble.service.launcher.errors import LaunchError
    from nibble.service.launcher.model import prepare_model

    try:
        name = prepare_model(model, output, Console(stderr=True))
    except LaunchError as error:
        _fail(str(error))
    typer.echo(f"{output}: {name}")


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The native checkpoint directory to make.")],
    method: Annotated[
        str, typer.Option(help="rtn or sinq (need no text), awq, gptq, or awq-gptq: both of these, and the best.")
    ] = "awq-gptq",
    group_size: Annotated[int, typer.Option(help="Weights with one scale: 32, 64 or 128.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="A text or JSON lines file. [default: a short text that comes with Nibble]")
    ] = None,
    num_sequences: Annotated[int, typer.Option(min=1, help="Sequences of calibration text.")] = 128,
    sequence_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    kv: Annotated[
        str,
        typer.Option(help="Scales of an INT8 KV cache: of each token (found while serving) or channel (calibrated)."),
    ] = "token",
) -> None:
    """Quantise a model to 4 bits. An interrupted run goes on where it was when the command is given again."""
    from rich.console import Console

    from nibble.engine.checkpoint.errors import CheckpointError
    from nibble.engine.quantize.errors import OptionError, QuantizeError
    from nibble.engine.quantize.options import KVScales, Method, Options
    from nibble.service.hub_model import HubModelError, local_model
    from nibble.service.launcher.model import progress_bar

    try:
        options = Options(
            Method.named(method), group_size, calibration, num_sequences, sequence_tokens, device, KVScales.named(kv)
        )
        from nibble.engine.quantize.quantize import quantize as run

        _require_absent(output)
        with progress_bar(Console(stderr=True)) as report:
            run(local_model(model, report), output, options, report)
    except ModuleNotFoundError as error:
        _fail(f"quantising needs the package {error.name}: pip install 'nibble[quantize]'")
    except OptionError as error:
        _fail(str(error), exit_code=2)
    except (CheckpointError, HubModelError, QuantizeError, OSError) as error:
        _fail(str(error))


@app.command()
def ladder(
    model: ModelArgument,
    quantized: Annotated[
        Path | None,
        typer.Option(help="The 4-bit checkpoint. [default: the model if it is one, else made and kept]"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text or JSON lines file to measure on. [default: a page]")
    ] = None,
    num_sequences: Annotated[int, typer.Option(min=1, help="Sequences of the text.")] = 16,
    sequence_tokens: Annotated[int, typer.Option(min=64, help="Tokens of each.")] = 512,
    generated_tokens: Annotated[int, typer.Option(min=8, help="Tokens that each prompt is continued by.")] = 128,
    gpu_memory: Annotated[str | None, typer.Option(help="Say how many tokens fit on a GPU of this memory.")] = None,
    max_kl: Annotated[float, typer.Option(min=0.0, help="Mean KL divergence that a recommended rung may have.")] = 0.1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write OUTPUT.html and OUTPUT.json.")] = None,
) -> None:
    """Measure what INT4 weights and an INT8 KV cache cost and give: quality, bytes, speed."""
    from nibble.engine.checkpoint.errors import CheckpointError
    from nibble.engine.errors import EngineError
    from nibble.engine.quantize.errors import QuantizeError
    from nibble.ladder import Request, run_ladder
    from nibble.service.hub_model import HubModelError
    from nibble.service.settings import SettingsError

    try:
        run_ladder(
            Request(
                model,
                quantized,
                text,
                num_sequences,
                sequence_tokens,
                generated_tokens,
                gpu_memory,
                max_kl,
                output,
            )
        )
    except ModuleNotFoundError as error:
        _fail(f"the ladder needs the package {error.name}: pip install 'nibble[quantize]'")
    except SettingsError as error:
        _fail(str(error), exit_code=2)
    except (CheckpointError, EngineError, HubModelError, QuantizeError, OSError) as error:
        _fail(str(error))


@app.command()
def plan(
    model: ModelArgument,
    gpu_memory: Annotated[str, typer.Option(help="The GPU's memory, such as 24GiB.")],
    group_size: Annotated[int, typer.Option(help="Of INT4 weights: 32, 64 or 128.")] = 128,
    utilization: Annotated[float | None, typer.Option(min=0.1, max=1.0, help="Share to use. [default: 0.9]")] = None,
) -> None:
    """Say what fits on a GPU: weights, KV cache, tokens. Fetches and loads no weights; a config.json suffices."""
    from nibble.engine.checkpoint.errors import CheckpointError
    from nibble.ladder import print_plan
    from nibble.service.hub_model import HubModelError
    from nibble.service.settings import SettingsError

    try:
        print_plan(model, gpu_memory, group_size, utilization)
    except SettingsError as error:
        _fail(str(error), exit_code=2)
    except (CheckpointError, HubModelError, OSError) as error:
        _fail(str(error))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Who it is for, in logs. Keys with one name share their limits.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Requests that may be queued.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens of prompts and answers.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Tokens of prompts and answers.")] = None,
    priority: Annotated[
        int, typer.Option(min=-50, max=50, help="Added to that of each request; lower goes first.")
    ] = 0,
) -> None:
    """Make an API key: the key on stderr, shown this once; its line for NIBBLE_API_KEYS_FILE on stdout."""
    from nibble.service.gateway.api_keys import KeyFileError, key_line, make_key

    secret = make_key()
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    try:
        line = key_line(secret, name=name, priority=priority, **limits)
    except KeyFileError as error:
        _fail(str(error), exit_code=2)
    typer.echo(secret, err=True)
    typer.echo(line)


@app.command("version")
def print_version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"nibble {version('nibble')}")
    except PackageNotFoundError:
        typer.echo("nibble, run from a source tree that is not installed")


def _require_absent(output: Path) -> None:
    if output.exists():
        _fail(f"{output}: exists already")


def _fail(message: str, exit_code: int = 1) -> NoReturn:
    typer.echo(f"nibble: {message}", err=True)
    raise typer.Exit(exit_code)


def main() -> None:
    """The entry point of the `nibble` script."""
    try:
        exit_code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"nibble: {error.format_message()} (nibble --help shows how)", err=True)
        exit_code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        exit_code = 130
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
