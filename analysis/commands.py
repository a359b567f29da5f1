"""The subcommands of evaluate.py: they read what runs have left, and measure nothing."""

from pathlib import Path

from analysis import figures, page, tables
from analysis.statistics import saved_results


def add(parser) -> None:
    """Their arguments, for an argparse parser."""
    commands = parser.add_subparsers(dest="command", metavar="{table,show,report}")
    command = commands.add_parser("table", help="what runs have measured, in one table")
    command.add_argument("runs", type=Path, nargs="+", help="their folders")
    command.add_argument("--against", help="the row that differences are taken to")
    command.add_argument("--plot", type=Path, help="PNG to draw them in")
    command = commands.add_parser("show", help="a step of a run: everything that was said in it")
    command.add_argument("run", type=Path, help="the run's folder")
    command.add_argument("step", type=int, help="the step, from 0")
    command = commands.add_parser("report", help="report.html in the folder of every run")
    command.add_argument("runs", type=Path, nargs="+", help="their folders; also unfinished runs")
    command.add_argument(
        "--steps", type=int, nargs="+",
        help="the steps whose questions are shown; default: the first, the last and 8 between",
    )  # fmt: skip
    command.add_argument(
        "--to", type=Path, default=Path("report.html"),
        help="of several runs: the page that compares them",
    )  # fmt: skip


def table(given: dict) -> None:
    measured = [saved_results(run) for run in given["runs"]]
    print(tables.table(measured, given["against"]))
    if given["plot"]:
        figures.comparison(given["plot"], measured)


def show(given: dict) -> None:
    print(tables.show(given["run"], given["step"]))


def report(given: dict) -> None:
    runs = given["runs"]
    for run in runs:
        print(page.write(run, given["steps"]))
    if len(runs) > 1:
        print(page.compare(runs, given["to"]))


COMMANDS = {"table": table, "show": show, "report": report}
