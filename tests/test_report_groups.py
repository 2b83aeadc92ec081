"""Which runs the report takes together, and what it calls them."""

import csv
import json
import re

import pytest
import report
from conftest import ROOT
from made_runs import HELD_OUT, add_facts, collected, make_run, write_rows
from reporting import families, pictures, runs, tables, text

import quantize


@pytest.mark.parametrize(
    ("difference", "apart"),
    [
        ({"data_dir": "elsewhere", "workers": 3, "print_freq": 7, "checkpoint_minutes": 1.0, "save_all": True, "gpus": [3]}, False),
        ({"holdout": 0}, False),
        ({"holdout": None}, False),
        ({"compile": "auto"}, False),
        ({"device": "cpu"}, False),
        ({"device": "cuda"}, False),
        ({"compile": "on", "capture": True}, False),
        ({"holdout": 500}, True),
        ({"a_flag_to_come": 3}, True),
        ({"keep_optimizer_state": True}, True),
        ({"batch_size": 64}, True),
        ({"freeze_epoch": 3}, True),
        ({"reg_rate": 0.08}, True),
        ({"resume": "another"}, True),
        ({"model_config": {"depth": 32}}, True),
        ({"model_config": {}}, False),
    ],
)
def test_which_arguments_set_groups_apart(tmp_path, difference, apart):
    first = make_run(tmp_path / "a", "prox", 0, 20.0)
    second = make_run(tmp_path / "b", "prox", 1, 21.0, **difference)
    found, left_out = collected(first, second)
    assert len(found) == 1 + apart
    assert not left_out
    schedules = [group.schedule for group in found if group.section == found[0].section]
    assert len(set(schedules)) == len(schedules), "two groups cannot be told apart"


@pytest.mark.parametrize(
    "facts",
    [
        # typed or not, the arguments can be the same
        {"regime": {"0": {"optimizer": "Adam", "lr": 0.01, "weight_decay": 0.1}, "3": {"lr": 0.001}}},
        {"data": HELD_OUT},
    ],
)
def test_what_ran_sets_groups_apart(tmp_path, facts):
    first, second = (make_run(tmp_path / name, "prox", seed, 20.0) for seed, name in enumerate("ab"))
    assert len(collected(first, second)[0]) == 1
    add_facts(second, **facts)
    assert len(collected(first, second)[0]) == 2


def test_samples_that_differ_behind_the_same_words_are_no_group_and_no_section(tmp_path):
    """As original pixels and a lossy copy in class folders do. Of an older run it is not known which of them it read."""

    def make(name, seed, sha256, **more):
        folder = make_run(tmp_path / name, "prox", seed, 20.0, **more)
        read = json.loads((folder / "args.json").read_text())["data"]
        return add_facts(folder, data=read | ({"sha256": sha256} if sha256 else {}))

    ours, older, other = make("a", 0, "ab" * 32), make("b", 1, None), make("c", 2, "cd" * 32)
    assert [group.seeds for group in collected(ours, older)[0]] == [[0, 1]], "one data set alone is known"
    found, _ = collected(ours, older, other)
    sections = tables.sections(found)
    said = {section.groups[0].seeds[0]: section.data.rpartition("images, ")[2] for section in sections}
    assert said == {0: "sha256 abababababababab", 1: "whose sha256 is not known", 2: "sha256 cdcdcdcdcdcdcdcd"}
    assert [len(section.groups) for section in sections] == [1, 1, 1]
    from_other = make("d", 3, "ab" * 32, resume=str(other))
    assert collected(from_other)[0][0].warm_start == (f"{tmp_path.name}/c", None)


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("MNIST in Datasets", "MNIST"),
        ("MNIST in /data/Datasets", "MNIST"),
        ("CIFAR10 in Datasets, just downloaded", "CIFAR10"),
        ("class folders in my data in there/CIFAR10", "class folders"),
        ("class folders in a; b", "class folders"),
        ("class folders in Datasets, validated on 5000 held out training images", "class folders"),
        ("text in my_text", "text"),
        ("the sample in the repository (a part of Fashion-MNIST)", "the sample in the repository (a part of Fashion-MNIST)"),
    ],
)
def test_where_a_data_set_lies_sets_no_groups_apart(tmp_path, source, left):
    """As args.json has it, and as the log has it of older runs."""
    facts = {"source": source, "samples": "images", "training": 50000, "validation": 10000}
    new = add_facts(make_run(tmp_path / "new", "prox", 0, 20.0), data=facts)
    old = add_facts(make_run(tmp_path / "old", "prox", 1, 20.0), data=None)
    (old / "log.txt").write_text(f"2026-01-01 00:00:00 data: {source}; 50000 training and 10000 validation images\n")
    for folder in (new, old):
        assert runs.read(folder).data == f"{left}; 50000 training and 10000 validation images"


