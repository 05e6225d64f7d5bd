"""Places in a command, edits of its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autobatch import UsageError
from autobatch.command.template import CommandTemplate, CommandValues

VALUES = CommandValues(micro_batch_size=8, accumulation_steps=2, target=64, world_size=4)


def test_places_are_filled(tmp_path: Path) -> None:
    """Every place, wherever it stands in an argument; other braces stay as they are; the same in variables."""
    words = ["train", "-b={micro_batch_size}", "{accumulation_steps}x{target}", "{world_size}", '{"a": {other}}']
    rendered = CommandTemplate.parse(words).render(VALUES, tmp_path)
    assert rendered.arguments == ("train", "-b=8", "2x64", "4", '{"a": {other}}')
    assert rendered.environment == {
        "AUTOBATCH_MICRO_BATCH_SIZE": "8",
        "AUTOBATCH_ACCUMULATION_STEPS": "2",
        "AUTOBATCH_TARGET": "64",
        "AUTOBATCH_WORLD_SIZE": "4",
    }


FILES = {
    "c.json": '{"train": {"batch": 1, "name": "x"}, "list": [{"a": 1}]}',
    "c.yaml": "# a comment\ntrain:\n  batch: 1  # small\n  name: 'x'\nlist:\n- a: 1\n",
    "c.toml": '# a comment\n[train]\nbatch = 1\nname = "x"\n[[list]]\na = 1\n',
}


def read(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["{path}", "--config={path}"])
def test_a_key_is_set_in_a_copy(name: str, form: str, tmp_path: Path) -> None:
    """Several keys of one file, numbers as numbers and text as text; the original has its bytes, the copy its name."""
    original = tmp_path / name
    original.write_text(FILES[name], encoding="utf-8")
    edits = [
        f"{original}:train.batch={{micro_batch_size}}",
        f"{original}:train.name=run-{{micro_batch_size}}",
        f"{original}:list.0.a={{target}}",
    ]
    rendered = CommandTemplate.parse(["python", form.format(path=original)], edits).render(VALUES, tmp_path / "copies")
    copy = Path(rendered.arguments[1].removeprefix("--config="))
    assert copy.name == name
    assert read(copy) == {"train": {"batch": 8, "name": "run-8"}, "list": [{"a": 64}]}
    assert original.read_text(encoding="utf-8") == FILES[name]
    if name != "c.json":
        assert "# a comment" in copy.read_text(encoding="utf-8")


def test_a_key_of_a_part_that_stands_twice(tmp_path: Path) -> None:
    """In YAML by an alias: it is set in the one place alone; a file may begin with a byte-order mark."""
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffbase: &b {bs: 4, n: 1}\nother: *b\nmore:\n  <<: *b\n  n: 2\n", encoding="utf-8")
    rendered = CommandTemplate.parse(["x", str(path)], [f"{path}:other.bs=1"]).render(VALUES, tmp_path / "copies")
    assert read(Path(rendered.arguments[1])) == {
        "base": {"bs": 4, "n": 1},
        "other": {"bs": 1, "n": 1},
        "more": {"bs": 4, "n": 2},
    }


def test_a_file_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named one way by --set and another by the command, it is one file."""
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text('{"a": 1}')
    rendered = CommandTemplate.parse(["x", str(tmp_path / "c.json")], ["c.json:a=2"]).render(
        VALUES, tmp_path / "copies"
    )
    assert read(Path(rendered.arguments[1])) == {"a": 2}


def test_a_value_that_the_format_lacks(tmp_path: Path) -> None:
    """TOML has no null."""
    path = tmp_path / "c.toml"
    path.write_text("a = 1\n")
    with pytest.raises(UsageError, match=r"c\.toml cannot hold null at a"):
        CommandTemplate.parse(["x", str(path)], [f"{path}:a=null"]).render(VALUES, tmp_path / "copies")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("c.yaml:train.bach=1", r"no key train\.bach .*: train has batch, name"),
        ("c.yaml:list.7.a=1", r"no key list\.7\.a .*: list has a \w+"),
        ("c.yaml:train.batch.deep=1", r"train\.batch has a \w+"),
        ("d.yaml:a=1", r"cannot read d\.yaml"),
        ("broken.json:a=1", r"cannot read broken\.json"),
        ("broken.yaml:a=1", r"cannot read broken\.yaml"),
        ("broken.toml:a=1", r"cannot read broken\.toml"),
        ("c.json:train.batch=1", r"no argument of the command names that file"),
        ("c.yaml:=1", r"FILE:KEY=VALUE"),
        ("c.yaml:a..b=1", r"FILE:KEY=VALUE"),
    ],
)
def test_edits_that_cannot_be_made(edit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is started, with what there is instead."""
    monkeypatch.chdir(tmp_path)
    for name, text in {**FILES, "broken.json": "{", "broken.yaml": "a: [", "broken.toml": "a ="}.items():
        Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        CommandTemplate.parse(["python", "c.yaml", "d.yaml", "broken.json", "broken.yaml", "broken.toml"], [edit])


@pytest.mark.parametrize(
    "words",
    [
        ["python", "{micro_batch_size}"],
        ["bash", "-c", "python t.py --bs $AUTOBATCH_MICRO_BATCH_SIZE"],
        ["bash", "script.sh"],
    ],
)
def test_what_depends_on_the_size(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place, the variable in a shell's words, or in a script that is named."""
    monkeypatch.chdir(tmp_path)
    Path("script.sh").write_text("python t.py $AUTOBATCH_MICRO_BATCH_SIZE\n", encoding="utf-8")
    CommandTemplate.parse(words).check_size_is_used(variable_read=False)


def test_nothing_depends_on_the_size() -> None:
    """An error with all ways out, and with the word that was meant; not where a process read the variable."""
    template = CommandTemplate.parse(["python", "{micro_batch}", "{epochs}"])
    with pytest.raises(
        UsageError, match=r"\(\{micro_batch\} is no place\).*\{micro_batch_size\}.*--set.*AUTOBATCH_MICRO"
    ):
        template.check_size_is_used(variable_read=False)
    template.check_size_is_used(variable_read=True)
    with pytest.raises(UsageError, match="no command"):
        CommandTemplate.parse([])
