"""Two versions compared: the numbers against independent sources, the page, the command."""

import csv
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support.pages import NASTY, Page
from tests.support.released import RECORD

import train_model
from app.ml.artifacts import report_folder_name
from training.commands import compare as comparing
from training.commands.compare import (
    compare,
    compare_versions,
    holm,
    paired_interval,
    summary_lines,
)
from training.release.metrics import PREDICTION_COLUMNS, evaluate, mcnemar_p, prediction_rows
from training.release.promotion import Answer, ComparisonError, VersionTest
from training.release.tables import write_table

DISHES = ["apple_pie", "dal", "dosa", "idli", "jalebi", "pho", "ramen"]


def release(
    folder: Path, version: int, paths: list[Path], labels: list[int], classes: list[str], seed: int
) -> np.ndarray:
    """A version that is known by its record and its test alone; its logits."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), len(classes)))
    logits[np.arange(len(labels)), labels] += seed
    class_to_idx = {name: i for i, name in enumerate(classes)}
    training = {"seed": seed, "epochs": 3}
    record = dataclasses.replace(
        RECORD, version=version, class_to_idx=class_to_idx, training=training
    )
    (folder / f"food_model_v{version}.json").write_text(record.to_json(), encoding="utf-8")
    (report := folder / report_folder_name(version)).mkdir()
    rows = prediction_rows(paths, np.array(labels), logits, classes)
    write_table(report / "test_predictions.csv", PREDICTION_COLUMNS, rows)
    return logits


def two_versions(
    folder: Path, classes: list[str] = DISHES, per_class: int = 8, photos: int = 40
) -> tuple[list[Path], np.ndarray, list[np.ndarray]]:
    """v3 and v5 on the same images, of which the first are there: paths, labels, both logits."""
    labels = np.repeat(np.arange(len(classes)), per_class)
    paths = [folder / "photos" / f"{i}.jpg" for i in range(len(labels))]
    (folder / "photos").mkdir()
    for i, path in enumerate(paths[:photos]):
        Image.new("RGB", (40, 30), (6 * i % 256, 120, 90)).save(path)
    both = [release(folder, v, paths, labels.tolist(), classes, s) for v, s in ((3, 1), (5, 3))]
    return paths, labels, both


def version(number: int, ranks: list[int], first: int = 0, classes: int = 3) -> VersionTest:
    """A version that gave the i-th image's class this rank, images counted from `first` on."""
    names = {f"c{i}": i for i in range(classes)}
    record = dataclasses.replace(RECORD, version=number, class_to_idx=names)
    answers = {
        f"{i}.jpg": Answer(f"c{i % 3}", f"c{(i + (rank > 1)) % 3}", 0.5 + 0.01 * i, rank)
        for i, rank in enumerate(ranks, start=first)
    }
    return VersionTest(record, answers)


# The statistics -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(gained=st.integers(0, 30), lost=st.integers(0, 30))
def test_mcnemar_is_the_sum_of_its_formula(gained: int, lost: int) -> None:
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    assert mcnemar_p(gained, lost) == pytest.approx(min(1, 2 * tail / 2**flips), rel=1e-9)


def test_mcnemar_of_all_of_food_101_is_no_overflow() -> None:
    assert mcnemar_p(12_625, 12_625) == 1
    assert mcnemar_p(25_250, 0) == 0


@settings(max_examples=200, deadline=None)
@given(data=st.data(), total=st.integers(1, 500))
def test_the_paired_interval_holds_the_difference(data: st.DataObject, total: int) -> None:
    gained = data.draw(st.integers(0, total))
    lost = data.draw(st.integers(0, total - gained))
    low, high = paired_interval(gained, lost, total)
    assert -1 <= low <= (gained - lost) / total <= high <= 1
    assert paired_interval(lost, gained, total) == pytest.approx((-high, -low))
    assert (
        high - low
        > paired_interval(10 * gained, 10 * lost, 10 * total)[1]
        - (paired_interval(10 * gained, 10 * lost, 10 * total)[0])
    )


