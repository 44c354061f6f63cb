"""The command line: one verb per function, each importing its package only when called."""

import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from model_store.manifest import Manifest, Parity
    from model_store.store import ModelStore
    from service.keys import ApiKey, KeyFile
    from service.listening import Listening
    from training.recipe import Recipe


def _listed(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _stored(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Names in the store that complete a word, if it is a folder; one look, for a shell waits."""
    default = os.environ.get("CANDLECAST_STORE_ROOT", STORE_ROOT)
    root = Path(ctx.params.get("store_root") or default)
    found = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(name for name in found if name.startswith(begun) and not name.startswith("."))


STORE_ROOT = "model_store/artifacts"
NOTHING_KEPT = 3  # exit code
EXIT_CODES = """\b
Exit codes:
  0  done
  1  it failed; the message says why, and what to do
  2  no such verb or option, or not with this value
  3  nothing was kept: tune found nothing better, or a gate refused to promote or export
  128 and the signal's number, where a signal ended it

\b
`candlecast VERB --help` shows examples of each verb; `candlecast doctor` checks this machine.
`candlecast completion bash` (zsh, fish) completes verbs, options and models' names."""
# By the names of exceptions, of packages that are imported only when called.
REFUSALS = ("PromotionRefused", "ExportRefused")
NEXT_STEPS = {
    "VersionNotFound": "`candlecast store list` shows what is there; `train` and `store import` put more there",
    "NoAnswer": "`candlecast serve` starts one; --url or CANDLECAST_URL says where it is",
}
Day = click.DateTime(["%Y-%m-%d"])
JsonFlag = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
StoreRoot = click.option(
    "--store",
    "store_root",
    envvar="CANDLECAST_STORE_ROOT",
    default=STORE_ROOT,
    show_default=True,
    help="The model store: a folder, or a URL such as s3://bucket/prefix.",
)
Reason = click.option("--reason", help="Why, for the log.")


class _CandleFolder(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message} `candlecast sample-data {value}` writes real candles there.", param, ctx)


CandleFolder = _CandleFolder(exists=True, file_okay=False, path_type=Path)
DataFolder = click.option(
    "--data",
    "folder",
    default=Path("data/samples"),
    show_default=True,
    type=CandleFolder,
    help="Folder of CSV or Parquet files.",
)
ServiceUrl = click.option(
    "--url",
    envvar="CANDLECAST_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The running service.",
)
Key = click.option("--key", envvar="CANDLECAST_KEY", help="Its key; a variable keeps it out of the list of processes.")
Unseen = click.option(
    "--unseen", default="IBM", show_default=True, callback=_listed, help="Comma-separated symbols held out of training."
)
Device = click.option("--device", envvar="CANDLECAST_DEVICE", default="cpu", show_default=True, help="Torch device.")
RayCluster = click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Spread over a Ray cluster, with the same numbers: local, auto or HOST:PORT."
    " Each worker has this machine's threads (OMP_NUM_THREADS).",
)
HomeFolder = click.option(
    "--home",
    envvar="CANDLECAST_HOME",
    default=Path("var"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of what belongs to this machine.",
)


class Verbs(click.Group):
    """Turns errors that a user can mend into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if os.getpid() == 1:  # of a container: the kernel keeps from it every signal that it does not handle
            signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (ValueError, OSError, LookupError, RuntimeError) as error:
            if ctx.params.get("debug"):
                raise
            raise _failure(error) from error


def _failure(error: Exception) -> click.ClickException:
    """The error in a line, the next step in another."""
    names = [each.__name__ for each in type(error).__mro__]
    steps = [NEXT_STEPS[name] for name in names if name in NEXT_STEPS]
    kind = _Refused if set(names) & set(REFUSALS) else click.ClickException
    return kind("\n".join([_in_words(error), *steps]))


class _Refused(click.ClickException):
    exit_code = NOTHING_KEPT


def _in_words(error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{error}"
    told = [(".".join(map(str, each["loc"])) or error.title, each["msg"]) for each in error.errors()]
    if error.title == "Settings":
        told = [(f"CANDLECAST_{where.upper()}", what) for where, what in told]
    return "; ".join(f"{where}: {what}" for where, what in told)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="candlecast")
def main(debug: bool) -> None:
    """Forecasts candles with Toto and Kronos, and keeps score of every forecast it serves."""


@main.command()
@click.option(
    "--load",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Put these candles, CSV or Parquet files, into the history once the service is up.",
)
@JsonFlag
def serve(folder: Path | None, as_json: bool) -> None:
    """Start the service; settings are CANDLECAST_* variables.

    \b
    Example: candlecast serve --load data/samples
    """
    import threading

    from service.listening import Listening
    from service.main import serve
    from service.settings import Settings

    def announce(listening: Listening) -> None:
        loaded = _load_history(folder, listening.url, listening.key) if folder else []
        if as_json:
            click.echo(json.dumps({"url": listening.url, "admin_url": listening.admin_url, "loaded": loaded}))
        else:
            click.echo(_welcome(listening, loaded))

    serve(Settings(), lambda listening: threading.Thread(target=announce, args=(listening,), daemon=True).start())


def _welcome(listening: "Listening", loaded: list[str]) -> str:
    url, docs = listening.url, f" (docs at {listening.url}/docs)" if listening.docs else ""
    lines = [f"Candlecast listens on {url}{docs}, metrics on {listening.admin_url}/metrics"]
    if loaded:
        request = f"curl -s -X POST {url}/forecast/{loaded[0]} -H 'Content-Type: application/json'"
        request += ' -H "Authorization: Bearer $CANDLECAST_KEY"' if listening.key else ""
        lines += ["Try it:", f"""  {request} -d '{{"model": "kronos", "horizon": 30}}'"""]
        lines += [f"""  {request} -d '{{"model": "toto", "horizon": 64}}'"""]
    return "\n".join(lines)


def _load_history(folder: Path, url: str, key: str | None) -> list[str]:
    """PUT every series of `folder` through the API, as any feed would; the symbols that went in."""
    from contextlib import closing

    from feeds.put import NoAnswer, Refused, Service
    from training.candle_files import read_folder

    loaded = []
    try:
        with closing(Service(url, key=key)) as service:
            for item, _ in read_folder(folder):
                try:
                    service.put(item.symbol, item.timestamps, item.candles, item.interval)
                except Refused as error:
                    click.echo(f"{item.symbol} was not loaded: {error}", err=True)
                else:
                    loaded.append(item.symbol)
    except (ValueError, OSError, NoAnswer) as error:
        click.echo(f"loading {folder} ended early: {error}", err=True)
    return loaded


@main.command()
@click.option("--host", envvar="CANDLECAST_HOST", default="127.0.0.1", show_default=True, help="Where it listens.")
@click.option("--port", envvar="CANDLECAST_PORT", default=8000, show_default=True)
@JsonFlag
def health(host: str, port: int, as_json: bool) -> None:
    """Tell whether the service on this machine is ready: exit code 0, or 1 with the reason.

    Every address (0.0.0.0 or ::) is asked as this machine.

    \b
    Example: candlecast health --port 8000
    """
    from http.client import HTTPConnection, HTTPException

    from service.listening import reachable

    connection = HTTPConnection(reachable(host), port, timeout=3)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read()
    except (HTTPException, OSError) as error:
        raise click.ClickException(f"{host}:{port} does not answer: {error}; `candlecast serve` starts one") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise click.ClickException(f"{host}:{port} is not ready: {answer.status}")
    degraded = json.loads(body)["degraded"]
    click.echo(body.decode() if as_json else ", ".join(["ready", *degraded]))


@main.command()
@click.argument("file", metavar="FILE.tar", type=click.Path(dir_okay=False, path_type=Path))
@JsonFlag
def backup(file: Path, as_json: bool) -> None:
    """Write history, ledger and model store to FILE.tar, as of one instant; the service may run meanwhile.

    Where they are say the settings of `serve`. API keys, quotas and the cache of forecasts stay out.

    \b
    Example: candlecast backup monday.tar
    """
    import asyncio

    from service.backup import backup
    from service.settings import Settings

    with _bars(as_json, title=f"{file}"):
        index = asyncio.run(backup(Settings(), file))
    _tell_backup(f"{file} holds", index.at.isoformat(), len(index.files), index.bytes, as_json)


@main.command()
@click.argument("file", metavar="FILE.tar", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replace", is_flag=True, help="Instead of the history and the aliases that are there.")
@JsonFlag
def restore(file: Path, replace: bool, as_json: bool) -> None:
    """Put back what is in FILE.tar, once all of it is verified, where the settings of `serve` say; then start it.

    \b
    Example: candlecast restore monday.tar
    """
    import asyncio

    from service.backup import restore
    from service.settings import Settings

    with _bars(as_json, title=f"{file}"):
        index = asyncio.run(restore(Settings(), file, replace=replace))
    _tell_backup("restored", index.at.isoformat(), len(index.files), index.bytes, as_json)


def _tell_backup(what: str, at: str, files: int, size: int, as_json: bool) -> None:
    told = json.dumps({"at": at, "files": files, "bytes": size})
    click.echo(told if as_json else f"{what} everything as of {at}: {files} files, {size / 1e6:.1f} MB")


@main.command()
@JsonFlag
def doctor(as_json: bool) -> None:
    """Check this machine for the service: what would stop it, what would be slow, why, and what to do.

    It reads the CANDLECAST_* variables that `serve` reads. Exit code 1: something will not work.

    \b
    Example: candlecast doctor
             CANDLECAST_DEVICE=cuda candlecast doctor --json
    """
    from service.doctor import examine, findings_table
    from service.settings import Settings

    found = list(examine(Settings()))
    broken = any(each.level == "broken" for each in found)
    if as_json:
        click.echo(json.dumps({"works": not broken, "findings": [asdict(each) for each in found]}))
    else:
        _print_table(findings_table(found))
    if broken:
        sys.exit(1)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete verbs, options and the names of models.

    \b
    Example: candlecast completion bash > ~/.local/share/bash-completion/completions/candlecast
             candlecast completion zsh > ~/.zfunc/_candlecast
             candlecast completion fish > ~/.config/fish/completions/candlecast.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # the choices are those that click has
    click.echo(kind(main, {}, "candlecast", "_CANDLECAST_COMPLETE").source())


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--symbol", help="Of rows that name none; default: the file's name without its ending.")
@click.option("--interval", help="Such as 1h, of rows that name none; default: the step between the candles.")
@click.option("--skip-bad", is_flag=True, help="Leave out lines that are no candles; by default the first one ends it.")
@ServiceUrl
@Key
@JsonFlag
def ingest(
    file: Path, symbol: str | None, interval: str | None, skip_bad: bool, url: str, key: str | None, as_json: bool
) -> None:
    """Put the candles of FILE into a running service; - is standard input, sent on as it arrives.

    FILE is a CSV with a header, or JSON lines: objects with the same names, or rows as ccxt and Binance write them.

    \b
    Example: tail -n +1 -f candles.csv | candlecast ingest - --symbol BTC-USDT --interval 1m
    """
    from contextlib import closing
    from functools import partial

    from feeds.files import Reader
    from feeds.ingest import Ingest, ingest_all
    from feeds.put import Service

    piped = str(file) == "-"
    reader = Reader("standard input" if piped else str(file), symbol or (None if piped else file.stem), interval)
    with closing(Service(url, key=key, say=_complain)) as service, _bars(as_json, title=reader.name) as track:
        ingest = Ingest(reader, service, skip_bad=skip_bad)
        try:
            ingest_all(ingest, None if piped else file, partial(track, reader.name))
        except (RuntimeError, ValueError) as error:
            if as_json:
                click.echo(json.dumps(ingest.tally.as_json()))
            raise click.ClickException(f"{error}; before that {ingest.tally}") from error
        except KeyboardInterrupt:  # the usual end of a stream
            _complain("interrupted")
    if ingest.tally.first_bad:
        number, reason = ingest.tally.first_bad
        _complain(f"{ingest.tally.bad} line(s) left out, the first of them line {number}: {reason}")
    click.echo(json.dumps(ingest.tally.as_json()) if as_json else f"{ingest.tally}")


@main.command()
@click.argument("exchange")
@click.argument("symbols", metavar="SYMBOL...", nargs=-1, required=True)
@click.option("--interval", default="1h", show_default=True, help="One that the exchange has.")
@click.option(
    "--history",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Candles to begin with, where none are stored; otherwise those since the last one.",
)
@click.option("--once", is_flag=True, help="End once everything that has closed is stored.")
@ServiceUrl
@Key
@JsonFlag
def feed(
    exchange: str,
    symbols: tuple[str, ...],
    interval: str,
    history: int,
    once: bool,
    url: str,
    key: str | None,
    as_json: bool,
) -> None:
    """Follow SYMBOLs on an EXCHANGE that ccxt knows: put every candle into a running service when it has closed.

    Needs `pip install 'candlecast[feeds]'`, and no key. Goes on through failures of either side until SIGTERM.

    \b
    Example: candlecast feed binance BTC/USDT ETH/USDT --interval 1h --history 500
    """
    from contextlib import closing

    from feeds.exchange import Batch, Feed, Signals, connect
    from feeds.put import FOREVER, PATIENCE, Service

    def log(batch: Batch) -> None:
        click.echo(batch.as_json() if as_json else f"{batch}")

    signals, patience = Signals(), PATIENCE if once else FOREVER
    with (
        signals.watched(),
        closing(Service(url, key=key, patience=patience, say=_complain, sleep=signals.sleep)) as service,
    ):
        Feed(
            connect(exchange),
            service,
            symbols,
            interval,
            history=history,
            patience=patience,
            log=log,
            warn=_complain,
            clock=signals,
        ).run(once=once)


def _complain(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _bars(quiet: bool, title: str | None = None) -> "Iterator[Callable[[str, float | None, str], None]]":
    """A bar for each title that is told of, on a terminal's standard error; what is not watched draws nothing.

    With a `title` that one is there from the start, shows only that work goes on until a share of it is told, and
    leaves nothing behind.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    told = (TextColumn("{task.description:32}"), BarColumn(bar_width=24), TextColumn("{task.fields[share]:>4}"))
    console, tasks = Console(stderr=True), dict[str, TaskID]()
    hidden = quiet or not console.is_terminal
    with Progress(
        *told,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=hidden,
        transient=title is not None,
    ) as progress:

        def track(name: str, done: float | None, note: str) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None, share="", note="")
            if done is not None:
                progress.update(tasks[name], total=1.0, completed=done, share=f"{done:.0%}")
            progress.update(tasks[name], note=note)

        if title is not None:
            track(title, None, "")
        yield track


def _print_table(table: "Table") -> None:
    """In 100 columns, wherever it goes."""
    from rich.console import Console

    Console(width=100).print(table)


@main.group()
def forecasts() -> None:
    """Forecasts as a running service served them."""


@forecasts.command("export")
@click.argument("path", metavar="FILE.parquet", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as-of", help="Only what had been issued by this instant, such as 2026-03-02T14:00Z; default: now.")
@click.option("--symbols", default="", callback=_listed, help="Comma-separated; default: all.")
@ServiceUrl
@Key
@JsonFlag
def export_forecasts(
    path: Path, as_of: str | None, symbols: list[str], url: str, key: str | None, as_json: bool
) -> None:
    """Write one row for every step of the forecasts whose candles came within a week, or have not come yet.

    \b
    Example: candlecast forecasts export forecasts.parquet --as-of 2026-03-02T14:00Z
    """
    from contextlib import closing
    from datetime import UTC, datetime

    from feeds.forecasts import served_forecasts, write_parquet
    from feeds.put import Service

    try:
        instant = datetime.fromisoformat(as_of) if as_of else None
    except ValueError as error:
        raise click.UsageError(f"--as-of is an instant such as 2026-03-02T14:00Z, not {as_of!r}") from error
    if instant and instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    with closing(Service(url, key=key, say=_complain)) as service:
        table = served_forecasts(service, symbols, instant)
    write_parquet(table, path)
    names = sorted(set(table["symbol"]))
    told = json.dumps({"path": str(path), "rows": len(table), "symbols": names})
    click.echo(told if as_json else f"{len(table)} steps of {len(names)} symbols in {path}")


@main.command("sample-data")
@click.argument("folder", default=Path("data/samples"), type=click.Path(file_okay=False, path_type=Path))
@JsonFlag
def sample_data(folder: Path, as_json: bool) -> None:
    """Write real daily candles, one CSV per symbol: AAPL, FB, GOOG, GSPC, IBM, IXIC and MSFT.

    \b
    Example: candlecast sample-data data/samples
    """
    from training.sample_data import write_samples

    with _bars(as_json, title=f"{folder}"):
        paths = [str(path) for path in write_samples(folder)]
    click.echo(json.dumps(paths) if as_json else f"{len(paths)} series in {folder}")


@main.group()
def data() -> None:
    """Candles in files."""


@data.command("check")
@click.argument("folder", default=Path("data/samples"), type=CandleFolder)
@click.option(
    "--val-from", type=Day, help="Training ends here, such as 2009-01-01; default: after 70 % of all candles."
)
@click.option("--test-from", type=Day, help="The test's targets begin here; default: after 85 %.")
@click.option("--unseen", default="", callback=_listed, help="Comma-separated symbols to be held out of training.")
@click.option("--horizon", type=click.IntRange(1), default=64, show_default=True, help="Candles between two parts.")
@click.option("--calendar", default="auto", show_default=True, help="24/7, 24/5 or an exchange such as XNYS.")
@click.option(
    "--summary",
    default=Path("data_summary.csv"),
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the table as a CSV file.",
)
@JsonFlag
def check_data(folder: Path, summary: Path, as_json: bool, **options: Any) -> None:
    """Show what FOLDER's candles hold: parts, gaps, bad rows, suspected splits. Fails only if a file is unreadable.

    \b
    Example: candlecast data check --val-from 2009-01-01 --test-from 2010-06-01 --unseen IBM
    """
    from training.data_check import check, findings_table, write_summary

    findings = check(folder, **options)
    write_summary(findings, summary)
    if as_json:
        click.echo(json.dumps(findings.as_json()))
    else:
        _print_table(findings_table(findings))
    if findings.unreadable:
        raise click.ClickException("\n".join(findings.unreadable))


@main.command()
@click.argument("paths", metavar="[RECIPE]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--base", shell_complete=_stored, help="NAME or NAME@VERSION to fine-tune with a preset, instead of a recipe."
)
@click.option(
    "--preset",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="For --base: adapters in minutes on a laptop, or all weights as upstream fine-tunes them.",
)
@click.option("--data", "folder", type=CandleFolder, help="For --base: CSV or Parquet files.")
@click.option("--name", help="For --base: of the new model; default: the base's with -tuned.")
@click.option("--interval", help="For --base: where the folder has several.")
@click.option(
    "--unseen", default="", callback=_listed, help="For --base: comma-separated symbols to be held out of training."
)
@click.option("--print-recipe", is_flag=True, help="For --base: print the recipe and end.")
@click.option("--if-missing", is_flag=True, help="Skip recipes whose model the store has in production.")
@click.option("--train-root", type=CandleFolder, help="Train on this folder instead of what the recipe splits.")
@click.option("--val-root", type=CandleFolder, help="Validate on this one, all of it later; may be left out.")
@click.option("--test-root", type=CandleFolder, help="Test on this one, later still; symbols only it has are unseen.")
@click.option("--restart", is_flag=True, help="Start anew where a run of the same recipe was ended early.")
@click.option(
    "--tensorboard", type=click.Path(file_okay=False, path_type=Path), help="Write TensorBoard's event files here too."
)
@Device
@HomeFolder
@StoreRoot
@JsonFlag
def train(
    paths: tuple[Path, ...],
    base: str | None,
    preset: str,
    folder: Path | None,
    name: str | None,
    interval: str | None,
    unseen: list[str],
    print_recipe: bool,
    if_missing: bool,
    train_root: Path | None,
    val_root: Path | None,
    test_root: Path | None,
    restart: bool,
    tensorboard: Path | None,
    device: str,
    home: Path,
    store_root: str,
    as_json: bool,
) -> None:
    """Train every RECIPE side by side, or fine-tune a --base; evaluate and put the version into the store.

    A run that was ended early goes on where it was: with the same recipe and candles, to the same weights.
    With per_symbol in its [tune], a recipe makes one version for each symbol; those that are there already stay.
    For several processes: torchrun --nproc-per-node 2 -m candlecast train RECIPE

    \b
    Example: candlecast train training/recipes/toto-demo.toml
             candlecast train --base toto-demo --data data/samples
    """
    from model_store.store import PRODUCTION, ModelStore
    from training.presets import write_recipe
    from training.progress import train_all
    from training.recipe import parse_recipe, read_recipe
    from training.train import verdict

    store = ModelStore(store_root)
    if bool(paths) == bool(base) or bool(base) != bool(folder):
        raise click.UsageError("give a RECIPE, or --base and --data")
    leads = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    if base and folder:
        text = write_recipe(
            preset, store, base, folder, name=name, interval=interval, unseen=unseen, cache=home / "cache"
        )
        if leads:
            click.echo(text, err=not print_recipe)
        if print_recipe:
            return
        recipes = [parse_recipe(text)]
    else:
        recipes = [read_recipe(path) for path in paths]
    if train_root and test_root:
        recipes = [recipe.with_roots(train_root, val_root, test_root) for recipe in recipes]
    elif train_root or val_root or test_root:
        raise click.UsageError("--train-root and --test-root go together")
    how: Any = {"restart": restart, "tensorboard": tensorboard, "device": device}
    if any(recipe.tune and recipe.tune.per_symbol for recipe in recipes):
        if len(recipes) > 1:
            raise click.UsageError("a recipe with per_symbol is trained alone")
        _train_per_symbol(recipes[0], store, home, as_json, **how)
        return
    there = [r.name for r in recipes if if_missing and PRODUCTION in store.aliases(r.name)]
    missing = [recipe for recipe in recipes if recipe.name not in there]
    manifests = [store.manifest(name) for name in there]
    if missing:
        with _bars(as_json or not leads) as track:
            manifests += train_all(missing, store_root, home, track, **how)
        if not leads:
            return
    for manifest in manifests:
        notes = manifest.training.notes if manifest.training else ()
        _print_version(manifest, as_json, [*notes, *(verdict(evaluation) for evaluation in manifest.evaluations)])


def _train_per_symbol(recipe: "Recipe", store: "ModelStore", home: Path, as_json: bool, **options: Any) -> None:
    from training.per_symbol import outcomes_table, train_per_symbol

    with _bars(as_json) as track:
        outcomes = train_per_symbol(recipe, store, track, home, **options)
    if as_json:
        click.echo(json.dumps([outcome.as_json() for outcome in outcomes]))
    else:
        _print_table(outcomes_table(outcomes))
    trained = [outcome for outcome in outcomes if outcome.manifest]
    if trained and not as_json:
        first = trained[0]
        click.echo(f"serve one: candlecast store promote {first.reference} --symbol {first.symbol}")
    if len(trained) < len(outcomes):
        raise click.ClickException(f"{len(outcomes) - len(trained)} of {len(outcomes)} symbols failed")


@main.command()
@click.option("--models", "names", required=True, callback=_listed, help="Comma-separated names or name@version.")
@click.option(
    "--baselines",
    callback=_listed,
    default="naive,ewma",
    show_default=True,
    help="Also of: seasonal, drift; autoets, autotheta with `pip install 'candlecast[stats]'`.",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(["val", "test", "unseen"]),
    multiple=True,
    default=["test"],
    show_default=True,
    help="May be given several times.",
)
@click.option("--horizon", type=click.IntRange(1), help="Steps; default: the shortest horizon among the models'.")
@click.option("--stride", type=click.IntRange(1), default=16, show_default=True, help="Candles between origins.")
@click.option(
    "--samples", type=click.IntRange(1), help="Paths, where a model draws them; default: as it is served, or 64."
)
@click.option("--val-from", type=Day, default="2009-01-01", show_default=True, help="Training ends here.")
@click.option("--test-from", type=Day, default="2010-06-01", show_default=True, help="The test's targets begin here.")
@Unseen
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write metrics.json and report.html into this folder.",
)
@RayCluster
@DataFolder
@StoreRoot
@JsonFlag
def evaluate(
    names: list[str],
    baselines: list[str],
    address: str | None,
    folder: Path,
    store_root: str,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Score models side by side by rolling origins, beside forecasts that need no training.

    \b
    Example: candlecast evaluate --models toto-demo,kronos-demo --part test --part unseen --out report
             OMP_NUM_THREADS=1 candlecast evaluate --models kronos-demo --ray auto --out report
    """
    from contextlib import nullcontext

    from model_store.store import ModelStore
    from training.cluster import cluster
    from training.compare import compare
    from training.report import as_json as entries_json
    from training.report import table, write_report

    with cluster(address) if address else nullcontext() as workers, _bars(as_json) as track:
        judged = compare(ModelStore(store_root), names, baselines, folder, track=track, workers=workers, **options)
    entries = [(each.name, each.evaluation) for each in judged]
    if as_json:
        click.echo(json.dumps(entries_json(entries)))
    else:
        _print_table(table(entries))
    if out:
        write_report(judged, out)
        _complain(f"{out / 'metrics.json'} and {out / 'report.html'} are written")


@main.command()
@click.argument("names", metavar="NAME NAME...", nargs=-1, required=True, shell_complete=_stored)
@click.option("--name", default="ensemble", show_default=True, help="Of the ensemble in the store.")
@click.option("--horizon", type=click.IntRange(1), help="Its most steps; default: the shortest usual one of NAMEs.")
@click.option("--stride", type=click.IntRange(1), default=8, show_default=True, help="Candles between origins.")
@click.option("--val-from", type=Day, default="2009-01-01", show_default=True, help="Weights are learnt from here on.")
@click.option("--test-from", type=Day, default="2010-06-01", show_default=True, help="And judged from here on.")
@Unseen
@DataFolder
@StoreRoot
@JsonFlag
def blend(names: tuple[str, ...], folder: Path, store_root: str, as_json: bool, **options: Any) -> None:
    """Blend versions into an ensemble: weights from the val part, judged on test and unseen windows, and stored.

    \b
    Example: candlecast blend toto-demo kronos-demo
    """
    from model_store.store import ModelStore
    from models.scoring import group_name
    from training.blend import blend
    from training.report import as_json as entries_json
    from training.report import table

    with _bars(as_json) as track:
        found = blend(ModelStore(store_root), names, folder, track=track, **options)
    manifest = found.manifest
    if as_json:
        told = {"model": manifest.model, "version": manifest.version, "weights": found.weights}
        click.echo(json.dumps(told | {"notes": found.notes, "evaluations": entries_json(found.entries)}))
        return
    _print_table(table(found.entries))
    shares = [
        f"steps {group_name(group)}: {', '.join(f'{share:.2f} {name}' for share, name in zip(row, names, strict=True))}"
        for group, row in enumerate(found.weights)
    ]
    _print_version(manifest, as_json, [*shares, *found.notes])


@main.command()
@click.argument(
    "path", metavar="[RECIPE]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--model",
    "reference",
    shell_complete=_stored,
    help="NAME or NAME@VERSION whose serving settings are searched, without training.",
)
@click.option("--data", "folder", type=CandleFolder, help="For --model: candles; default: those of its training.")
@click.option(
    "--search",
    "space",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For --model: a TOML file whose [search] says what is tried, as a recipe's does.",
)
@click.option(
    "--try",
    "found",
    type=click.Path(exists=True, path_type=Path),
    help="For --model: settings that were found elsewhere, tried first; a JSON file, or a folder of one per symbol.",
)
@click.option("--per-symbol", is_flag=True, help="For --model: a search and a child version for each symbol.")
@click.option("--trials", type=click.IntRange(1), default=24, show_default=True, help="Settings that are tried.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes; 8 at most are busy.")
@click.option("--stride", type=click.IntRange(1), default=4, show_default=True, help="Candles between origins.")
@click.option("--horizon", type=click.IntRange(1), help="Steps that trials forecast; default: the recipe's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@RayCluster
@Device
@HomeFolder
@StoreRoot
@JsonFlag
def tune(
    path: Path | None,
    reference: str | None,
    folder: Path | None,
    space: Path | None,
    found: Path | None,
    per_symbol: bool,
    address: str | None,
    home: Path,
    store_root: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Search RECIPE's training settings, or the serving settings of a stored --model, and keep what is proven.

    The earlier part of the val windows is searched, and the later part then decides about the best trial alone: it
    becomes the candidate if the paired interval of its gain excludes zero. Test and unseen windows choose nothing.
    The same command goes on where it was ended. Exit code 3: nothing is kept.

    \b
    Example: candlecast tune training/recipes/kronos-demo.toml --trials 16
             candlecast tune --model kronos-demo --workers 2
             candlecast tune --model kronos-small --per-symbol --try hyperparams/kronos
    """
    from contextlib import nullcontext
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise click.ClickException("a search needs pip install 'candlecast[tune]'")
    from model_store.store import ModelStore
    from training.cluster import cluster
    from training.imported import read_imported
    from training.recipe import read_recipe, read_search
    from training.study import Plan
    from training.tune import tune_recipe, tune_version

    if bool(path) == bool(reference) or (path and (folder or space or found or per_symbol)):
        raise click.UsageError("give a RECIPE, or --model with its options")
    if address and (options["workers"] > 1 or options["device"] != "cpu"):
        raise click.UsageError("with --ray the cluster has the workers, and their device is the CPU")
    store = ModelStore(store_root)
    how: Any = {"per_symbol": per_symbol, "imported": read_imported(found) if found else (), "warn": _complain}
    with cluster(address) if address else nullcontext() as workers, _bars(as_json) as track:
        plan = Plan(cluster=workers, **options)
        if reference:
            knobs = read_search(space) if space else None
            tuned = list(tune_version(reference, store, track, home, plan, folder, knobs, **how))
        elif path:
            tuned = [tune_recipe(read_recipe(path), store, track, home, plan)]
    if as_json:
        click.echo(json.dumps([each.as_json() for each in tuned]))
    for each in tuned if not as_json else ():
        click.echo(each.sentence)
        if each.manifest:
            _print_version(each.manifest, False, ["to serve it: candlecast store promote " + each.promotable])
        click.echo(f"  {each.seconds:.0f} s, pictures in {each.report}")
    if not any(each.manifest for each in tuned):
        sys.exit(NOTHING_KEPT)


@main.command()
@click.argument("folder", default=Path("data/samples"), type=CandleFolder)
@click.option(
    "--models",
    "names",
    default="toto-demo,kronos-demo",
    show_default=True,
    callback=_listed,
    help="Names in the store.",
)
@click.option("--from", "day", help="First day to forecast from; default: what no model was trained or validated on.")
@click.option("--every", type=click.IntRange(1), default=40, show_default=True, help="Candles between two forecasts.")
@click.option("--horizon", type=click.IntRange(1), default=30, show_default=True)
@click.option("--speed", default="max", show_default=True, help="Most candles of all symbols in a second.")
@StoreRoot
@JsonFlag
def replay(
    folder: Path,
    names: list[str],
    day: str | None,
    every: int,
    horizon: int,
    speed: str,
    store_root: str,
    as_json: bool,
) -> None:
    """Play FOLDER's candles through forecasts, scores, drift, recalibration and choice of model, on a state of its own.

    \b
    Example: candlecast replay data/samples --speed max
    """
    import asyncio
    import time

    from model_store.store import ModelStore
    from service.replay import Plan, first_unseen, replay_from_nothing, series_of, utc_millis
    from service.replay_table import replay_table
    from training.candle_files import load

    with _bars(as_json, title="candles") as track:
        start = utc_millis(day) if day else first_unseen(ModelStore(store_root), names)
        plan = Plan(start, every, horizon, _speed(speed))
        series = [series_of(item.symbol, item.interval, item.timestamps, item.candles) for item in load(folder)[0]]
        began = time.monotonic()

        def played(done: int, total: int) -> None:
            track("candles", done / total, f"{done} of {total}")

        replayed = asyncio.run(replay_from_nothing(store_root, names, series, plan, played))
    if as_json:
        click.echo(json.dumps(replayed.as_json()))
        return
    _print_table(replay_table(replayed))
    seconds = time.monotonic() - began
    click.echo(f"{seconds:.0f} s with loading: {replayed.candles / seconds:.0f} candles of all symbols a second")


def _speed(text: str) -> float:
    if text == "max":
        return float("inf")
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise click.UsageError("--speed is `max` or a number above 0")
    return speed


@main.command()
@click.argument("symbol")
@click.option(
    "--model",
    "reference",
    default="toto-demo",
    show_default=True,
    shell_complete=_stored,
    help="Name or name@version in the store.",
)
@click.option("--horizon", type=click.IntRange(1), help="Steps; default: 30 for Kronos, 64 for Toto.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--samples", type=click.IntRange(1, 512), default=64, show_default=True, help="Paths, on Kronos.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the fan chart to this PNG.")
@DataFolder
@StoreRoot
@JsonFlag
def forecast(symbol: str, plot: Path | None, folder: Path, store_root: str, as_json: bool, **options: Any) -> None:
    """Forecast SYMBOL from a folder of candles, without a service.

    \b
    Example: candlecast forecast AAPL --model kronos-demo --plot aapl.png
    """
    from model_store.store import ModelStore
    from training.glance import draw_fan, forecast_symbol, forecast_table

    glance = forecast_symbol(ModelStore(store_root), symbol, folder, **options)
    if plot:
        draw_fan(glance, plot)
    if as_json:
        click.echo(json.dumps(glance.as_json()))
    else:
        _print_table(forecast_table(glance))


@main.command()
@click.argument("reference", shell_complete=_stored)
@click.option("--runtime", type=click.Choice(["eager", "compiled", "onnx"]), default="compiled", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="bfloat16 needs eager or compiled, int8 needs onnx.",
)
@click.option("--windows", default=96, show_default=True, help="Forecasts that reduced precision is judged by.")
@click.option("--device", default="cpu", show_default=True, help="Torch device to build for.")
@HomeFolder
@DataFolder
@StoreRoot
@JsonFlag
def export(
    reference: str,
    runtime: str,
    dtype: str,
    windows: int,
    device: str,
    home: Path,
    folder: Path,
    store_root: str,
    as_json: bool,
) -> None:
    """Build a faster runtime of NAME or NAME@VERSION and store it, if its forecasts agree with float32's.

    A compiled one takes minutes and a C++ compiler. The service uses what is fastest on its machine.

    \b
    Example: candlecast export toto-demo --runtime eager --dtype bfloat16
    """
    from model_store.artefacts import machine_key
    from model_store.store import ModelStore
    from models.runtimes.kinds import KINDS
    from training.export import export
    from training.packed import pack_folder

    kind = KINDS.get(f"{runtime}-{dtype}")
    if kind is None:
        raise ValueError(f"{runtime} has no {dtype}: use {', '.join(KINDS)}")
    with _bars(as_json, title=f"{reference} {kind.label}"):
        series = pack_folder(folder, home / "cache")
        artefact = export(
            ModelStore(store_root), reference, kind, series, key=machine_key(home), device=device, windows=windows
        )
    if as_json:
        click.echo(artefact.model_dump_json())
        return
    click.echo(f"{artefact.model}@{artefact.version} {artefact.label}, built in {artefact.build_seconds:.0f} s")
    for line in parity_lines(artefact.parity):
        click.echo(f"  {line}")


def _key_file(_: click.Context, __: click.Parameter, path: Path | None) -> "KeyFile":
    from service.keys import KEYS_FILE, KeyFile

    return KeyFile(path or Path(os.environ.get("CANDLECAST_HOME", "var")) / KEYS_FILE)


def _duration(_: click.Context, __: click.Parameter, text: str | None) -> timedelta | None:
    from models.candles import interval_ms

    return None if text is None else timedelta(milliseconds=interval_ms(text))


KeysFile = click.option(
    "--file",
    "keys_file",
    envvar="CANDLECAST_KEYS_FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_key_file,
    help="Where the keys' hashes are kept; default: keys.json in CANDLECAST_HOME.",
)


@main.group()
def keys() -> None:
    """Keys that callers show, told once and kept as hashes; a running service knows of every change in a second."""


@keys.command("make")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["forecast", "ingest", "admin"]),
    default=["forecast"],
    show_default=True,
    help="May be given several times: forecast asks and reads, ingest stores candles, admin promotes models.",
)
@click.option("--symbol", "symbols", multiple=True, help="Only for such symbols, as BTC-*; may be given several times.")
@click.option("--quota", help="Candles that it may ask for, as 100000/minute; of all keys of this NAME together.")
@click.option("--expires", "lasts", callback=_duration, help="Counts for so long, as 90d; default: until revoked.")
@click.option("--env", default="live", show_default=True, help="A word within the key, such as live or test.")
@KeysFile
@JsonFlag
def make_key(keys_file: "KeyFile", quota: str | None, lasts: timedelta | None, as_json: bool, **options: Any) -> None:
    """Make a key for the client NAME and show it, this once.

    \b
    Example: candlecast keys make trader --scope ingest --symbol "BTC-*" --quota 100000/minute
    """
    from service.keys import grant, parse_quota

    _show_key(*keys_file.make(grant(**options, quota=parse_quota(quota) if quota else None), lasts), as_json)


