"""The report as a page and as a terminal table, in both languages."""

import json
import math
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from importlib import resources

import pytest
from rich.console import Console

from batchnorm import words
from batchnorm.experiment.report import page, terminal
from batchnorm.experiment.results import Results
from report_results import results

NAN, INF = math.nan, math.inf
VOID = {"meta", "path", "circle", "use", "rect", "br"}
LANGUAGES = pytest.mark.parametrize("lang", words.LANGUAGES)
ALL_NORMS = ("batchnorm", "scratch", "torch", "none")


class Document(HTMLParser):
    """What a reader of the page finds in it; fails when a tag is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag, css=None):
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and css in (None, *attrs.get("class", "").split())
        ]


@cache
def rendered(raw, lang):
    """A page costs half a second, and many tests look at the same one."""
    return page.render(Results.model_validate(json.loads(raw)), lang)


def render(raw, lang="en"):
    return rendered(json.dumps(raw), lang)


def diverged():
    """The first run is fine, the second diverges in epoch 3, the third has no epoch."""
    raw = results(("batchnorm", "none"), epochs=5)
    raw["runs"] += results(("scratch",), epochs=0)["runs"]
    for epoch in raw["runs"][1]["epochs"][2:]:
        epoch.update(loss=NAN, train_accuracy=None, test_accuracy_running=INF)
    for band in raw["runs"][1]["pre_activations"]:
        for point in band["points"][3:]:
            point["quantiles"] = [NAN, None, INF, -INF, 3e38]
    for layer in raw["runs"][2]["norm_layers"]:
        for name in layer.keys() - {"layer"}:
            layer[name] = [NAN] * len(layer[name])
    return raw


@LANGUAGES
def test_the_page_is_one_small_sound_file_that_loads_nothing(lang):
    html = render(results(ALL_NORMS), lang)
    document = Document(html)
    assert len(html.encode()) < 500_000
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "data:" not in html
    assert not {tag for tag, _ in document.tags} & {"script", "img", "link", "iframe", "object"}
    assert all(attrs["href"].startswith("#") for _, attrs in document.tags if "href" in attrs)


def test_ids_are_unique_and_every_reference_finds_one():
    html = render(results(ALL_NORMS))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    pointers = re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', html)
    assert len(pointers) > 100
    assert set(pointers) <= set(ids)


def test_the_same_results_give_the_same_page():
    raw = results()
    assert render(raw) == page.render(Results.model_validate(raw), "en")


@LANGUAGES
def test_every_chart_says_what_it_shows_and_every_section_has_its_numbers(lang):
    document = Document(render(results(), lang))
    charts = document.all("svg", "chart")
    assert len(charts) == 4 + 2 + 2 + 8 + 2
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 10 for chart in charts)
    assert len(document.all("figcaption")) == len(charts)
    assert len(document.all("section", "chapter")) == len(document.all("details")) == 5
    assert len(document.all("h1")) == 1
    expected = {"en": "en", "zh": "zh-Hans"}
    assert document.all("html") == [{"lang": expected[lang]}]


def test_the_headline_states_the_result_first():
    raw = results()
    raw["runs"][0]["epochs"][-1].update(
        loss=0.2994, test_accuracy_running=0.742, test_accuracy_population=0.853
    )
    raw["runs"][1]["epochs"][-1].update(loss=0.6131, test_accuracy_running=0.757)
    text = " ".join(Document(render(raw)).text.split())
    assert "After 10 epochs the training loss is 0.299 with batch norm and 0.613 without." in text
    assert "gets 74.2% right on its running statistics and 85.3% on population" in text
    assert "the network without gets 75.7%." in text
    assert "batch size 256 · learning rate 1 · seed 0 · cpu · threads 2 · torch 2.13.0" in text
    assert "Fashion-MNIST, from dataset-fashion-mnist (Debian): 60,000 training and 10,000" in text


def test_the_text_takes_its_numbers_from_the_results():
    raw = results()
    running = [0.7, 0.8, 0.8, 0.8, 0.8, 0.695, 0.843, 0.875, 0.792, 0.742]
    population = [0.8, 0.8, 0.8, 0.8, 0.8, 0.849, 0.868, 0.883, 0.877, 0.853]
    for epoch, low, high in zip(raw["runs"][0]["epochs"], running, population, strict=True):
        epoch.update(test_accuracy_running=low, test_accuracy_population=high)
    raw["runs"][1]["epochs"][-1]["train_accuracy"] = 0.8
    for epoch, accuracy in zip(raw["runs"][0]["epochs"], [0.7, 0.79, 0.81], strict=False):
        epoch["train_accuracy"] = accuracy
    text = " ".join(Document(render(raw)).text.split())
    assert "in epochs 6–10 the test accuracy is 69.5–87.5% on running and 84.9–88.3% on" in text
    assert "The largest gap of the run, 15.4 percentage points, is in epoch 6." in text
    assert "training accuracy of 80.0%: batch norm passes that in epoch 3." in text
    assert "mean and variance over 2,560 training images" in text
    assert "65% of the weight lies on the last 10 mini-batches" in text


def test_a_run_that_never_overtakes_is_said_to():
    raw = results()
    raw["runs"][1]["epochs"][-1]["train_accuracy"] = 0.99
    assert "<b>batch norm</b> does not pass that." in render(raw)


def test_gamma_and_beta_of_a_narrow_first_layer_are_printed():
    raw = results()
    raw["runs"][0]["norm_layers"][0]["gamma"][2] = 1.23456
    html = render(raw)
    assert '<div class="values"><b>γ</b>' in html
    assert "<span>1.235</span>" in html
    assert 'class="values"' not in render(results(layers={"wide": 17}))


def test_tables_hold_every_number():
    raw = results(layers={"conv1": 6})
    raw["runs"][0]["norm_layers"][0]["population_var"][5] = 0.0123456
    document = Document(render(raw))
    rows = document.all("tr")
    assert len(rows) == (1 + 20) + (1 + 10) + (1 + 6) + 2 * (1 + 11) + (1 + 6)
    assert "0.01235" in document.text


@LANGUAGES
def test_a_hostile_layer_name_is_shown_not_obeyed(lang):
    name = '"><script>alert(1)</script><b>{run} $\\frac{1}$ {{ 7*7 }}\x00'
    html = render(results(layers={name: 4}), lang)
    document = Document(html)
    assert document.all("script") == []
    assert "49" not in re.findall(r"alert\(1\)[^\n]{0,60}", html)[0]
    assert name[:-1] + "\N{REPLACEMENT CHARACTER}" in document.text


@LANGUAGES
def test_diverged_and_interrupted_runs_are_told(lang):
    html = render(diverged(), lang)
    text = Document(html).text
    told = {
        "en": [
            "no batch norm diverged: from epoch 3 on, its loss is not a finite number.",
            "batch norm was interrupted after epoch 5 of 10.",
            "batch norm from scratch was stopped before its first epoch ended",
            "last finite value of a run that diverged",
            "Channels whose value is not finite, and is not drawn: 226",
        ],
        "zh": [
            "无批量规范化：训练发散，从第 3 个迭代周期起损失不再是有限的数。",
            "批量规范化：计划 10 个迭代周期，在第 5 个之后中断。",
            "从零实现的批量规范化：在第一个迭代周期结束之前就已停止",
            "训练发散前最后一个有限的值",
            "数值不是有限数而未画出的通道：226 个",
        ],
    }
    for sentence in told[lang]:
        assert sentence in text
    assert "NaN" in text


@LANGUAGES
def test_data_that_stand_in_are_told_before_everything_else(lang):
    raw = results()
    raw["data"].update(name="digits (scikit-learn)", train_examples=1437, stand_in=True)
    told = {
        "en": "Fashion-MNIST could not be found or downloaded. These results come from digits",
        "zh": "未能找到或下载 Fashion-MNIST，以下结果来自 digits (scikit-learn)：",
    }
    text = Document(render(raw, lang)).text
    assert told[lang] in text
    lead = {"en": "After 10 epochs the training loss", "zh": "个迭代周期后，使用批量"}
    assert text.index(told[lang]) < text.index(lead[lang])
    table = "".join("".join(lines(raw, lang)).split())  # The line is wrapped.
    assert table.startswith("".join(told[lang].split()))
    assert "1,437" in text
    assert "2,560" not in text


def test_sound_runs_have_no_notices():
    html = render(results())
    assert 'class="notices"' not in html
    assert "diverged" not in html
    assert "NaN" not in html


@LANGUAGES
@pytest.mark.parametrize("norms", [("batchnorm",), ("none",), ("torch", "torch"), ALL_NORMS])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_every_number_of_runs_and_epochs_makes_a_page(norms, epochs, lang):
    document = Document(render(results(norms, epochs), lang))
    normalized = [norm for norm in norms if norm != "none"]
    assert len(document.all("section", "chapter")) == (5 if normalized else 2)
    assert len(document.all("section", "tile")) == 3


def test_runs_at_the_very_first_moment_have_no_sections_on_layers():
    raw = results(epochs=0)
    for run in raw["runs"]:
        run.update(pre_activations=[], norm_layers=[])
    document = Document(render(raw))
    assert [section["id"] for section in document.all("section", "chapter")] == [
        "curves",
        "estimates",
    ]


def test_runs_that_share_a_norm_are_told_apart():
    raw = results(("torch", "torch", "none"))
    text = Document(render(raw)).text
    assert "torch's batch norm (1)" in text
    assert "torch's batch norm (2)" in text
    raw["runs"][1]["learning_rate"] = 0.5
    text = Document(render(raw)).text
    assert "torch's batch norm, rate 0.5" in text
    assert "torch's batch norm, rate 1" in text
    assert "(2)" not in text


def test_names_are_escaped_exactly_once():
    raw = results(("torch", "none"), layers={"a & b": 3})
    raw["data"]["name"] = "mnist & co"
    html = render(raw)
    assert "<title>LeNet on mnist &amp; co, with and without batch norm</title>" in html
    assert not re.search(r"&amp;(#39|amp|lt|gt)", html)
    labels = [chart["aria-label"] for chart in Document(html).all("svg", "chart")]
    assert any("torch's batch norm 0." in label for label in labels)
    assert any(label.startswith("a & b · torch's batch norm. Middle 90%") for label in labels)
    assert any("Medians by layer: a & b 1." in label for label in labels)
    assert not any("<" in label for label in labels)
    assert lines(raw, "en")[0].startswith("mnist & co, seed 0:")


def test_charts_of_a_layer_start_a_row():
    document = Document(render(results(("batchnorm", "scratch", "none"))))
    assert len(document.all("figure", "starts-row")) == 4
    assert Document(render(results(("none",)))).all("figure", "starts-row") == []


@pytest.mark.parametrize("tell", [page.render, terminal.table])
def test_an_unknown_language_is_refused(tell):
    with pytest.raises(ValueError, match=r"^report: lang is one of en, zh, got 'fr'"):
        tell(Results.model_validate(results()), "fr")


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    page.write(Results.model_validate(results()), path, "zh")
    assert path.read_text(encoding="utf-8") == render(results(), "zh")
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_rendered_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="lang is one of en, zh"):
        page.write(Results.model_validate(results()), path, "fr")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_put_in_place_leaves_no_temporary_file(tmp_path):
    folder = tmp_path / "report.html"
    folder.mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        page.write(Results.model_validate(results()), folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "none" / "report.html"
    with pytest.raises(FileNotFoundError, match=r"none/report\.html: the folder .*none does not"):
        page.write(Results.model_validate(results()), path)


def lines(raw, lang):
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(terminal.table(Results.model_validate(raw), lang))
    return capture.get().splitlines()


@LANGUAGES
@pytest.mark.parametrize("raw", [results(ALL_NORMS), diverged(), results(epochs=1)])
def test_the_table_fits_80_columns(raw, lang):
    from rich.cells import cell_len

    printed = lines(raw, lang)
    assert max(map(cell_len, printed)) <= 80
    assert "…" not in "".join(printed)


def test_the_table_has_the_last_epoch_and_the_range_of_the_last_five():
    raw = results()
    running = [0.1, 0.1, 0.1, 0.1, 0.1, 0.695, 0.843, 0.875, 0.792, 0.742]
    for epoch, accuracy in zip(raw["runs"][0]["epochs"], running, strict=True):
        epoch.update(test_accuracy_running=accuracy, test_accuracy_population=0.85, loss=0.25)
    printed = lines(raw, "en")
    at = next(n for n, line in enumerate(printed) if line.startswith("batchnorm"))
    assert re.match(
        r"batchnorm +1 +10/10 +0\.250 +\d\d\.\d% +74\.2% +85\.0% +1\d,\d{3}", printed[at]
    )
    assert printed[at + 1].split() == ["69.5–87.5%", "85.0%"]
    plain = next(line for line in printed if line.startswith("none"))
    assert "—" in plain


def test_the_table_tells_of_runs_that_did_not_end_well():
    printed = [line.split() for line in lines(diverged(), "en")]
    firsts = [cells[0] for cells in printed if cells]
    assert firsts[firsts.index("batchnorm") + 1] == "interrupted"
    assert firsts[firsts.index("none") + 1] == "diverged"
    assert ["scratch", "1", "0/10", "—", "—", "—", "—", "—"] in printed


def test_markup_in_names_is_not_obeyed_by_the_terminal():
    raw = results()
    raw["data"]["name"] = "[bold]x[/bold]\x1b[31m"
    assert "[bold]x[/bold]�[31m" in lines(raw, "en")[0]


def sources():
    root = resources.files("batchnorm.experiment.report")
    files = [*root.iterdir(), *(root / "templates").iterdir()]
    return "\n".join(file.read_text() for file in files if file.name.endswith((".py", ".html")))


def test_every_text_is_used_and_every_text_used_exists():
    known = set(words.read_texts("report", "en"))
    quoted = set(re.findall(r"[\"']([a-z]+\.[a-z_]+)[\"']", sources()))
    assert known - quoted == set()
    said = set(re.findall(r"say\(\s*[\"']([a-z_.]+)[\"']", sources()))
    assert said - known == set()


def test_importing_the_page_loads_no_heavy_library():
    code = (
        "import sys, batchnorm.experiment.report.page\n"
        "print(sorted({'matplotlib', 'jinja2', 'rich', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
