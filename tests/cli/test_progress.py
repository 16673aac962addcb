"""The one progress bar: what a terminal shows, and that a file gets nothing of it."""

import io
import re
import sys

from rich.cells import cell_len

from batchnorm.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def attach_terminal(monkeypatch):
    """Gives the process a terminal; in a fixture, pytest would take it away before the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    return stream


def test_a_known_total_shows_the_share_and_the_time_to_go(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with Bar("images", total=600_000, text="batchnorm 10/10") as bar:
        bar.update(300_000)
        bar.update(299_999)
        bar.line("an epoch [1/2]")
    assert "batchnorm 10/10 ━" in terminal.getvalue()
    assert re.search(r"599,999/600,000 images, 0:00:\d\d to go", terminal.getvalue())
    assert "an epoch [1/2]" in terminal.getvalue()
    assert max(cell_len(line.split("\x1b")[0]) for line in terminal.getvalue().split("\r")) <= 80


def test_an_unknown_total_shows_the_time_gone(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with Bar("samples") as bar:
        bar.update(5)
    assert " 5 samples, 0:00:00 gone" in terminal.getvalue()


def test_text_total_and_count_can_be_set(monkeypatch):
    terminal = attach_terminal(monkeypatch)
    with Bar("samples") as bar:
        bar.total, bar.text, bar.done = 40, "second", 20
    assert "second ━" in terminal.getvalue()
    assert "20/40 samples" in terminal.getvalue()
    assert (bar.total, bar.text, bar.done) == (40, "second", 20)


def test_pooch_may_set_no_total_and_start_again(monkeypatch):
    attach_terminal(monkeypatch)
    bar = Bar("bytes", text="images.gz")
    bar.total = 0
    bar.update(1000)
    assert bar.total is None
    bar.reset()
    bar.update(500)
    bar.close()
    bar.close()
    assert bar.done == 500


def test_no_terminal_gets_the_lines_and_nothing_else(capsys):
    with Bar("samples", total=2) as bar:
        bar.update(1)
        bar.line("one line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "one line\n")
