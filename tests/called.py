"""The command line as a test calls it, in its own process."""

from __future__ import annotations

from resfast import cli


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err
