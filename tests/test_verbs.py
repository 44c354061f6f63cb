"""Every verb at once: what its help shows, what its tables fit into, how it fails, what a shell completes."""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from rich.console import Console
from rich.table import Table

import candlecast
from candlecast import main
from model_store.gate import PromotionRefused
from service.api.schemas import ModelAccuracyAnswer, SeriesAccuracyAnswer
from service.replay import Replayed
from service.replay_table import replay_table
from training.data_check import Checked, Findings, findings_table
from training.per_symbol import Outcome, outcomes_table

PRINTS_NO_TEXT = {"store schema", "completion"}  # JSON, and a script
LONG = "X" * 40


def verbs(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from verbs(each, (*path, name))
    else:
        yield " ".join(path), command


VERBS = dict(verbs())


def run(*words: str, **env: str) -> Result:
    return CliRunner().invoke(main, words, env=env)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples_with_options_that_it_has(verb: str) -> None:
    shown = VERBS[verb].help or ""
    assert "Example" in shown
    examples = [line.partition(f"candlecast {verb}")[2] for line in shown.splitlines() if f"candlecast {verb}" in line]
    assert examples
    known = {name for each in VERBS[verb].params for name in (*each.opts, *each.secondary_opts)}
    assert set(re.findall(r" (--[a-z-]+)", " ".join(examples))) <= known


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - PRINTS_NO_TEXT))
def test_every_verb_answers_machines(verb: str) -> None:
    assert any("--json" in each.opts for each in VERBS[verb].params)


def test_help_fits_100_columns_and_lists_the_exit_codes() -> None:
    shown = [line for words in ("", *VERBS) for line in run(*words.split(), "--help").output.splitlines()]
    assert [line for line in shown if len(line) > 100] == []
    assert f"{candlecast.NOTHING_KEPT}  nothing was kept" in run("--help").output


# -- tables ----------------------------------------------------------------------------------------


def printed(table: Table) -> str:
    console = Console(width=100)
    with console.capture() as shown:
        console.print(table)
    assert all(len(line) <= 100 for line in shown.get().splitlines())
    return shown.get()


def test_the_table_of_data_check_cuts_nothing_off() -> None:
    minute = "2024-01-01T00:00Z"
    one = Checked(LONG, "15m", minute, "2025-12-31T23:45Z", 1_234_567, 864_196, 185_185, 185_186, True, (LONG * 3,))
    text = printed(findings_table(Findings(None, (one,), ())))
    assert text.count("X") == 4 * len(LONG)
    assert "1234567" in text
    assert minute in text


def test_the_table_of_a_training_per_symbol_cuts_nothing_off() -> None:
    assert printed(outcomes_table([Outcome(LONG, None, f"failed: {LONG}")])).count("X") == 2 * len(LONG)


def test_the_table_of_a_replay_cuts_nothing_off() -> None:
    interval = (-0.123, 0.123)
    numbers = dict.fromkeys(("mae_log_return", "naive_mae_log_return", "bias_log_return", "coverage_80"), 0.876)
    numbers |= dict.fromkeys(("interval_score", "coverage_80_calibrated", "interval_score_calibrated"), 0.5)
    scores = {"steps": 1, "blocks": 1, "mae_price": None, "naive_mae_price": None, "relative_mae": None, **numbers}
    scores |= {"relative_mae_interval": None, "skill_vs_naive": 0.1, "skill_interval": interval, "pinball": {"0.5": 1}}
    drift = {"state": "insufficient", "score": 0.0, "blocks": 1, "delay_days": None}
    standing = {"model": LONG, "version": "1" * 12, "steps": "65-512", "all": scores, "recent": scores, "drift": drift}
    models = [ModelAccuracyAnswer.model_validate({**standing, "interval": "1d", "symbols": 1})]
    series: Any = SeriesAccuracyAnswer.model_construct(standings=models)
    text = printed(replay_table(Replayed(1, 1, models, {f"{LONG}:1d": series}, [], [])))
    assert text.count("X") == 3 * len(LONG)
    assert text.count("[-0.123, +0.123]") == 2
    assert text.count("insufficient") == 2