def test_a_mode_without_strength_has_one_group_whatever_was_written(tmp_path):
    """Older versions of the program wrote a strength of 1 for it."""
    for mode, count in (("ttq", 1), ("stoch_bin", 1), ("lazy_alt", 1), ("parq", 2), ("prox", 2)):
        for seed, strength in enumerate((1.0, "")):
            folder = make_run(tmp_path / mode / str(seed), "prox", seed, 20.0, projection_mode=mode)
            rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
            write_rows(folder, [{**row, "strength": strength} for row in rows])
        assert len(collected(tmp_path / mode / "0", tmp_path / mode / "1")[0]) == count, mode


def test_old_runs_say_the_same_in_their_log(tmp_path):
    """Those whose args.json has no such values: one group with the new ones, whose log says nothing here."""
    new, old = (make_run(tmp_path / name, "prox", seed, 20.0) for seed, name in enumerate("ab"))
    content = json.loads((old / "args.json").read_text())
    for name in ("regime", "data", "parameters", "quantized", "compiled", "captured"):
        del content[name]
    (old / "args.json").write_text(json.dumps(content))
    (old / "log.txt").write_text(
        "2026-01-01 00:00:00 run: x on cpu, fp32, seed 1\n"
        "2026-01-01 00:00:00 run: x on cpu, bf16, compiled, seed 1\n"  # continued, elsewhere
        "2026-01-01 00:00:00 data: class folders in /somewhere/private/CIFAR10; 50000 training and 10000 validation images\n"
        "2026-01-01 00:00:00 network: resnet of depth 20, 272,474 parameters, from results/fp\n"
        "2026-01-01 00:00:00 regime: {0: {'optimizer': 'Adam', 'lr': 0.01}, 3: {'lr': 0.001}}\n"
        "2026-01-01 00:00:00 mode: prox (ProxQuant-binary: as ever), 268,336 weights in 20 tensors (98.5%)\n"
    )
    first, second = runs.read(new), runs.read(old)
    for name in ("regime", "data", "parameters", "quantized"):
        assert getattr(first, name) == getattr(second, name) is not None, name
    assert (first.computed, second.computed) == ("bf16, compiled", "cpu, bf16, compiled")
    assert len(collected(new, old)[0]) == 1


def test_a_run_that_went_on_elsewhere_says_how_it_ended(tmp_path):
    folder = add_facts(make_run(tmp_path / "a", "prox", 0, 20.0), continued=[{"compiled": True}, {"compiled": False}])
    assert runs.read(folder).computed == "bf16"


@pytest.mark.parametrize(
    ("fact", "values", "words"), [("precision", ("bf16", "fp32"), "fp32"), ("processes", (1, 4), "4 processes")]
)
def test_facts_set_groups_apart(tmp_path, fact, values, words):
    for name, value in zip("ab", values, strict=True):
        add_facts(make_run(tmp_path / name, "prox", ord(name), 20.0), **{fact: value})
    found = collected(tmp_path / "a", tmp_path / "b")[0]
    assert [words in group.schedule for group in found] == [False, True]


def test_numbers_of_processes_are_those_of_all_parts_of_a_run(tmp_path):
    """A run that went on with others is neither one of the first number nor one of the last; in which order, is not told."""
    parts = {"a": (1,), "b": (1, 1), "c": (4,), "d": (1, 4), "e": (4, 1, 4), "f": (2, 16, 1)}
    for seed, (name, (first, *others)) in enumerate(parts.items()):
        continued = [{"processes": count} for count in others]
        add_facts(make_run(tmp_path / name, "prox", seed, 20.0), processes=first, continued=continued)
    found = collected(*sorted(tmp_path.iterdir()))[0]
    told = {"".join(run.folder.name for run in group.runs): group.schedule.split(", ", 5)[-1] for group in found}
    assert told == {
        "ab": "bf16",
        "c": "4 processes, bf16",
        "de": "1 and 4 processes, bf16",
        "f": "1, 2 and 16 processes, bf16",
    }


@pytest.mark.parametrize("difference", [{}, {"tf32": True}, {"batch_size": 64}])
def test_pairs_are_alike_that_differ_in_the_method_alone(tmp_path, difference):
    folders = [make_run(tmp_path / "a", "lazy", 0, 20.0), make_run(tmp_path / "b", "prox", 0, 20.0, **difference)]
    (section,) = tables.sections(collected(*folders)[0])
    assert {pair.alike for pair in tables.compare(section)} == {not difference}
    assert len({re.sub(", reg_rate 0.07", "", group.schedule) for group in section.groups}) == 1 + bool(difference)


