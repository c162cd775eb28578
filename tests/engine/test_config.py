"""The engine's settings: bounds, files nobody vouches for, changes while running, the manual."""

from __future__ import annotations

import ast
import json
import time
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.cli.config import commented_yaml, markdown_table
from nanocupy.engine.config import SETTINGS, EngineConfig, Setting
from nanocupy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str | bytes, name: str = "engine.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    """What the file is refused with: one line that names it."""
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_file(path)
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# --------------------------------------------------------------------- bounds

# name -> (values at and within the bounds, values beyond them), written out by hand
BOUNDS: dict[str, tuple[list[object], list[object]]] = {
    "device": (["auto", "cuda", "cpu"], ["gpu", "CPU", "", None, 0, b"cpu"]),
    "dtype": (["auto", "float32", "float16", "bfloat16"], ["fp16", "int8", None]),
    "residual_dtype": (["auto", "float32", "float16", "bfloat16"], ["fp32", "int8", None]),
    "embed_dtype": (["auto", "float32", "float16", "bfloat16"], ["int8", "half", None]),
    "lm_head_dtype": (["auto", "float32", "float16", "bfloat16"], ["int4", "", None]),
    "weight_format": (["auto", "float", "int8", "int4", "fp8"], ["int2", "", None]),
    "kv_cache_dtype": (
        ["auto", "float32", "float16", "bfloat16", "int8", "fp8"],
        ["int4", "float8", None],
    ),
    "max_context": ([None, 2, 1 << 28], [1, 0, -1, (1 << 28) + 1, 4096.0, "4096"]),
    "max_num_seqs": ([1, 16, 65536], [0, -1, 65537, None, True, "16", 1.5]),
    "batch_size": ([None, 1, 16], [0, 65537, 2.0]),
    "max_chunk_size": ([None, 2048, 65536], [0, 65537, "auto"]),
    "chunk_size": ([1, 512, 65536], [0, 65537, None, False, 10**5000]),
    "block_size": ([1, 16, 256], [0, 257, None]),
    "gpu_memory_utilization": ([0.05, 0.9, 0.98], [0.04, 0.99, 1, 90, float("nan"), "0.9", None]),
    "cpu_cache_share": ([0.01, 0.9], [0, 0.0099, 0.91, float("inf"), True]),
    "policy": (["fcfs", "priority"], ["lifo", None, ["fcfs"]]),
    "level_weight": ([0, 1, 2.5, 1e6], [-0.1, 1000001, float("nan"), float("inf"), 10**400]),
    "vip_weight": ([0, 1e6], [-1, 1e7, None]),
    "deadline_weight": ([0, 1e6], [-1, 1e7, "1"]),
    "shortest_first_weight": ([0, 1e6], [-1, 1e7, {}]),
    "ageing_weight": ([0, 1e6], [-1, 1e7, float("-inf")]),
    "preemption": (["auto", "swap", "recompute"], ["none", None, True]),
    "max_preemptions": ([0, 4, 1000], [-1, 1001, None]),
    "host_cache_gb": ([0, 4, 4096], [-0.5, 4097, None]),
    "prefix_cache": ([True, False], [0, 1, "true", None]),
    "use_graphs": ([True, False], [1, "yes"]),
    "whole_steps": ([True, False], [1, "one"]),
    "two_streams": ([True, False], [0, "no"]),
    "run_ahead": ([True, False], [0.0, "on"]),
    "speculate": (["auto", "off", "ngram", "draft"], ["on", "eagle", None, False]),
    "draft_model": (
        [None, "small.nano", "owner/name@v1", "ä b", "x" * 4096, "null"],
        ["", "a\nb", "\0", "x" * 4097, 1, True, ["a"], b"a"],
    ),
    "draft_tokens": ([1, 5, 7], [0, -1, 8, 10**9, None, True, 2.0, "5"]),
}


def test_the_declaration_is_the_class() -> None:
    assert list(SETTINGS) == [f.name for f in fields(EngineConfig)] == list(BOUNDS)
    for name, setting in SETTINGS.items():
        assert setting.name == name
        assert getattr(EngineConfig(), name) == setting.default
        assert setting.meaning
        assert len(setting.meaning) <= 80
    live = {name for name, setting in SETTINGS.items() if setting.live}
    weights = {f"{n}_weight" for n in ("level", "vip", "deadline", "shortest_first", "ageing")}
    assert live == {"chunk_size", "batch_size", "policy"} | weights


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    inside, outside = BOUNDS[name]
    for value in inside:
        room = {"max_chunk_size": 65536} if name == "chunk_size" else {}
        if value == "draft":
            room = {"draft_model": "small.nano"}
        made = EngineConfig(**room).with_(**{name: value})
        assert getattr(made, name) == value
        assert type(getattr(made, name)) is (
            SETTINGS[name].kind if value is not None else type(None)
        )
    for value in outside:
        with pytest.raises(ConfigError, match=rf"^{name} is .*; it must be ") as caught:
            EngineConfig(**{name: value})
        assert SETTINGS[name].bounds in str(caught.value)
        assert len(str(caught.value)) < 250


def test_a_running_value_stays_below_its_maximum() -> None:
    with pytest.raises(ConfigError, match="batch_size is 17, above max_num_seqs, which is 16"):
        EngineConfig(batch_size=17)
    with pytest.raises(ConfigError, match="chunk_size is 2048, above max_chunk_size, which is 256"):
        EngineConfig(max_chunk_size=256)
    config = EngineConfig(chunk_size=64)
    assert (config.chunk_limit, config.max_step_tokens, config.num_running) == (64, 64, 16)
    config = EngineConfig(chunk_size=4, max_chunk_size=8, max_num_seqs=20, batch_size=3)
    assert (config.chunk_limit, config.max_step_tokens, config.num_running) == (8, 20, 3)
    assert EngineConfig(host_cache_gb=0.5).host_cache_bytes == 500_000_000
    assert EngineConfig(vip_weight=3).policy_weights == {
        "level": 1.0, "vip": 3.0, "deadline": 1.0, "shortest_first": 1.0, "ageing": 1.0,
    }  # fmt: skip


def test_where_guesses_come_from() -> None:
    config = EngineConfig()
    assert (config.proposer, config.max_drafts, config.max_draft_rows) == ("off", 0, 0)
    config = EngineConfig(speculate="ngram", draft_tokens=3, max_num_seqs=4)
    assert (config.proposer, config.max_drafts, config.max_draft_rows) == ("ngram", 3, 12)
    config = EngineConfig(draft_model="small.nano", max_num_seqs=1000)
    assert (config.proposer, config.max_drafts, config.max_draft_rows) == ("draft", 5, 256)
    assert EngineConfig(draft_model="small.nano", speculate="off").proposer == "off"
    with pytest.raises(ConfigError, match="speculate is draft, and draft_model names no model"):
        EngineConfig(speculate="draft")
    with pytest.raises(ConfigError, match=r"speculate is ngram, and draft_model is 'small\.nano'"):
        EngineConfig(speculate="ngram", draft_model="small.nano")


def test_guesses_need_room_in_a_step() -> None:
    """Beside a token of one sequence at least. Where a full batch leaves none, a smaller one does;
    and no rows are planned for that no step has."""
    config = EngineConfig(speculate="ngram", chunk_size=16, max_num_seqs=16)
    assert (config.max_step_tokens, config.max_draft_rows) == (16, 15)
    config = EngineConfig(speculate="ngram", chunk_size=2, max_num_seqs=1)
    assert config.max_draft_rows == 1
    config = EngineConfig(speculate="ngram", chunk_size=1, max_chunk_size=3, max_num_seqs=1)
    assert config.max_draft_rows == 2
    few = {"chunk_size": 1, "max_num_seqs": 1}
    assert EngineConfig(**few).max_draft_rows == 0
    assert EngineConfig(**few, draft_model="a", speculate="off").max_draft_rows == 0
    for more, start, value in (
        ({"speculate": "ngram"}, "chunk_size is 1", "ngram"),
        ({"draft_model": "small.nano"}, "chunk_size is 1", "auto"),
        ({"speculate": "ngram", "max_chunk_size": 1}, "max_chunk_size is 1", "ngram"),
    ):
        with pytest.raises(ConfigError) as raised:
            EngineConfig(**few, **more)
        assert str(raised.value) == (
            f"{start} and max_num_seqs 1: no step has room for a guess, and speculate is {value}; "
            "raise one of them, or set speculate to off"
        )


def test_the_weights_are_those_of_the_policy() -> None:
    from nanocupy.engine import policy

    assert vars(policy.PolicyWeights()) == EngineConfig().policy_weights
    units = (policy.LEVEL_STEPS, policy.VIP_STEPS, policy.DEADLINE_STEPS, policy.SHORT_PROMPT_STEPS)
    names = ("level", "vip", "deadline", "shortest_first")
    for name, steps in zip(names, units, strict=True):
        assert SETTINGS[f"{name}_weight"].unit == f"× {steps:g} steps"


def test_copies_are_checked_and_nothing_changes() -> None:
    config = EngineConfig()
    assert config.with_(chunk_size=7).chunk_size == 7
    with pytest.raises(ConfigError, match="did you mean 'chunk_size'"):
        config.with_(chunksize=7)
    with pytest.raises(ConfigError, match="chunk_size is 0"):
        config.with_(chunk_size=0)
    with pytest.raises(FrozenInstanceError):
        config.chunk_size = 7  # type: ignore[misc]
    assert config == EngineConfig()


# --------------------------------------------------------------------- while running


def test_what_a_running_engine_can_take() -> None:
    start = EngineConfig(max_num_seqs=8, chunk_size=256, max_chunk_size=512)
    assert start.changes_allowed(start) == ()
    new = start.with_(chunk_size=512, batch_size=2, policy="priority", vip_weight=9)
    assert start.changes_allowed(new) == ("batch_size", "chunk_size", "policy", "vip_weight")
    with pytest.raises(ConfigError, match=r"^chunk_size is 600; this engine .* at most 512"):
        start.changes_allowed(start.with_(chunk_size=600, max_chunk_size=None))
    with pytest.raises(ConfigError, match=r"^max_chunk_size is fixed at start, where it was 512"):
        start.changes_allowed(start.with_(chunk_size=600, max_chunk_size=600))
    with pytest.raises(ConfigError, match=r"^max_num_seqs is fixed"):
        start.changes_allowed(start.with_(max_num_seqs=9, batch_size=9))
    for name, setting in SETTINGS.items():
        changed = EngineConfig(**{name: next(v for v in BOUNDS[name][0] if v != setting.default)})
        if name == "max_chunk_size":  # as large as it is anyway
            assert EngineConfig().changes_allowed(changed) == ()
        elif setting.live:
            assert EngineConfig().changes_allowed(changed) == (name,)
        else:
            with pytest.raises(ConfigError, match=f"^{name} is fixed at start"):
                EngineConfig().changes_allowed(changed)


def test_a_maximum_left_open_is_the_one_at_start() -> None:
    start = EngineConfig(chunk_size=512)
    assert start.changes_allowed(EngineConfig(chunk_size=100)) == ("chunk_size",)
    with pytest.raises(ConfigError, match="at most 512"):
        start.changes_allowed(EngineConfig(chunk_size=513))


# --------------------------------------------------------------------- files


def values_of(setting: Setting) -> st.SearchStrategy[object]:
    if setting.kind is bool:
        values: st.SearchStrategy[object] = st.booleans()
    elif setting.is_text:
        values = st.text(min_size=1, max_size=40).filter(str.isprintable)
    elif setting.kind is str:
        values = st.sampled_from(setting.choices)
    elif setting.kind is int:
        values = st.integers(int(setting.low), int(setting.high))
    else:
        values = st.floats(setting.low, setting.high)
    return st.none() | values if setting.optional else values


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    values = {name: draw(values_of(s)) for name, s in SETTINGS.items()}
    for name, limit in (("batch_size", "max_num_seqs"), ("chunk_size", "max_chunk_size")):
        if values[name] is not None and values[limit] is not None:
            values[name] = min(values[name], values[limit])
    if values["speculate"] == ("draft" if values["draft_model"] is None else "ngram"):
        values["speculate"] = "auto"
    if values["max_num_seqs"] == values["max_chunk_size"] == 1 or (
        values["max_num_seqs"] == values["chunk_size"] == 1 and values["max_chunk_size"] is None
    ):
        values["speculate"] = "off"  # a step has no room for guesses
    return EngineConfig(**values)


@settings(max_examples=20, deadline=None)
@given(config=configs())
def test_round_trips(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    texts = {
        "a.json": json.dumps(config.to_dict()),
        "b.yaml": yaml.safe_dump(config.to_dict()),
        "c.yaml": commented_yaml(config),
        "d.yaml": json.dumps(config.to_dict()),  # JSON is YAML
    }
    for name, text in texts.items():
        assert EngineConfig.from_file(write(folder, text, name)) == config
    assert EngineConfig(**config.to_dict()) == config
    # What we write means the same to YAML 1.1, as most other programs read it.
    assert EngineConfig(**yaml.safe_load(commented_yaml(config))) == config


def test_json_escapes_of_one_character_are_one(tmp_path: Path) -> None:
    text = 'draft_model: "\\ud83d\\ude00.nano"\n'
    assert EngineConfig.from_file(write(tmp_path, text)).draft_model == "\U0001f600.nano"


def test_ways_to_write_a_value(tmp_path: Path) -> None:
    text = (
        "\ufeff# mine\nchunk_size: +010   # ten\nmax_context: ~\nlevel_weight: 1e3\n"
        "vip_weight: .5\nprefix_cache: FALSE\n'policy': \"priority\"\nhost_cache_gb: 2\n"
    )
    assert EngineConfig.from_file(write(tmp_path, text)) == EngineConfig(
        chunk_size=10, level_weight=1000.0, vip_weight=0.5, prefix_cache=False,
        policy="priority", host_cache_gb=2.0,
    )  # fmt: skip
    for text in ("", "# nothing\n", "---\n", "{}", "--- {}\n...\n"):
        assert EngineConfig.from_file(write(tmp_path, text)) == EngineConfig()
    assert EngineConfig.from_file(str(write(tmp_path, "{}", "x.JSON"))) == EngineConfig()


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 1: an anchor or alias"),
    "bomb of names": ("&a chunk_size: 3\n*a : 4\n", "line 1: an anchor or alias"),
    "alias of a value": ("chunk_size: &n 3\nmax_num_seqs: *n\n", "line 1: an anchor"),
    "anchor on the root": ("&all\nchunk_size: 3\n", "anchor"),
    "merge": ("<<: {chunk_size: 3}\n", "line 1: '<<' is a mapping"),
    "python object": ("policy: !!python/object/apply:os.getcwd []\n", "line 1: a tag"),
    "tagged root": ("!!python/object:os.x {chunk_size: 3}\n", "line 1: a tag"),
    "tagged value": ('chunk_size: !!int "3"\n', "line 1: a tag"),
    "list": ("- chunk_size\n", "line 1: settings must be lines"),
    "text": ("chunk_size\n", "line 1: settings must be lines"),
    "number": ("5\n", "line 1: settings must be lines"),
    "nested": ("dtype: auto\npolicy: {name: fcfs}\n", "line 2: policy is a mapping"),
    "a list for a value": ("chunk_size:\n  - 3\n", "line 2: chunk_size is a list"),
    "a list for a name": ("? [a]\n: 3\n", "line 1: a name is a list"),
    "twice": ("chunk_size: 3\ndtype: auto\n'chunk_size': 3\n", "line 3: 'chunk_size' is set twice"),
    "two documents": ("chunk_size: 3\n---\nchunk_size: 4\n", "line 2: a second YAML document"),
    "deep lists": ("[" * 60000, "line 1: settings must"),
    "deep lists in a value": ("chunk_size: " + "[" * 60000, "chunk_size is a list"),
    "deep mappings": ("{" * 60000, "a name is a mapping"),
    "deep dashes": ("- " * 30000, "settings must"),
    "deep questions": ("? " * 30000, "a name is a mapping"),
    "many names": ("{" + ",".join(f"k{i}" for i in range(9000)) + "}", "no setting is called 'k0'"),
    "long name": ("x" * 60000 + ": 3\n", "line 1: settings must be lines"),
    "long value": ("policy: " + "x" * 60000, "policy is 'xxx"),
    "long comment": ("#" * 70000, "larger than 65536 bytes"),
    "nul": (b"dtype: \x00", "not valid YAML"),
    "escape sequences": (b"policy: \x1b[31m", "not valid YAML"),
    "not UTF-8": (b"dtype: \xff", "byte 7 is not UTF-8"),
    "UTF-16": ("chunk_size: 3".encode("utf-16"), "byte 0 is not UTF-8"),
    "beyond Unicode": ('policy: "\\UFFFFFFFF"\n', "an escape beyond Unicode"),
    "just beyond Unicode": ('policy: "\\U00110000"\n', "an escape beyond Unicode"),
    "surrogate": ('policy: "\\uD800"\n', r"policy is '\ud800'"),
    "open quote": ('chunk_size: "3\n', "not valid YAML: found unexpected end of stream"),
    "two colons": ("dtype: auto\na: b: c\n", "line 2: not valid YAML"),
    "tab": ("\tchunk_size: 3\n", "line 1: not valid YAML"),
    "no name": (": 3\n", "not valid YAML"),
    "version": ("%YAML 9.9\n---\nchunk_size: 3\n", "not valid YAML"),
    "not a number": ("level_weight: .nan\n", "level_weight is nan; it must be a number from 0"),
    "infinite": ("level_weight: -.inf\n", "level_weight is -inf"),
    "endless digits": ("chunk_size: " + "9" * 60000, "chunk_size is '9999"),
    "overflow": ("level_weight: 1e999\n", "level_weight is inf"),
    "text for a number": ("chunk_size: '512'\n", "chunk_size is '512'; it must be a whole number"),
    "number of another base": ("chunk_size: 0x200\n", "chunk_size is '0x200'"),
    "sixties": ("chunk_size: 1:30\n", "chunk_size is '1:30'"),
    "fraction": ("chunk_size: 512.0\n", "chunk_size is 512.0; it must be a whole number"),
    "true for a number": ("chunk_size: true\n", "chunk_size is True; it must be a whole number"),
    "number for true": ("prefix_cache: 1\n", "prefix_cache is 1; it must be true or false"),
    "on": ("prefix_cache: on\n", "prefix_cache is 'on'; it must be true or false"),
    "left empty": ("policy:\n", "policy is null; it must be one of fcfs, priority"),
    "out of bounds": ("chunk_size: 0\n", "chunk_size is 0; it must be a whole number from 1"),
    "unknown": ("chunk-size: 3\n", "no setting is called 'chunk-size'; did you mean 'chunk_size'?"),
    "quite unknown": ("zzz: 3\n", "no setting is called 'zzz'; `nanocupy config --show`"),
    "number for a name": ("3: 3\n", "no setting is called '3'"),
    "one against another": ("batch_size: 20\n", "batch_size is 20, above max_num_seqs"),
}  # fmt: skip

HOSTILE_JSON: dict[str, tuple[str, str]] = {
    "list": ("[1]", "the JSON is a list"),
    "nothing": ("", "not valid JSON"),
    "twice": ('{"chunk_size": 3, "chunk_size": 4}', "the key 'chunk_size' occurs twice"),
    "nested": ('{"policy": {"name": "fcfs"}}', "policy is {'name': 'fcfs'}; it must be one of"),
    "a list for a value": ('{"chunk_size": [3]}', "chunk_size is [3]; it must be a whole number"),
    "not a number": ('{"level_weight": NaN}', "NaN is not a number JSON allows"),
    "infinite": ('{"level_weight": 1e999}', "beyond what a float can hold"),
    "deep": ('{"a":' * 9000, "nested deeper"),
    "deep and whole": ('{"a":' * 500 + "1" + "}" * 500, "nested deeper"),
    "digits": ('{"chunk_size": ' + "9" * 60000 + "}", "thousands of digits"),
    "true for a number": ('{"chunk_size": true}', "chunk_size is True"),
    "large": ('{"chunk_size": 3' + " " * 70000 + "}", "larger than 65536 bytes"),
    "unknown": ('{"polcy": "fcfs"}', "did you mean 'policy'?"),
    "YAML": ("chunk_size: 3", "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml(case: str, tmp_path: Path) -> None:
    text, says = HOSTILE[case]
    assert says in refusal(write(tmp_path, text))


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json(case: str, tmp_path: Path) -> None:
    text, says = HOSTILE_JSON[case]
    assert says in refusal(write(tmp_path, text, "engine.json"))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | st.text("aA:-?&*!|>'\"%@`{}[],# \n\t0.e~<\\x", max_size=60))
def test_any_bytes_are_read_or_refused(
    data: bytes | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp(), data, "random.yaml")
    message = ""
    try:
        assert isinstance(EngineConfig.from_file(path), EngineConfig)
    except ConfigError as exc:
        message = str(exc)
    assert "\n" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "engine.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "not a regular file" in refusal(tmp_path / "folder.yaml")
    assert "not a regular file" in refusal(Path("/dev/zero"))


# --------------------------------------------------------------------- the manual


def test_the_manual_has_the_declarations_table() -> None:
    """Where this fails: `python -c "from nanocupy.cli.config import markdown_table as t;
    print(t(), end='')"` prints the table to put there."""
    manual = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert manual.endswith("\n\n" + markdown_table())
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SETTINGS)
    assert all(row.count("|") == 7 for row in rows)


def test_the_manuals_file_works(tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sample = manual.split("```yaml\n")[1].split("```")[0]
    assert EngineConfig.from_file(write(tmp_path, sample)) == EngineConfig(
        device="cuda", max_num_seqs=64, chunk_size=1024
    )
    ast.parse(manual.split("```python\n")[1].split("```")[0])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("two_streams", "true", True), ("two_streams", "False", False), ("chunk_size", "64", 64),
        ("gpu_memory_utilization", "0.5", 0.5), ("max_context", "null", None),
    ],
)  # fmt: skip
def test_values_written_as_text(name, text, value) -> None:
    assert SETTINGS[name].parse(text) == value


@pytest.mark.parametrize(("name", "text"), [("two_streams", "1"), ("chunk_size", "x")])
def test_texts_that_are_no_value(name, text) -> None:
    with pytest.raises(ConfigError, match=name):
        SETTINGS[name].parse(text)
