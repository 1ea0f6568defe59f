"""Merging, typing and error messages, on a small model; the sides' own settings have their own tests."""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from shared.config import Address, ConfigError, Section, TlsConfig, TokenSection, is_loopback, load_config


class Mode(Enum):
    OFF = "off"
    ON = "on"


class Inner(Section):
    size: Annotated[int, Field(ge=1, le=10)]
    share: Annotated[float, Field(gt=0, le=1)]


class Main(TokenSection):
    name: str | None
    mode: Mode
    colour: Literal["red", "blue"]
    quick: bool
    inner: Inner
    tls: TlsConfig


class Everything(Section):
    main: Main


DEFAULTS = """\
main:
  name: null
  mode: "on"
  colour: red
  quick: true
  token: null
  token_file: null
  inner:
    size: 3
    share: 0.5
  tls:
    cert_file: null
    key_file: null
"""

Load = Callable[..., Main]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load settings from the text of a user's file, environment variables and overrides."""

    def load(text: str = "", environ: Mapping[str, str] | None = None, **overrides: object) -> Main:
        defaults, path = tmp_path / "default.yaml", tmp_path / "my.yaml"
        defaults.write_text(DEFAULTS)
        path.write_text(text)
        dotted = {name.replace("__", "."): value for name, value in overrides.items()}
        return load_config(Everything, path, defaults, "T_", environ or {}, dotted).main

    return load


def error_of(load: Load, *args: object, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    return re.sub(r"^\S*/", "", message)


def test_defaults_alone(tmp_path: Path) -> None:
    defaults = tmp_path / "default.yaml"
    defaults.write_text(DEFAULTS)
    config = load_config(Everything, None, defaults, "T_", {}, {})
    assert config.main.mode is Mode.ON
    assert config.main.inner == Inner(size=3, share=0.5)


def test_each_later_source_wins_key_by_key(load: Load) -> None:
    text = "main:\n  name: file\n  colour: blue\n  inner:\n    size: 4\n"
    config = load(text, {"T_MAIN__NAME": "variable", "T_MAIN__INNER__SIZE": "5"}, main__name="flag", main__colour=None)
    assert (config.name, config.colour, config.inner.size, config.inner.share) == ("flag", "blue", 5, 0.5)


@pytest.mark.parametrize("written", ["off", '"off"', "'off'"])
def test_off_is_a_word_quoted_or_not(load: Load, written: str) -> None:
    assert load(f"main:\n  mode: {written}\n").mode is Mode.OFF


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("off", False), ("true", True), ("False", False)])
def test_yes_and_off_are_still_truth_values_where_one_is_asked_for(load: Load, written: str, value: bool) -> None:
    assert load(f"main: {{quick: {written}}}").quick is value


@pytest.mark.parametrize("written", ["0123", "1e5", "12:30:00", "2026-01-01", "no", "a: b # c", "[x", "&y", "*"])
def test_text_stays_as_it_is_written(load: Load, written: str) -> None:
    assert load(environ={"T_MAIN__NAME": written}).name == written
    assert load(f"main:\n  name: '{written}'\n").name == written


@pytest.mark.parametrize("written", ["", "null", "~"])
def test_null_unsets(load: Load, written: str) -> None:
    assert load(f"main:\n  name: {written}", main__name=None).name is None
    assert load("main: {name: x}", {"T_MAIN__NAME": written}).name is None
    assert load('main: {name: "null"}').name == "null"