@keys.command("list")
@KeysFile
@JsonFlag
def list_keys(keys_file: "KeyFile", as_json: bool) -> None:
    """Show every key that was made, by its public name, and what it may do; never the keys themselves.

    \b
    Example: candlecast keys list --json
    """
    found = [_key_facts(key) for key in keys_file.all()]
    if as_json:
        click.echo(json.dumps(found))
        return
    for facts in found:
        click.echo("  ".join(f"{name}={value}" for name, value in facts.items() if value))


@keys.command()
@click.argument("kid")
@KeysFile
@JsonFlag
def revoke(kid: str, keys_file: "KeyFile", as_json: bool) -> None:
    """End the key of the public name KID.

    \b
    Example: candlecast keys revoke 3fJx0Qm2Zk
    """
    facts = _key_facts(keys_file.revoke(kid))
    click.echo(json.dumps(facts) if as_json else f"{kid} of {facts['name']} counts no more")


@keys.command()
@click.argument("kid")
@click.option("--overlap", default="7d", show_default=True, callback=_duration, help="How long KID goes on.")
@KeysFile
@JsonFlag
def rotate(kid: str, overlap: timedelta, keys_file: "KeyFile", as_json: bool) -> None:
    """Make a key that may do what KID may, and let KID go on until its holder has changed over.

    \b
    Example: candlecast keys rotate 3fJx0Qm2Zk --overlap 24h
    """
    _show_key(*keys_file.rotate(kid, overlap), as_json)