@pytest.mark.parametrize(("total", "chances"), [(40, (0.1, 0.2)), (200, (0.05, 0.05))])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(
    total: int, chances: tuple[float, float]
) -> None:
    random = np.random.default_rng(0)
    draws = random.multinomial(total, [*chances, 1 - sum(chances)], size=2000)
    truth = chances[0] - chances[1]
    intervals = [paired_interval(int(gained), int(lost), total) for gained, lost, _ in draws]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 < covered < 0.98


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=100, deadline=None)
@given(ranks=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=40))
def test_counts_are_those_of_the_pairs(ranks: list[tuple[int, int]]) -> None:
    before, after = zip(*ranks, strict=True)
    found = compare(version(1, list(before)), version(2, list(after)))
    cells = [found[name] for name in ("both_right", "gained", "lost", "both_wrong")]
    assert sum(cells) == found["num_images"] == len(ranks)
    assert found["gained"] == sum(b > 1 and a == 1 for b, a in ranks)
    assert found["lost"] == sum(b == 1 and a > 1 for b, a in ranks)
    old, new = found["versions"]
    assert new["top1"] - old["top1"] == pytest.approx(found["difference"])
    assert old["top5"] == sum(b <= 5 for b, _ in ranks) / len(ranks)
    for name in ("gained", "lost"):
        assert sum(c[name] for c in found["per_class"]) == found[name] == len(found["flips"][name])
    sizes = [abs(c["change"]) for c in found["per_class"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["old"].correct for row in found["flips"]["lost"])
    assert all(row["new"].correct for row in found["flips"]["gained"])


def test_scores_are_those_of_the_report(tmp_path: Path) -> None:
    _, labels, both = two_versions(tmp_path)
    old, new = (comparing.read_test(tmp_path, version) for version in (3, 5))
    for scores, logits in zip(compare(old, new)["versions"], both, strict=True):
        results = evaluate(logits, labels, DISHES)
        assert scores["top1"] == results["top1"] and scores["top5"] == results["top5"]
        assert list(scores["top1_ci95"]) == results["top1_ci95"]
        assert scores["ece"] == pytest.approx(results["calibration"]["ece_after"])


# Which images ---------------------------------------------------------------------------------


def test_only_images_of_both_tests_count() -> None:
    found = compare(version(1, [1, 1, 1, 1]), version(2, [2, 2, 2, 2, 2], first=1))
    assert (found["num_images"], found["lost"], found["gained"]) == (3, 3, 0)
    assert found["notes"] == [
        "1 images that only v1 was tested on are not compared.",
        "2 images that only v2 was tested on are not compared.",
    ]


def test_an_image_that_changed_its_class_is_not_compared() -> None:
    old, new = version(1, [1, 1, 1]), version(2, [1, 1, 1])
    new.answers["0.jpg"] = dataclasses.replace(new.answers["0.jpg"], actual="c2")
    found = compare(old, new)
    assert found["num_images"] == 2
    assert found["notes"] == ["1 images whose class changed in between are not compared."]


def test_more_classes_are_named() -> None:
    notes = compare(version(1, [1, 1]), version(2, [1, 1], classes=5))["notes"]
    assert notes == ["v2 alone knows 2 classes (c3, c4): it had more to choose from."]


def test_versions_without_a_common_image_are_refused() -> None:
    with pytest.raises(ComparisonError, match=r"v1: 0.jpg, v2: 5.jpg\); train both"):
        compare(version(1, [1, 1]), version(2, [1, 1], first=5))


@pytest.mark.parametrize(
    ("gained", "lost", "says"),
    [
        (9, 0, "v2 is better than v1 (p = 0.004)."),
        (0, 9, "v2 is worse than v1 (p = 0.004)."),
        (20, 0, "v2 is better than v1 (p < 0.001)."),
        (5, 0, "No clear difference: it may be chance (p = 0.062)."),
        (42, 25, "v2 is better than v1 (p = 0.04980)."),
        (22, 10, "No clear difference: it may be chance (p = 0.05010)."),
        (0, 0, "No clear difference: it may be chance (p = 1.000)."),
    ],
)
def test_the_conclusion_is_as_strong_as_the_evidence(gained: int, lost: int, says: str) -> None:
    ranks = [[2] * gained + [1] * lost + [1], [1] * gained + [2] * lost + [1]]
    found = compare(version(1, ranks[0]), version(2, ranks[1]))
    assert found["conclusion"] == says
    assert found["is_clear"] == ("No clear" not in says)
    assert f"McNemar's exact test: {says}" in summary_lines(found)


# The page and the command ---------------------------------------------------------------------


def page_of(folder: Path) -> tuple[str, Page]:
    html = (folder / "comparison_v3_v5.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.mark.parametrize("versions", [("v3", "v5"), ("3", "5"), ("3", "v5")])
def test_the_command_prints_and_draws(
    versions: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    two_versions(tmp_path, photos=100)
    assert train_model.main(["--output_dir", str(tmp_path), "--compare", *versions]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("v3 (mobilenet_v2) and v5 (mobilenet_v2) on 56 images of 7 classes")
    assert not re.search(r" $", printed, re.M)
    for name in ("top-1", "top-5", "ECE", "McNemar", *DISHES):
        assert name in printed
    assert caplog.messages == [f"comparison {tmp_path / 'comparison_v3_v5.html'}"]
    assert (tmp_path / "comparison_v3_v5.html").is_file()


def test_the_page_shows_every_part(tmp_path: Path) -> None:
    two_versions(tmp_path)
    page_path = compare_versions(tmp_path, 3, 5)
    html, page = page_of(page_path.parent)
    found = compare(*(comparing.read_test(tmp_path, version) for version in (3, 5)))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {str(a["href"]).removeprefix("#") for a in page.all("a")}
    assert links == {"outcomes", "classes", "pictures", "calibration", "settings"} <= ids
    for fact in (found["conclusion"], *DISHES, "v3", "v5", "correct in v5 only", "seed"):
        assert fact in page.text
    assert len(page.all("script")) == 1
    assert "drawn sample" not in page.text and 'id="matrix' not in html
    shown = [row for kind in ("lost", "gained") for row in found["flips"][kind][:24]]
    names = [Path(row["file"]).name for row in shown]
    assert re.findall(r'class="file" title="[^"]*">([^<]+)<', html) == names
    assert len(page.all("img")) == sum(Path(row["file"]).exists() for row in shown)


def test_a_table_whose_quote_never_ends_is_named(tmp_path: Path) -> None:
    two_versions(tmp_path)
    table = tmp_path / "food_model_v5" / "test_predictions.csv"
    header, _ = table.read_text(encoding="utf-8").split("\n", 1)
    table.write_text(f'{header}\n"' + "x" * (csv.field_size_limit() + 1), encoding="utf-8")
    with pytest.raises(ComparisonError, match=r"cannot be used .*field limit"):
        compare_versions(tmp_path, 3, 5)


def test_pictures_that_are_gone_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_versions(tmp_path, photos=0)
    compare_versions(tmp_path, 3, 5)
    _, page = page_of(tmp_path)
    (said,) = caplog.messages
    missing = page.text.count("Picture no longer available")
    assert (
        missing > 5
        and f"pictures no longer available: {missing} (" in said
        and said.endswith(" …)")
    )


def test_the_page_loads_nothing_and_names_stay_text(tmp_path: Path) -> None:
    two_versions(tmp_path, [NASTY, "dal", "दाल"])
    compare_versions(tmp_path, 3, 5)
    html, page = page_of(tmp_path)
    assert "<script>alert" not in html and NASTY in page.text and "दाल" in page.text
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(", html)
    assert all(str(i["src"]).startswith("data:image/jpeg;base64,") for i in page.all("img"))


def test_101_classes_stay_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_versions(tmp_path, [f"a_rather_long_dish_name_{i}" for i in range(101)], per_class=5)
    compare_versions(tmp_path, 3, 5)
    _, page = page_of(tmp_path)
    assert len(page.all("tr")) == 101 + 1 + 1 + 1  # classes, settings, their heads
    assert (tmp_path / "comparison_v3_v5.html").stat().st_size < 1_000_000
    assert "and 91 more classes on the page" in capsys.readouterr().out


def fails(folder: Path, caplog: pytest.LogCaptureFixture, *versions: str) -> str:
    caplog.clear()
    assert train_model.main(["--output_dir", str(folder), "--compare", *versions]) == 1
    (said,) = caplog.messages
    assert "\n" not in said
    return said


def test_what_cannot_be_compared_is_one_clear_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_versions(tmp_path)
    assert "no version 4" in fails(tmp_path, caplog, "v3", "v4")
    assert "these are the same" in fails(tmp_path, caplog, "v3", "3")
    table = tmp_path / "food_model_v5" / "test_predictions.csv"
    for damage in (b"file,actual\na.jpg,dal\n", b"\xff\xfe", table.read_bytes()[:-60]):
        table.write_bytes(damage)
        said = fails(tmp_path, caplog, "v3", "v5")
        assert str(table) in said and "the test of version 5" in said
    table.unlink()
    assert "No such file" in fails(tmp_path, caplog, "v3", "v5")
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("versions", [("x", "3"), ("3", "-1"), ("3",), ("v", "1"), ("1", "²")])
def test_what_is_no_version_is_a_bad_flag(
    versions: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        train_model.main(["--compare", *versions])
    assert raised.value.code == 2
    assert "--compare" in capsys.readouterr().err