@pytest.mark.parametrize("text", ["", "# nothing\n", "main:\n", "main:\n  inner:\n    # size: 4\n"])
def test_a_section_with_all_keys_commented_out_changes_nothing(load: Load, text: str) -> None:
    assert load(text) == load("main: {}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main:\n  inner:\n    size: 11\n", "my.yaml:3: main.inner.size: expected a whole number from 1 to 10, got 11"),
        ("main: {inner: {size: }}", "my.yaml:1: main.inner.size: expected a whole number from 1 to 10, got nothing"),
        ("main: {inner: {share: 0}}", "my.yaml:1: main.inner.share: expected a number above 0 and up to 1, got 0"),
        ("main: {inner: {share: inf}}", "my.yaml:1: main.inner.share: expected a number above 0 and up to 1, got inf"),
        ("main: {inner: {share: nan}}", "my.yaml:1: main.inner.share: expected a number above 0 and up to 1, got nan"),
        ("main: {quick: maybe}", "my.yaml:1: main.quick: expected true or false, got maybe"),
        ("main: {mode: fast}", "my.yaml:1: main.mode: expected one of off, on, got fast"),
        ("main: {colour: pink}", "my.yaml:1: main.colour: expected one of red, blue, got pink"),
        ("main: {name: {a: b}}", "my.yaml:1: main.name: expected text or null, got a section"),
        ("main: {name: [a]}", "my.yaml:1: main.name: expected text or null, got a list"),
        ("main: {name: [[a]]}", "my.yaml:1: main.name: expected a single value, got a list"),
        ("main: 5", "my.yaml:1: main: expected a section, got 5"),
        ("main:\n  inner: 5", "my.yaml:2: main.inner: expected a section, got 5"),
        ("main:\n  colours: red", "my.yaml:2: main.colours: unknown key; did you mean colour?"),
        ("main: {inner: {x: 1}}", "my.yaml:1: main.inner.x: unknown key; known: size, share"),
        ("mian: {}\nmain: {}\nother: 1", "my.yaml:3: other: unknown key; known: main"),
        (
            "main:\n  colour: pink\n  quick: 7",
            "my.yaml:2: main.colour: expected one of red, blue, got pink (and 1 more)",
        ),
        ("main:\n  name: a\n  name: b", "my.yaml:3: main.name: set twice; line 2 sets it too"),
        ("main: {}\nmain: {}", "my.yaml:2: main: set twice; line 1 sets it too"),
        ("main: &m\n  inner: *m", "main.inner.inner.inner.inner.inner.inner.inner.inner: nested too deep"),
        ("main: {name: !py x}", "my.yaml:1: main.name: the tag !py is not supported; write plain text"),
        ("? [a]\n: b", "my.yaml:1: expected a word as key, got a list"),
        ("- a", "my.yaml:1: expected sections with `key: value` lines, got a list"),
        ("hello", "my.yaml:1: expected sections with `key: value` lines, got text"),
        ("main:\n\tname: x", "my.yaml:2: YAML syntax: while scanning for the next token, found character"),
        ("a: \x01", "my.yaml: YAML syntax: special characters are not allowed"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_says_where(load: Load, text: str, message: str) -> None:
    assert message in error_of(load, text)


def test_mistakes_elsewhere_name_their_source(load: Load) -> None:
    variable = {"T_MAIN__INNER__SIZE": "many"}
    expected = "environment variable T_MAIN__INNER__SIZE: expected a whole number from 1 to 10, got many"
    assert error_of(load, "main: {inner: {size: 2}}", variable) == expected
    expected = "environment variable T_MAIN__COLOR: unknown setting; did you mean T_MAIN__COLOUR?"
    assert error_of(load, "", {"T_MAIN__COLOR": "red"}) == expected
    assert error_of(load, main__colour="pink") == "command line: main.colour: expected one of red, blue, got pink"
    assert error_of(load, main__x=1).startswith("command line: main.x: unknown key")


def test_other_variables_are_left_alone(load: Load) -> None:
    assert load(environ={"MAIN__NAME": "x", "PATH": "/bin"}).name is None


def test_unreadable_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=rf"^{missing}: no such file; give the path of a YAML"):
        load_config(Everything, missing, missing, "T_", {}, {})
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(Everything, None, tmp_path, "T_", {}, {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        load_config(Everything, None, binary, "T_", {}, {})


def test_a_key_without_default_is_our_mistake_and_is_named(tmp_path: Path) -> None:
    defaults = tmp_path / "default.yaml"
    defaults.write_text(DEFAULTS.replace("  colour: red\n", ""))
    with pytest.raises(ConfigError, match=r"default\.yaml:\d+: main\.colour: not set, and there is no default"):
        load_config(Everything, None, defaults, "T_", {}, {})


def test_settings_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().inner.size = 4


def test_a_token_is_read_from_its_file_and_never_shown(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    config = load(f"main: {{token_file: {file}}}")
    assert config.token is not None
    assert config.token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(config)
    assert "s3cret" not in config.model_dump_json()


def test_mistakes_with_tokens(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("two words\n")
    printable = "a token is one or more printable ASCII characters without spaces"
    assert error_of(load, f"main: {{token_file: {file}}}") == f"my.yaml:1: main: token_file: {printable}"
    assert error_of(load, 'main: {token: "pass word"}') == f"my.yaml:1: main.token: {printable}"
    both = error_of(load, "main: {token: a}", {"T_MAIN__TOKEN_FILE": str(file)})
    assert both == "environment variable T_MAIN__TOKEN_FILE: token and token_file are both set; keep one"
    missing = tmp_path / "none"
    assert error_of(load, main__token_file=missing) == f"command line: main: token_file: no such file: {missing}"
    file.write_bytes(b"\xff")
    assert "token_file: 'utf-8' codec can't decode" in error_of(load, main__token_file=str(file))
    assert error_of(load, main__token=9876) == "command line: main.token: expected text or null, got something else"
    assert "expected text or null, got a section" in error_of(load, "main: {token_file: {a: b}}")


def test_tls_needs_certificate_and_key_together(load: Load, tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("")
    assert load(main__tls__cert_file=pem, main__tls__key_file=str(pem)).tls.key_file == pem
    half = error_of(load, f"main:\n  tls:\n    cert_file: {pem}\n")
    assert half == "my.yaml:3: main.tls: cert_file and key_file belong together; set both or neither"
    assert error_of(load, "main: {tls: {cert_file: /none}}") == "my.yaml:1: main.tls.cert_file: no such file: /none"


def test_paths_may_begin_at_home(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("t")
    assert load("main: {token_file: ~/token}").token_file == tmp_path / "token"


@pytest.mark.parametrize(
    ("address", "only_this_machine"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("localhost:65535", True),
        ("[::1]:1", True),
        ("unix:/run/outrider.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("127.0.0.1.example.com:1", False),
        ("verifier.example.com:443", False),
    ],
)
def test_addresses(address: str, only_this_machine: bool) -> None:
    class Listener(Section):
        address: Address

    assert Listener(address=address).address == address
    assert is_loopback(address) is only_this_machine


@pytest.mark.parametrize("address", ["", "localhost", ":1", "a:", "a:b", "a:65536", "a:-1", "::1:5", "http://a"])
def test_what_is_no_address(address: str) -> None:
    class Listener(Section):
        address: Address

    with pytest.raises(ValidationError, match="expected host:port"):
        Listener(address=address)