def _show_key(key: str, record: "ApiKey", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"key": key, **_key_facts(record)}))
    else:
        click.echo(key)
        _complain(
            "Shown this once. Send it as `Authorization: Bearer KEY`; candlecast's own verbs read CANDLECAST_KEY."
        )


def _key_facts(key: "ApiKey") -> dict[str, Any]:
    grant = key.grant
    ends = {"expires_at": key.expires_at, "revoked_at": key.revoked_at}
    return {
        "kid": key.kid,
        "name": grant.name,
        "env": grant.env,
        "scopes": list(grant.scopes),
        "symbols": list(grant.symbols),
        "quota": str(grant.quota) if grant.quota else None,
        "created_at": key.created_at.isoformat(),
        **{name: instant.isoformat() if instant else None for name, instant in ends.items()},
    }


@main.group()
def models() -> None:
    """What runs the models on this machine."""


@models.command("time")
@click.argument("references", metavar="[NAME]...", nargs=-1, shell_complete=_stored)
@Device
@click.option("--threads", envvar="CANDLECAST_THREADS", type=click.IntRange(min=1), help="As the service has them.")
@HomeFolder
@StoreRoot
@JsonFlag
def time_models(
    references: tuple[str, ...], device: str, threads: int | None, home: Path, store_root: str, as_json: bool
) -> None:
    """Time every runtime of NAME (by default of all in production) again and remember the fastest.

    \b
    Example: candlecast models time toto-demo
    """
    from service.engine.selection import time_again

    with _bars(as_json, title=", ".join(references) or f"{store_root}"):
        choices = time_again(store_root, references, home=home, device=device, threads=threads)
    if not choices:
        _complain(f"{store_root} has nothing in production: candlecast store promote NAME")
    if as_json:
        click.echo(json.dumps({exact: asdict(choice) for exact, choice in choices.items()}))
        return
    for exact, choice in choices.items():
        click.echo(f"{exact} runs {choice.label}")
        for label, (one, eight) in choice.times_ms.items():
            click.echo(f"  {label:<18} {one:8.1f} ms alone, {eight:8.1f} ms for a batch of 8")