@pytest.mark.parametrize(
    ("flag", "rate", "words"),
    [("reg_rate", 1.0, "reg_rate 1"), ("reg_rate", 0.0, None), ("binary_reg", 1.0, None), ("binary_reg", 0.5, "binary_reg 0.5")],
)
def test_a_schedule_says_the_rate_that_was_chosen(tmp_path, flag, rate, words):
    (group,) = collected(make_run(tmp_path / "a", "prox", 0, 20.0, **{"reg_rate": 0.0, flag: rate}))[0]
    assert group.schedule == "6 epochs, freeze 4, batch 128, Adam 0.01 -> 0.001@3" + (f", {words}" if words else "") + ", bf16"


def test_sections_do_not_share_files(tmp_path):
    first, second = (make_run(tmp_path / name, "prox", 0, 20.0) for name in "ab")
    add_facts(second, data=HELD_OUT)
    found = tables.sections(collected(first, second)[0])
    assert len({section.slug for section in found}) == 2


def test_a_run_that_never_froze_has_no_final_error(tmp_path):
    """Its seeds are in the tables and pictures, marked, and in no mean, comparison or figure beside the paper's."""
    never = {"prox_run_0": {"freeze_epoch": 200}, "prox_run_1": {"freeze_epoch": -1}, "prox_run_2": {"freeze_epoch": 6}}
    folders = [make_run(tmp_path / name, "prox", seed, 11.0, **more) for seed, (name, more) in enumerate(never.items())]
    folders += [make_run(tmp_path / f"lazy_run_{seed}", "lazy", seed, 20.0 + seed) for seed in range(3)]
    full_precision = make_run(tmp_path / "fp_run_0", None, 0, 15.0)
    found, left_out = collected(*folders, full_precision)
    assert {one.run.folder.name for one in left_out if "it never froze" in one.reason} == set(never)
    assert [group.finals() != {} for group in found] == [True, True, False, False, False]
    (section,) = tables.sections(found)
    assert tables.compare(section) == []  # of those that froze there is one group alone
    words = tables.error_table(section)
    assert words.count(f"| {tables.NEVER_FROZE} |") == 3
    (line,) = (line for line in csv.DictReader(tables.groups_csv([section], lambda name: None).splitlines()) if line["n"] == "3")
    assert float(line["final_error_mean"]) == pytest.approx(21.5)
    assert "11.5" not in text.report([section], [[]], [[]], left_out, lambda name: None).split("best epoch")[0]
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0


def test_a_method_is_named_with_its_quantizer_and_bits(tmp_path):
    """Of a mode that this program does not know, too."""
    for bits, error in ((1, 0.5), (2, 0.2), (3, 0.1)):
        folder = make_run(tmp_path / f"alt_{bits}_run_0", "prox", 0, 20.0, projection_mode="of_later", bits=bits, by_row=True)
        rows = [{**row, "quant_error": error} for row in csv.DictReader((folder / "results.csv").read_text().splitlines())]
        write_rows(folder, rows)
    make_run(tmp_path / "uniform_run_0", "prox", 0, 20.0, quantizer="uniform", bits=4)
    found = collected(*runs.find(tmp_path))[0]
    methods = ["ProxQuant-binary (uniform, 4 bits)", *(f"of_later ({bits}, by row)" for bits in ("1 bit", "2 bits", "3 bits"))]
    assert [group.method for group in found] == methods
    (section,) = tables.sections(found)
    (family,) = families.families(section)
    assert family.words.startswith("all under one schedule")
    assert len({(line.colour, line.marker) for line in family.lines}) == 4
    names = {picture.name for picture in pictures.draw(section, lambda name: None)}
    assert "cifar10_resnet20_bits" in names
    lines = list(csv.DictReader(tables.groups_csv([section], lambda name: None).splitlines()))
    assert [line["bits"] for line in lines] == ["4", "1", "2", "3"]
    one_of_each = tables.Section(section.groups[:1])
    assert "cifar10_resnet20_bits" not in {picture.name for picture in pictures.draw(one_of_each, lambda name: None)}


def test_the_error_before_the_freeze_is_told_of_both_networks(tmp_path):
    """As it was trained, which in an eager mode is in float, and hard-quantized, as it is judged afterwards."""
    (section,) = tables.sections(collected(make_run(tmp_path / "run", "prox", 0, 20.0))[0])
    heads, _, row = (line.strip("| ").split(" | ") for line in tables.sign_table(section).splitlines())
    assert heads[-2:] == ["error % before the freeze, weights as they are", "and hard-quantized"]
    assert row[-2:] == ["17.00 (n=1)", "22.00 (n=1)"]


def test_no_mode_is_known_by_name():
    """What the report needs of a mode it asks the mode for: a new one is one row in quantize/."""
    modes = "|".join(quantize.MODES)
    for path in (ROOT / "scripts" / "reporting").glob("*.py"):
        assert not re.findall(rf"[\"'](?:{modes})[\"']", path.read_text()), path
