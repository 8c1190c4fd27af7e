import json
import zipfile

import pytest

from paddle_dit.data import labels
from paddle_dit.data.labels import imagenet_labels, resolve_labels
from paddle_dit.errors import ConfigError, DataError
from tests.conftest import ROOT

SHARK = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"


def test_imagenet_has_every_class_with_all_its_names():
    table = imagenet_labels()
    assert list(table) == list(range(1000))
    assert table[2] == SHARK
    assert table[0] == "tench, Tinca tinca"
    assert table[999].startswith("toilet tissue")
    assert all(table.values())


def test_the_table_is_a_copy():
    imagenet_labels()[2] = "changed"
    assert imagenet_labels()[2] == SHARK


def test_the_file_has_one_line_a_class_and_distinct_wordnet_ids():
    text = labels.IMAGENET_FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1002
    assert len({entry["wnid"] for entry in json.loads(text).values()}) == 1000


@pytest.mark.parametrize("name", ["white shark", "WHITE  SHARK", "man-eater", SHARK, "2", " 2 ", 2])
def test_one_class_by_any_of_its_names_or_its_id(name):
    assert resolve_labels([name], imagenet_labels()) == [2]


def test_order_and_repeats_are_kept():
    assert resolve_labels(["goldfish", 207, "goldfish", "0"], imagenet_labels()) == [1, 207, 1, 0]


def test_every_name_of_imagenet_finds_its_class_unless_classes_share_it():
    table = imagenet_labels()
    owners = {}
    for label, names in table.items():
        for name in names.split(", "):
            owners.setdefault(name, []).append(label)
    own = [name for name, classes in owners.items() if len(classes) == 1]
    assert len(owners) - len(own) == 18
    assert resolve_labels(own, table) == [owners[name][0] for name in own]


def test_case_matters_only_where_it_tells_two_classes_apart():
    assert resolve_labels(["Cardigan", "cardigan", "PULLOVER"], {0: "Cardigan", 1: "cardigan", 2: "pullover"}) == [
        0,
        1,
        2,
    ]
    with pytest.raises(ConfigError, match=r"264 \(Cardigan\), 474 \(cardigan\)"):
        resolve_labels(["CARDIGAN"], imagenet_labels())


def test_a_name_comes_before_an_id():
    assert resolve_labels(["5", 5], {5: "0", 0: "5"}) == [0, 5]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("grate white shark", "Did you mean 'great white shark'"),
        ("crane", r"134 \(crane\), 517 \(crane\)"),
        ("Panda", r"387 \(lesser panda\), 388 \(giant panda\)"),
        ("xqzw", "no class is called 'xqzw'"),
        ("", "no class is called ''"),
        ("²", "no class is called"),
        ("-1", "no class is called '-1'"),
        (1000, "the ids are 0 to 999"),
        ("1000", "the ids are 0 to 999"),
        (-1, "there is no class -1"),
    ],
)
def test_what_cannot_be_found_is_explained(label, message):
    with pytest.raises(ConfigError, match=message):
        resolve_labels([label], imagenet_labels())


def test_a_missing_or_damaged_table_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "IMAGENET_FILE", tmp_path / "labels.json")
    with pytest.raises(DataError, match=r"labels\.json is missing.*make_imagenet_labels"):
        imagenet_labels()
    for content in ("{", "[]", '{"0": "tench"}', '{"x": {"names": "tench"}}', '{"0": {}}'):
        labels.IMAGENET_FILE.write_text(content)
        with pytest.raises(DataError, match="damaged"):
            imagenet_labels()


def test_the_maker_writes_the_same_layout(tmp_path, run_command):
    wheel, output = tmp_path / "timm.whl", tmp_path / "labels.json"
    wnids = [f"n{number:08d}" for number in range(1000)]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("timm/data/_info/imagenet_synsets.txt", "\n".join(reversed(wnids)))
        archive.writestr(
            "timm/data/_info/imagenet_synset_to_lemma.txt", "".join(f"{wnid}\tname {wnid}, other\n" for wnid in wnids)
        )
    result = run_command(ROOT / "scripts/make_imagenet_labels.py", "--wheel", wheel, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "1000 classes, 2000 names" in result.stdout
    assert json.loads(output.read_text())["0"] == {"wnid": "n00000999", "names": "name n00000999, other"}


def test_the_maker_refuses_another_file(tmp_path, run_command):
    result = run_command(ROOT / "scripts/make_imagenet_labels.py", "--wheel", tmp_path / "absent.whl")
    assert result.returncode == 2
    assert "does not hold timm's class names" in result.stderr
    assert "Traceback" not in result.stderr