@main.group()
def store() -> None:
    """Versions of models, in a folder or a bucket."""


@store.command("list")
@StoreRoot
@JsonFlag
def list_versions(store_root: str, as_json: bool) -> None:
    """List every version with its aliases.

    \b
    Example: candlecast store list --store s3://bucket/models
    """
    from rich import box
    from rich.table import Table

    from model_store.store import ModelStore

    root = ModelStore(store_root)
    rows = [_row(root, model, version) for model in root.models() for version in root.versions(model)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo(f"{root.where} is empty: candlecast train RECIPE, or candlecast store import SOURCE")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    _print_table(table)


def _row(root: "ModelStore", model: str, version: str) -> dict[str, str]:
    manifest = root.manifest(f"{model}@{version}")
    aliases = ",".join(sorted(alias for alias, target in root.aliases(model).items() if target == version))
    size = sum(entry.bytes for entry in manifest.files.values())
    return {
        "model": f"{model}@{version}",
        "symbol": manifest.symbol or "*",
        "family": manifest.family,
        "size": f"{size / 1e6:.1f}MB",
        "created_at": manifest.created_at,
        "aliases": aliases or "-",
    }


@store.command()
@click.argument("reference", shell_complete=_stored)
@StoreRoot
@JsonFlag
def show(reference: str, store_root: str, as_json: bool) -> None:
    """Print the manifest of NAME, NAME@VERSION or NAME@ALIAS: its scores, or all of it with --json.

    \b
    Example: candlecast store show toto-demo@candidate
    """
    from model_store.store import ModelStore
    from training.report import table

    manifest = ModelStore(store_root).manifest(reference)
    name = f"{manifest.model}@{manifest.version}"
    notes = [f"{manifest.family}, {manifest.origin.kind} from {manifest.origin.source}, {manifest.created_at}"]
    _print_version(manifest, as_json, [*notes, "" if manifest.evaluations else "no evaluation"])
    if manifest.evaluations and not as_json:
        _print_table(table([(name, evaluation) for evaluation in manifest.evaluations]))


@store.command()
@click.argument("references", metavar="NAME...", nargs=-1, required=True, shell_complete=_stored)
@click.option("--wait", default=0.0, metavar="SECONDS", help="Longest wait for a NAME that the store lacks so far.")
@StoreRoot
@JsonFlag
def verify(references: tuple[str, ...], wait: float, store_root: str, as_json: bool) -> None:
    """Hash every file of each NAME, NAME@VERSION or NAME@ALIAS against its manifest.

    \b
    Example: candlecast store verify toto-demo kronos-demo --wait 600
    """
    import time

    from model_store.store import ModelStore

    root, until = ModelStore(store_root), time.monotonic() + wait
    for reference in references:
        with _bars(as_json, title=reference):
            _await_version(root, reference, until)
            manifest = root.verify(reference)
        _print_version(manifest, as_json, ["every file is what was stored"])


def _await_version(root: "ModelStore", reference: str, until: float) -> None:
    """Return once the store has `reference`; VersionNotFound if it has not by `until`, of the monotonic clock."""
    import time

    from model_store.files import VersionNotFound

    while True:
        try:
            root.resolve(reference)
            return
        except VersionNotFound as error:
            if time.monotonic() >= until:
                raise
            _complain(f"waiting: {error}")
        time.sleep(2)


@store.command("import")
@click.argument("source", required=False)
@click.option("--legacy-pt", type=click.Path(exists=True, dir_okay=False), help="A file of torch.save, instead.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="Its config.json, if none is in or by it.")
@click.option("--name", help="Name of the model in the store; default: SOURCE's last part in lower case.")
@click.option("--tokenizer", metavar="SOURCE", help="Kronos' tokenizer.")
@click.option("--licence", help="SPDX identifier of the weights' licence; default: what their model card says.")
@StoreRoot
@JsonFlag
def import_version(
    source: str | None, legacy_pt: str | None, name: str | None, store_root: str, as_json: bool, **options: Any
) -> None:
    """Import a checkpoint that SOURCE names: hf://OWNER/NAME[@REVISION], or a folder with config.json and
    model.safetensors.

    A Kronos tokenizer lies in the folder's tokenizer/, is given by --tokenizer, or comes from the hub like its
    predictor. A trainer's best_model.pt is read by --legacy-pt, without running what it holds.

    \b
    Examples: candlecast store import hf://NeoQuasar/Kronos-small
              candlecast store import ./Toto-Open-Base-1.0 --name toto-base
              candlecast store import --legacy-pt runs/best_model.pt --name toto-mine
    """
    from model_store.store import ModelStore
    from model_store.upstream import default_name, import_checkpoint

    if (source is None) == (legacy_pt is None):
        raise click.UsageError("say either SOURCE or --legacy-pt FILE")
    if legacy_pt and not name:
        raise click.UsageError("--legacy-pt needs --name")
    if source and options["config"]:
        raise click.UsageError("--config is for --legacy-pt: a SOURCE has its own")
    place = source or Path(str(legacy_pt))
    manifest = import_checkpoint(ModelStore(store_root), place, name or default_name(str(place)), **options)
    _print_version(manifest, as_json, [f"serve it: candlecast store promote {manifest.model}@{manifest.version}"])


@store.command()
@click.argument("reference", shell_complete=_stored)
@click.option("--symbol", help="Serve this symbol alone by it, such as AAPL.")
@click.option("--force", metavar="REASON", help="Promote against the gate's advice; the reason is recorded.")
@click.option("--url", help="Show first what the shadow of the service there was worth.")
@Key
@Reason
@StoreRoot
@JsonFlag
def promote(
    reference: str,
    symbol: str | None,
    force: str | None,
    url: str | None,
    key: str | None,
    reason: str | None,
    store_root: str,
    as_json: bool,
) -> None:
    """Serve NAME (its candidate) or NAME@VERSION under NAME from now on.

    The gate asks for its bytes as they were stored, runtimes that agree with it, the forecast that it made then, and
    scores no worse than those of the version that serves now.

    \b
    Example: candlecast store promote toto-demo@0123456789ab --force "only this one has IBM's split"
    """
    from model_store.store import ModelStore

    for line in _worth_of_shadow(url, key, reference.partition("@")[0]) if url else ():
        _complain(line)
    manifest, gate = ModelStore(store_root).promote(reference, symbol=symbol, force=force, reason=reason)
    _print_version(manifest, as_json, [*gate, f"now serves {f'{symbol} ' if symbol else ''}as {manifest.model}"])


def _worth_of_shadow(url: str, key: str | None, name: str) -> list[str]:
    """What the service at `url` says of a model's shadow, a line for each interval and group of steps."""
    import urllib.error
    import urllib.request

    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{url}/models/{name}/shadow", headers=headers)  # noqa: S310 # who calls names it
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        return [f"{url} has no shadow of {name}: {error}"]
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{url} does not answer ({error}): without --url it is not asked") from error
    lines = []
    for each in found["compared"]:
        ratio, interval = each["relative_mae"], each["relative_mae_interval"]
        told = "unknown" if ratio is None else f"{ratio:.3f} x production's"
        told += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        lines.append(f"shadow {found['shadow']}, {each['interval']} steps {each['steps']}: error {told}")
    return lines or [f"shadow {found['shadow']} has not been scored yet"]


@store.command()
@click.argument("name", shell_complete=_stored)
@click.option("--symbol", help="Of this symbol alone.")
@Reason
@StoreRoot
@JsonFlag
def rollback(name: str, symbol: str | None, reason: str | None, store_root: str, as_json: bool) -> None:
    """Serve again what served before as NAME; done twice, it is undone.

    \b
    Example: candlecast store rollback toto-demo --reason "bands too narrow since noon"
    """
    from model_store.store import ModelStore

    manifest = ModelStore(store_root).rollback(name, symbol=symbol, reason=reason)
    _print_version(manifest, as_json, [f"now serves {f'{symbol} ' if symbol else ''}as {manifest.model}"])


@store.command()
@click.argument("name", shell_complete=_stored)
@StoreRoot
@JsonFlag
def log(name: str, store_root: str, as_json: bool) -> None:
    """Show who did what with NAME's versions, when and why.

    \b
    Example: candlecast store log toto-demo
    """
    from model_store.files import VersionNotFound
    from model_store.store import ModelStore

    root = ModelStore(store_root)
    entries = root.log(name)
    if not entries and not root.versions(name):
        raise VersionNotFound(f"the store has no model called {name}")
    if as_json:
        click.echo(json.dumps(entries))
        return
    for entry in entries:
        facts = {key: value for key, value in entry.items() if key not in ("at", "event", "by") and value}
        told = "  ".join(f"{key}={'; '.join(v) if isinstance(v, list) else v}" for key, v in facts.items())
        click.echo(f"{entry['at'][:19]}Z  {entry['by']}  {entry['event']}  {told}")


@store.command()
@click.argument("reference", shell_complete=_stored)
@click.argument("other", shell_complete=_stored)
@StoreRoot
@JsonFlag
def diff(reference: str, other: str, store_root: str, as_json: bool) -> None:
    """Show what differs between two versions: how they were made, what they can take, and every score of both.

    \b
    Example: candlecast store diff toto-demo toto-demo@candidate
    """
    from rich.table import Table

    from model_store.diff import differences
    from model_store.store import ModelStore

    root = ModelStore(store_root)
    one, two = root.manifest(reference), root.manifest(other)
    rows = differences(one, two, root.config(one), root.config(two))
    names = [f"{manifest.model}@{manifest.version}" for manifest in (one, two)]
    if as_json:
        click.echo(json.dumps([dict(zip(("what", *names), row, strict=True)) for row in rows]))
        return
    table = Table()
    for heading in ("", *names):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print_table(table)


@store.command()
@click.option("--keep", type=click.IntRange(1), default=3, show_default=True, help="Newest versions of every name.")
@click.option("--delete", is_flag=True, help="Do it; otherwise only show what would go.")
@Reason
@StoreRoot
@JsonFlag
def gc(keep: int, delete: bool, reason: str | None, store_root: str, as_json: bool) -> None:
    """Delete versions that nothing uses: no alias, no running service, and no version that was made from them.

    A service that cannot write to the store cannot say what it uses: --keep enough for those.

    \b
    Example: candlecast store gc --keep 5 --delete
    """
    from model_store.gc import collect, unused
    from model_store.store import ModelStore

    root = ModelStore(store_root)
    with _bars(as_json, title=f"{store_root}"):
        found = collect(root, keep=keep, reason=reason) if delete else unused(root, keep=keep)
    if as_json:
        click.echo(json.dumps([f"{manifest.model}@{manifest.version}" for manifest in found]))
        return
    for manifest in found:
        click.echo(f"{manifest.model}@{manifest.version}  {manifest.created_at}")
    size = sum(entry.bytes for manifest in found for entry in manifest.files.values())
    click.echo(f"{len(found)} versions of {size / 1e6:.1f} MB {'are deleted' if delete else 'would go: add --delete'}")


@store.command()
@click.argument("reference", shell_complete=_stored)
@click.argument("file", metavar="FILE.tar", type=click.Path(dir_okay=False, path_type=Path))
@StoreRoot
@JsonFlag
def pack(reference: str, file: Path, store_root: str, as_json: bool) -> None:
    """Write a version to FILE.tar, to be carried to another store; runtimes and an ensemble's members stay behind.

    \b
    Example: candlecast store pack toto-demo toto-demo.tar
    """
    from model_store.store import ModelStore
    from model_store.tar import pack

    root = ModelStore(store_root)
    manifest = pack(root, reference, file)
    apart = [f"pack its member too: {member}" for member in root.members(manifest)]
    _print_version(manifest, as_json, [f"is in {file}", *apart])


@store.command()
@click.argument("file", metavar="FILE.tar", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@Reason
@StoreRoot
@JsonFlag
def unpack(file: Path, reason: str | None, store_root: str, as_json: bool) -> None:
    """Store the version in FILE.tar, if it is whole and nothing else is in there.

    \b
    Example: candlecast store unpack toto-demo.tar
    """
    from model_store.store import ModelStore
    from model_store.tar import unpack

    manifest = unpack(ModelStore(store_root), file, reason=reason)
    _print_version(manifest, as_json, [f"serve it: candlecast store promote {manifest.model}@{manifest.version}"])


@store.command()
def schema() -> None:
    """Print the JSON Schema of a manifest.

    \b
    Example: candlecast store schema > manifest.schema.json
    """
    from model_store.manifest import Manifest

    click.echo(json.dumps(Manifest.model_json_schema(), indent=2))


@store.command()
@click.argument("name", shell_complete=_stored)
@click.argument("version", required=False)
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True, help="Of requests."
)
@click.option("--off", is_flag=True, help="End it.")
@Reason
@StoreRoot
@JsonFlag
def shadow(
    name: str, version: str | None, share: float, off: bool, reason: str | None, store_root: str, as_json: bool
) -> None:
    """Let VERSION forecast a share of NAME's requests too: scored like what is served, and seen by no caller.

    \b
    Example: candlecast store shadow toto-demo candidate --share 0.1
    """
    from model_store.store import ModelStore

    if off == bool(version):
        raise click.UsageError("give a VERSION, or --off")
    root = ModelStore(store_root)
    if version:
        root.set_shadow(name, version, share, reason=reason)
    else:
        root.end_shadow(name, reason=reason)
    version, share = root.shadow(name) or (None, 0.0)
    if as_json:
        click.echo(json.dumps({"model": name, "version": version, "share": share}))
    else:
        click.echo(f"{name}@{version} forecasts {share:.0%} of requests too" if version else f"{name} has no shadow")


@store.command()
@click.argument("reference", shell_complete=_stored)
@click.option(
    "--key",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="PEM file of the private Ed25519 key.",
)
@StoreRoot
@JsonFlag
def sign(reference: str, key: Path, store_root: str, as_json: bool) -> None:
    """Verify NAME, NAME@VERSION or NAME@ALIAS and sign it, for readers that trust the key's public half alone.

    \b
    Example: candlecast store sign toto-base@0123456789ab --key store.key
    """
    from model_store.store import ModelStore

    _print_version(ModelStore(store_root).sign(reference, key), as_json, ["signed"])


def parity_lines(parity: "Parity") -> list[str]:
    """The comparison with float32, for people."""
    worst = max(parity.functions.items(), key=lambda pair: pair[1])
    lines = [f"largest error of a function {worst[1]:.1e} ({worst[0]})"]
    if parity.equal_tokens is not None:
        lines[0] += f", equal tokens {parity.equal_tokens:.2%}"
    if parity.mae_log_return is not None and parity.mae_log_return_float32:
        change = parity.mae_log_return / parity.mae_log_return_float32 - 1
        lines.append(f"MAE over {parity.windows} windows {change:+.3%}")
        for level, shift in parity.quantile_shift.items():
            seed = parity.quantile_shift_of_a_seed.get(level)
            beside = f" (another seed: {seed:.2%})" if seed else ""
            bias = parity.quantile_bias[level]
            lines.append(f"{level} quantile moved by {shift:.2%} of the 80 % band{beside}, on average {bias:+.2%}")
    return lines


def _print_version(manifest: "Manifest", as_json: bool, notes: list[str]) -> None:
    if as_json:
        click.echo(manifest.model_dump_json())
        return
    click.echo(f"{manifest.model}@{manifest.version}")
    for note in notes:
        click.echo(f"  {note}")


if __name__ == "__main__":
    sys.exit(main())