# -- progress --------------------------------------------------------------------------------------

LONG_WORK = {  # what takes more than a moment, with all that it needs to begin; `feed` tells every batch instead
    "backup": "b.tar",
    "blend": "toto-demo kronos-demo --data .",
    "evaluate": "--models toto-demo --data .",
    "export": "toto-demo --runtime onnx --data .",
    "ingest": "b.csv",
    "models time": "",
    "replay": ".",
    "restore": "b.csv",
    "sample-data": "",
    "store gc": "",
    "store verify": "toto-demo",
    "train": f"{Path(__file__).parents[1] / 'training/recipes/toto-demo.toml'}",
    "tune": "--model toto-demo",
}


@pytest.mark.parametrize("verb", LONG_WORK)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
def test_long_work_begins_by_showing_that_it_goes_on(
    verb: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Shown(BaseException):
        pass

    def shown(quiet: bool, **_: Any) -> None:
        raise Shown(quiet)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(candlecast, "_bars", shown)
    (tmp_path / "b.csv").write_text("timestamp,open,high,low,close,volume\n")
    with pytest.raises(Shown) as found:
        CliRunner().invoke(main, [*verb.split(), *LONG_WORK[verb].split(), *flags])
    assert found.value.args == (bool(flags),)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("title", [None, "toto-demo"])
def test_progress_is_drawn_on_a_terminal_and_nowhere_else(
    title: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for stderr, quiet in ((Terminal(), False), (Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        with candlecast._bars(quiet, title) as track:
            track("toto-demo", 0.42, "a note")
        shown[type(stderr), quiet] = stderr.getvalue()
    drawn = shown.pop((Terminal, False))
    assert all(part in drawn for part in ("toto-demo", "42%", "a note"))
    assert set(shown.values()) == {""}
    assert capsys.readouterr().out == ""


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("forecast AAPL --data nowhere", 2, "`candlecast sample-data nowhere`"),
        ("replay nowhere", 2, "`candlecast sample-data nowhere`"),
        ("store show nobody --store nowhere", 1, "`candlecast store list`"),
        ("store log nobody --store nowhere", 1, "`candlecast store list`"),
        ("health --port 1", 1, "`candlecast serve`"),
        ("store promote nobody --url http://127.0.0.1:1", 1, "without --url"),
        ("forecasts export f.parquet --as-of yesterday", 2, "2026-03-02T14:00Z"),
        ("tune broken.toml", 1, "broken.toml is not TOML"),
        ("serve", 1, "CANDLECAST_PORT: Input should be a valid integer"),
        ("forcast AAPL", 2, "forecast"),
    ],
)
def test_an_error_says_what_to_do_next(
    words: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("{")
    done = run(*words.split(), CANDLECAST_PORT="x" if words == "serve" else "8000")
    assert (done.exit_code, said in done.output) == (code, True), done.output


def test_what_a_gate_refuses_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PromotionRefused("worse")

    monkeypatch.setattr("model_store.store.ModelStore.promote", refuse)
    assert run("store", "promote", "demo").exit_code == candlecast.NOTHING_KEPT


# -- completion ------------------------------------------------------------------------------------


def test_a_shell_completes_verbs_options_and_the_names_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("toto-demo", "toto-mine", "kronos-demo", ".lock"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CANDLECAST_STORE_ROOT", str(tmp_path))
    shell = BashComplete(main, {}, "candlecast", "_CANDLECAST_COMPLETE")

    def completed(*words: str) -> list[str]:
        return [each.value for each in shell.get_completions(list(words[:-1]), words[-1])]

    assert completed("fore") == ["forecast", "forecasts"]
    assert "--horizon" in completed("forecast", "--h")
    assert completed("store", "show", "toto") == ["toto-demo", "toto-mine"]
    assert completed("forecast", "AAPL", "--model", "") == ["kronos-demo", "toto-demo", "toto-mine"]
    assert completed("store", "show", "--store", str(tmp_path / "none"), "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_asks_candlecast(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert f"_CANDLECAST_COMPLETE={shell}_complete" in done.stdout
