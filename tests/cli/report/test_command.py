"""The command report: which studies it takes, what its page and its JSON say, and that a page needs nothing else."""

import json
import math
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from cli.main import app
from cli.report import command
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.spec import Problem
from tiles.target import Device

NAME = "merge.forward-aaaa-1111"
PROBLEM = {"op": "merge", "direction": "forward", "streams": 4, "width": 1280, "dtype": "float32", "tokens": 2048}
BLOCKS, UNROLLS = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
DEFAULT, BEST = {"block": 1, "unroll": 1}, {"block": 16, "unroll": 1}


def about(**more: Any) -> dict[str, Any]:
    return {
        "problem": PROBLEM | {"rounds": 20},
        "device": {"kind": "cpu", "name": "toy processor", "arch": "x86-64-v3", "units": 0, "l2_bytes": 0},
        **{"threads": 2, "pool": 25, "default": DEFAULT, "bytes": 10**6, "flops": 10**6},
        **{"copy_gb_per_s": 10.0, "gflops_peak": 100.0, "limit_ms": 0.1},
        **{"tilelang": "0.1.15", "torch": "2.13.0", "date": "2026-01-01", "host": "box", "command": "mhc-tune tune"},
    } | more


def concluded(**more: Any) -> dict[str, Any]:
    measurement = {
        **{"tuned_ms": 0.2, "default_ms": 0.4, "ratio": 2.0, "percent_of_copy": 50.0, "percent_of_limit": 50.0},
        **{"default_kept": False, "bytes": 10**6, "flops": 10**6, "threads": 2},
    }
    standing = {"default": False, "ms": 0.2, "low": 1.9, "high": 2.1}
    finalists = [
        {"schedule": DEFAULT, "default": True, "ms": 0.4, "ratio": 1.0, "low": 1.0, "high": 1.0},
        standing | {"schedule": BEST, "ratio": 2.0},
        standing | {"schedule": {"block": 8, "unroll": 1}, "ratio": 1.95},
    ]
    ending = {"trials": 25, "stopped": "pool swept", "schedule": BEST, "measurement": measurement}
    return ending | {"finalists": finalists} | more


def found(ratio: float, **more: Any) -> dict[str, Any]:
    values = {"ms": 0.4 / ratio, "default_ms": 0.4, "ratio": ratio, "low": 0.97 * ratio, "high": 1.03 * ratio}
    return values | {"source": "0", "same_as": None} | more


def space(params: dict[str, Any]) -> dict[str, CategoricalDistribution]:
    choices = {"block": BLOCKS, "unroll": UNROLLS}
    return {name: CategoricalDistribution(choices.get(name, (value,))) for name, value in params.items()}


def measured(params: dict[str, Any], ratio: float, **more: Any) -> optuna.trial.FrozenTrial:
    attributes = {"found": found(ratio, **more)}
    return create_trial(params=params, distributions=space(params), value=1 / ratio, user_attrs=attributes)


def failed(params: dict[str, Any], reason: str) -> optuna.trial.FrozenTrial:
    attributes = {"reason": reason}
    return create_trial(state=TrialState.FAIL, params=params, distributions=space(params), user_attrs=attributes)


def swept() -> list[optuna.trial.FrozenTrial]:
    """All of the space: the block decides, the unrolling does nothing; two fail."""
    trials = []
    for block in BLOCKS:
        for unroll in UNROLLS:
            params = {"block": block, "unroll": unroll}
            if unroll == 5 and block in (1, 2):
                trials.append(failed(params, "CompileError: no" if block == 1 else "WrongResult: y is <b>wrong</b>"))
            else:
                trials.append(measured(params, 1 + block / 16))
    return trials


Make = Callable[..., Path]


