"""``cotnet-evaluate``: measure a run's best checkpoint, or any weights, and write a report."""

from typing import Any

from cotnet_jax import command_line, interrupt
from cotnet_jax.command_line import config_option
from cotnet_jax.commands import job

SUMMARY = "Measure the accuracy of a run's best checkpoint or of any weights, and write a report."
EXAMPLES = (
    "cotnet-evaluate --workdir=runs/digits",
    "cotnet-evaluate --weights=cotnet50.pth.tar --data=FOLDER",
    "cotnet-evaluate --workdir=runs/digits --all_checkpoints",
)


def main(arguments: list[str] | None = None) -> None:
    interrupt.end_at_once()
    run(parse(arguments))


def make_parser() -> command_line.Parser:
    """Define the options, but for those of the configuration."""
    parser = job.make_parser(SUMMARY, EXAMPLES, several_weights=True)
    parser.add_argument(
        "--data",
        metavar="FOLDER|NAME",
        help="Images: a prepared folder, or the name of a dataset; by default the run's.",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="Split of them; by default validation, or else test."
    )
    parser.add_argument(
        "--output",
        type=command_line.path,
        metavar="DIR",
        help="Folder of the report; by default one in evaluations/ of the run, or here.",
    )
    parser.add_argument(
        "--all_checkpoints",
        action="store_true",
        help="A table of all checkpoints of --workdir; a table, too, where --weights is repeated.",
    )
    parser.add_argument("--no_report", action="store_true", help="Print the metrics alone.")
    return parser


def parse(arguments: list[str] | None = None, parser: command_line.Parser | None = None) -> Any:
    """Return the options, or exit with an error.

    Returns:
      The options, with the configuration as ``config``, and ``config_named`` and ``fields``: what
      was set of it by --config.FIELD.
    """
    parser = parser or make_parser()
    options, rest = config_option.parse(parser, arguments, required=False)
    options.fields = config_option.given_fields(options.config, rest)
    given = options.fields.get("init_from") or ""
    if given and options.weights not in ([], [given]):
        parser.error(
            f"--weights={options.weights[0]} and --config.init_from={given} differ: give one of "
            "them"
        )
    options.weights = options.weights or [path for path in [options.config.init_from] if path]
    options.kind = options.kind or options.config.init_kind or None
    if not options.workdir and not options.weights:
        parser.error_with_examples("without --weights=PATH, --workdir=DIR is missing")
    if options.all_checkpoints and (not options.workdir or options.weights):
        parser.error("--all_checkpoints: needs --workdir=DIR, and no --weights")
    if options.no_report and (options.output or options.all_checkpoints or options.weights[1:]):
        parser.error("--no_report: there is nothing else to write with these options; leave it out")
    return options


def run(options: Any) -> None:
    """Evaluate, and exit."""

    def load():
        from cotnet_jax import reports
        from cotnet_jax.training.evaluate import evaluate_only

        def evaluate(config, workdir):
            weights = options.weights or [None]
            if options.all_checkpoints:
                weights = reports.checkpoints_of(workdir)
            configs = [
                reports.evaluation_config(
                    config if options.config_named else None,
                    workdir=workdir,
                    weights=path,
                    kind=options.kind,
                    data=options.data,
                    split=options.split,
                    fields=options.fields,
                )
                for path in weights
            ]
            if options.all_checkpoints or len(configs) > 1:
                rows, path = reports.evaluate_each(configs, workdir, output=options.output)
                return rows, f"\n{reports.format_table(rows)}\n\nThe table:  {path}"
            path = str(weights[0] or workdir)
            if options.no_report:
                metrics = evaluate_only(configs[0], workdir)
                return metrics, job.summarize(metrics, path)
            metrics, folder = reports.evaluate(configs[0], workdir, output=options.output)
            look = ("look at the report", str(folder / reports.PAGE))
            return metrics, job.summarize(metrics, path, look)

        return evaluate

    job.run(load, options)
