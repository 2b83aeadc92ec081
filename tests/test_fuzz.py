"""Random command lines: a clean run, or one line and status 2. FUZZ_EXAMPLES=10000 for a long night."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main_binary_reg
from training.folder import Run

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "600"))

numbers = st.one_of(
    st.integers(-5, 2000).map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-0", "1e400", "1e-400", "nan", "inf", "-inf", "0x10", "1_000", "٣", "1,2", " 3", "9" * 400, "--lr"]),
)
words = st.one_of(
    st.sampled_from(["prox", "lazy", "prox_ternary", "resnet", "sample", "Adam", "SGD", "cpu", "cuda", "bf16"]), st.text(max_size=8)
)
names = st.sampled_from(["depth", "lr", "optimizer", "Adam", "momentum", "betas"])
leaves = st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), names)
literals = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(leaves, inner, max_size=3)), max_leaves=6
).map(repr)
settings_names = st.sampled_from(["lr", "optimizer", "momentum", "weight_decay", "betas", "nesterov", "speed", "eps", "foreach"])
settings_values = st.one_of(leaves, st.sampled_from(["Adam", "SGD", "x"]), st.integers(), st.tuples(st.floats(), st.floats()))
regimes_in_shape = st.dictionaries(
    st.integers(0, 9), st.dictionaries(settings_names, settings_values, max_size=3), min_size=1, max_size=3
).map(repr)
texts = st.one_of(numbers, words, literals, st.just("{" * 300), st.just("(" * 5000))
VALUES = {
    **dict.fromkeys(
        [
            "--epochs",
            "--start-epoch",
            "--batch-size",
            "--freeze_epoch",
            "--print-freq",
            "-j",
            "--seed",
            "--input_size",
            "--holdout",
        ],
        numbers,
    ),
    **dict.fromkeys(["--lr", "--learning_rate", "--momentum", "--wd", "--reg_rate", "--binary_reg", "--gpus", "--gpu"], numbers),
    **dict.fromkeys(["--projection_mode", "--model", "-a", "--optimizer", "--device", "--precision"], words),
    **dict.fromkeys(
        ["--model_config"], st.one_of(literals, texts, st.sampled_from(["{'depth': 8}", "{'depth': 14, 'num_classes': 12}"]))
    ),
    **dict.fromkeys(["--regime"], st.one_of(literals, regimes_in_shape, texts)),
    **dict.fromkeys(
        ["--save", "--resume", "--evaluate", "-e", "--tb_dir", "--results_dir"],
        st.one_of(words, st.just("\0"), st.just("/dev/null/x")),
    ),
}
SWITCHES = [
    "--binary_regime",
    "--ttq_regime",
    "--deterministic",
    "--sync_bn",
    "--no_adjust",
    "--adjust_reg",
    "--keep_optimizer_state",
    "--save_all",
    "--overwrite",
    "--tf32",
]
piece = st.one_of(
    st.sampled_from(sorted(VALUES)).flatmap(lambda flag: VALUES[flag].map(lambda value: [flag, value])),
    st.sampled_from(sorted(VALUES)).flatmap(lambda flag: VALUES[flag].map(lambda value: [f"{flag}={value}"])),
    st.sampled_from(SWITCHES).map(lambda flag: [flag]),
    st.sampled_from(sorted(VALUES)).map(lambda flag: [flag]),  # its value is missing, or is the next flag
    texts.map(lambda text: [text]),
)


class Reached(Exception):
    """Everything is checked; training would begin."""


@pytest.fixture(scope="module")
def no_training():
    """Lets a run come up to its folder and no further."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(self):
            raise Reached

        patch.setattr(Run, "open", stop)
        patch.setattr(main_binary_reg.computing, "keep_freed_memory", lambda: None)
        yield


@settings(max_examples=EXAMPLES)
@given(pieces=st.lists(piece, max_size=6))
def test_command_lines(no_training, tmp_path_factory, pieces):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    argv = [
        "--dataset",
        "sample",
        "--model_config",
        "{'depth': 8}",
        "--results_dir",
        str(folder),
        *(word for part in pieces for word in part),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        messages = []
        patch.setattr(
            "sys.stderr", type("Stream", (), {"write": lambda self, text: messages.append(text), "flush": lambda self: None})()
        )
        try:
            status = main_binary_reg.main(argv)
        except Reached:
            status = 0
        except SystemExit as end:
            status = end.code
    assert status in (0, 2), argv
    said = "".join(messages)
    if status == 2:
        assert said.startswith("main_binary_reg.py: error: ")
        assert said.count("\n") == 1, said
    assert sorted(folder.rglob("*")) == before