def fill(storage: BaseStorage, name: str, trials: list[optuna.trial.FrozenTrial], attributes: dict[str, Any]) -> None:
    study = optuna.create_study(study_name=name, storage=storage)
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    study.add_trials(trials)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the journal of a study into the cache folder `tmp_path`/cache."""

    def write(name: str = NAME, trials: Any = None, **attributes: Any) -> Path:
        folder = tmp_path / "cache" / "studies"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.journal"
        given = attributes or {"about": about(), "concluded": concluded()}
        fill(JournalStorage(JournalFileBackend(str(path))), name, swept() if trials is None else trials, given)
        return path

    return write


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, cache: Path | None = None) -> Any:
        folder = str(cache or tmp_path / "cache")
        result = CliRunner().invoke(app, ["report", *map(str, arguments), "--cache", folder])
        assert not result.exception or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second a page."""
    monkeypatch.setattr(command, "charts", lambda summary, number: {})


def refused(result: Any) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


class Page(HTMLParser):
    """The tags, ids, references and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            assert not name.startswith("on"), f"{tag} has {name}"

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1] != "style":
            self.words.append(data)


def test_a_page_says_what_was_tuned_and_what_came_of_it(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make()
    result = report("merge.forward", "-o", "page.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "wrote 1 study" in result.stderr
    text = Page(tmp_path / "page.html").text
    for part in (
        "merge forward n=4 C=1280 float32 T=2048",
        "toy processor (x86-64-v3), 2 threads",
        "tilelang 0.1.15, torch 2.13.0",
        "The chosen schedule takes 0.2 ms, 2.000 times (1.900 to 2.100) as fast as the default with 0.4 ms",
        "50 % of copy bandwidth",
        "A, chosen 0.2 2.000 1.900 to 2.100",
        "23 measured of 25 valid schedules, 1 does not compile, 1 wrong result; ended by: pool swept",
        "does not compile: CompileError: no",
        "wrong result: WrongResult: y is <b>wrong</b>",
        "PED-ANOVA",
    ):
        assert part in text, part


def test_a_page_needs_no_network_and_no_script(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make()
    make("merge.backward-bbbb-1", about=about(problem=PROBLEM | {"direction": "backward"}), concluded=concluded())
    assert report().exit_code == 0
    page = Page(tmp_path / "report.html")
    assert page.tags.count("svg") == 8
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert page.references
    assert {reference[0] for reference in page.references} == {"#"}
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#")
    assert "default-src 'none'" in page.source
    assert "#0" not in "".join(part.split("</svg>")[0] for part in page.source.split("<svg")[1:])  # colours follow


def test_text_from_files_stays_text(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    evil = "$\\no$<script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    trials = [measured({"block": block, evil: unroll}, block) for block in BLOCKS for unroll in UNROLLS]
    distributions = {"block": CategoricalDistribution(BLOCKS), evil: CategoricalDistribution(UNROLLS)}
    for trial in trials:
        trial.distributions = distributions
    trials.append(failed(DEFAULT, evil))
    seen = about(command=evil, host=evil, device={"kind": "cpu", "name": evil, "arch": evil})
    make(trials=trials, about=seen, concluded=concluded(stopped=evil, schedule={evil: evil}))
    assert report(NAME).exit_code == 0
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.usefixtures("without_charts")
def test_several_studies_have_a_table_of_contents(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    for width in (1280, 256):
        make(f"merge-{width}", about=about(problem=PROBLEM | {"width": width}), concluded=concluded())
    assert report().exit_code == 0
    page = Page(tmp_path / "report.html")
    assert [reference for reference in page.references if "study" in reference] == ["#study-1", "#study-2"]
    assert page.text.index("C=256") < page.text.index("C=1280")
    assert "merge forward n=4 C=256 float32 T=2048 0.4 0.2 2.000 1.900 to 2.100 50 50 25 2" in page.text


def test_json_is_the_same_facts_and_writes_no_page(
    make: Make, report: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = report("--json")
    assert result.exit_code == 0, result.stderr
    (study,) = json.loads(result.stdout)["studies"]
    assert study["study"] == NAME
    assert study["about"]["copy_gb_per_s"] == 10.0
    assert study["conclusion"]["schedule"] == BEST
    assert [study["conclusion"][name] for name in ("low", "ratio", "high")] == [1.9, 2.0, 2.1]
    assert [row["chosen"] for row in study["conclusion"]["finalists"]] == [False, True, False]
    assert study["failed"] == {"does not compile": 1, "wrong result": 1}
    assert len(study["trials"]) == 25
    best = max((trial for trial in study["trials"] if trial["state"] == "measured"), key=lambda trial: trial["ratio"])
    assert best["schedule"] == BEST
    assert best["percent_of_limit"] == pytest.approx(50)
    assert not list(tmp_path.glob("*.html"))
    assert "pip install matplotlib" in refused(report())
    assert not list(tmp_path.glob("*.html"))


def test_json_and_a_page_at_once(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make()
    result = report("--json", "-o", "both.html")
    assert json.loads(result.stdout)["left_out"] == []
    assert "wrote 1 study" in result.stderr
    assert (tmp_path / "both.html").stat().st_size > 10_000


def test_importance_names_what_decides(make: Make, report: Callable[..., Any]) -> None:
    make()
    shares = json.loads(report("--json").stdout)["studies"][0]["importance"]["shares"]
    assert shares["block"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_few_trials_give_no_importance(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make(trials=swept()[5:20])
    assert report(NAME).exit_code == 0
    page = Page(tmp_path / "report.html")
    assert "none, as 14 measured trials are too few; at least 20" in page.text
    assert page.tags.count("svg") == 3


@pytest.mark.usefixtures("without_charts")
def test_a_search_that_goes_on(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    running = create_trial(state=TrialState.RUNNING, params=BEST, distributions=space(BEST))
    trials = [
        measured(DEFAULT, 1.0),
        running,
        create_trial(state=TrialState.FAIL),
        measured({"block": 2, "unroll": 1}, 1.2),
    ]
    make(trials=trials, about=about())
    assert report(NAME).exit_code == 0
    text = Page(tmp_path / "report.html").text
    assert "The search has not ended" in text
    assert "2 measured of 25 valid schedules, 1 running" in text
    assert "The fastest trials against the default" in text
    assert "cut short" not in text


@pytest.mark.usefixtures("without_charts")
def test_the_default_that_stays(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    kept = concluded()["measurement"] | {"default_kept": True, "tuned_ms": 0.4, "ratio": 1.0}
    make(about=about(), concluded=concluded(schedule=DEFAULT, measurement=kept))
    assert report(NAME).exit_code == 0
    text = Page(tmp_path / "report.html").text
    assert "The default schedule stays" in text
    assert "default, chosen 0.4 1" in text


@pytest.mark.usefixtures("without_charts")
def test_bounds_that_say_nothing_are_left_out(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make(trials=[measured(DEFAULT, 1.0, low=0.0, high=math.inf)], about=about())
    (trial,) = json.loads(report("--json", "-o", "page.html").stdout)["studies"][0]["trials"]
    assert (trial["low"], trial["high"]) == (None, None)
    assert "inf" not in Page(tmp_path / "page.html").text.split("All trials")[1]


@pytest.mark.usefixtures("without_charts")
def test_a_study_that_says_nothing_of_itself_is_told_by_the_cache(
    make: Make, report: Callable[..., Any], tmp_path: Path
) -> None:
    make(concluded={"trials": 25, "stopped": "time"})
    key = Key.of(Problem("merge", "forward", 4, 1280, "float32", 2048), Device("cpu", "toy processor", "x86-64-v3"))
    more = {"copy_gb_per_s": 10.0, "gflops_peak": 100.0, "limit_ms": 0.1}
    made = {"study": NAME, "tilelang": "0.1.15", "torch": "2.13.0"}
    KernelCache(tmp_path / "cache").put(key, BEST, b"code", "text", concluded()["measurement"] | more, made)
    assert report(NAME).exit_code == 0
    text = Page(tmp_path / "report.html").text
    assert "toy processor (x86-64-v3), 2 threads" in text
    assert "2.000 times as fast as the default" in text
    assert "ended by: time" in text


def test_without_the_cache_such_a_study_still_shows_its_trials(
    make: Make, report: Callable[..., Any], tmp_path: Path
) -> None:
    make(concluded={"trials": 25, "stopped": "time"})
    assert report(NAME).exit_code == 0
    page = Page(tmp_path / "report.html")
    assert "device not known" in page.text
    assert page.tags.count("svg") == 3  # all but the roofline


@pytest.mark.usefixtures("without_charts")
def test_another_schedule_in_the_cache_is_told(make: Make, report: Callable[..., Any], tmp_path: Path) -> None:
    make()
    key = Key.of(Problem("merge", "forward", 4, 1280, "float32", 2048), Device("cpu", "toy processor", "x86-64-v3"))
    KernelCache(tmp_path / "cache").put(
        key, DEFAULT, b"code", "text", concluded()["measurement"], {"study": NAME, "tilelang": "1", "torch": "1"}
    )
    assert report(NAME).exit_code == 0
    assert "The kernel cache holds another schedule now: block=1 unroll=1" in Page(tmp_path / "report.html").text


@pytest.mark.usefixtures("without_charts")
def test_a_database_serves_as_well(report: Callable[..., Any], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    storage = optuna.storages.RDBStorage(url)
    for name in (NAME, "other"):
        fill(storage, name, swept(), {"about": about(), "concluded": concluded()})
    assert "wrote 2 studies" in report("--storage", url).stderr
    assert "wrote 1 study" in report("merge", "--storage", url).stderr
    assert "matches none of 2 studies" in refused(report("nothing", "--storage", url))


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("by", ["name", "prefix", "journal", "folder", "studies"])
def test_ways_to_name_a_study(make: Make, report: Callable[..., Any], tmp_path: Path, by: str) -> None:
    path = make()
    cache = tmp_path / "cache"
    given = {"name": NAME, "prefix": "mer", "journal": path, "folder": cache, "studies": cache / "studies"}[by]
    elsewhere = tmp_path / "elsewhere" if by in ("journal", "folder", "studies") else None
    result = report(given, cache=elsewhere)
    assert "wrote 1 study" in result.stderr, result.stderr


def test_names_that_fit_none_or_several(make: Make, report: Callable[..., Any]) -> None:
    assert "found none in" in refused(report())
    make()
    make("merge.backward-bbbb-1")
    assert "matches 2: merge.backward-bbbb-1, merge.forward-aaaa-1111: write more" in refused(report("merge"))
    assert "matches none of 2 studies" in refused(report("pre"))


@pytest.mark.usefixtures("without_charts")
def test_reading_writes_nothing_and_repairs_nothing(make: Make, report: Callable[..., Any]) -> None:
    path = make()
    torn = path.read_bytes() + b'{"op_code":8,"trial_i'
    path.write_bytes(torn)
    path.chmod(0o400)
    assert "wrote 1 study" in report(NAME).stderr
    assert path.read_bytes() == torn
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


DAMAGE = {
    "damaged": "{}\nnonsense\n{}\n",
    "binary": "\x00\x01\n",
    "empty": "",
    "foreign": None,
}


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_journal_that_cannot_be_read(make: Make, report: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    """By itself it is an error; among others it is left out, and the page says so."""
    text = DAMAGE[damage]
    if text is None:
        path = make("foreign", trials=[create_trial(value=1.0)], hello="world")
    else:
        make()
        path = tmp_path / "cache" / "studies" / "foreign.journal"
        path.write_text(text, encoding="utf-8")
    assert str(path) in refused(report(path)) or "foreign" in refused(report(path))
    if text is None:
        make()
    result = report()
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "wrote 1 study" in result.stderr
    assert "Left out:" in Page(tmp_path / "report.html").text


@pytest.mark.usefixtures("without_charts")
def test_a_page_that_cannot_be_written_leaves_the_old_one(
    make: Make, report: Callable[..., Any], tmp_path: Path
) -> None:
    make()
    assert "--out must be a file that can be written" in refused(report("-o", tmp_path / "missing" / "page.html"))
    assert "--out must be a file that can be written" in refused(report("-o", tmp_path / "cache"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
