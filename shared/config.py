"""Configuration: YAML files, environment and command line, merged key by key and checked by frozen models.

A setting is a leaf in a section, named by its dotted key (`link.max_stall_ms`). Later sources win: the package's
`default.yaml`, the user's file, environment variables, the command line. Scalars are read as the text that stands
there and get their type from the model, so `off` is a word and `0123` keeps its zero, whatever YAML would make of them;
`null`, `~` and nothing at all mean "not set".
"""

import difflib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import Self

SectionT = TypeVar("SectionT", bound="Section")
Key = tuple[str, ...]
Setting = tuple[Key, object, str]  # the key's parts, the value, where it was set

NoneType = type(None)
_WORDS: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp"))


class ConfigError(Exception):
    """A setting is wrong; the message is one line: where it was set, what is wrong, what was expected."""


class Section(BaseModel):
    """A group of settings. Defaults live in `default.yaml` and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _existing_file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _host_and_port(address: str) -> str:
    if address.startswith("unix:"):
        return address
    host, _, port = address.rpartition(":")
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not host or bare_ipv6 or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected host:port, [ipv6]:port or unix:path, got {address!r}")
    return address


def _token(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    # It travels as gRPC metadata, which allows printable ASCII only.
    if not text or not all("!" <= char <= "~" for char in text):
        raise ValueError("a token is one or more printable ASCII characters without spaces")
    return secret


ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
Address = Annotated[str, AfterValidator(_host_and_port)]
Token = Annotated[SecretStr, AfterValidator(_token)]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`, an `Address`. Host names other than localhost count as outside."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


class TokenSection(Section):
    """A section with a bearer token, given in place or in a file that is read once, at load."""

    token: Token | None
    token_file: ExistingFile | None

    @model_validator(mode="before")
    @classmethod
    def _read_token_file(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        token, token_file = settings.get("token"), settings.get("token_file")
        if not isinstance(token_file, str | Path):
            return settings  # not set, or refused with the other fields
        if token is not None:
            raise ValueError("token and token_file are both set; keep one")
        try:
            path = _existing_file(Path(token_file))
            return {**settings, "token": _token(SecretStr(path.read_text(encoding="utf-8").strip()))}
        except (OSError, ValueError) as error:
            raise ValueError(f"token_file: {error}") from error


class TlsConfig(Section):
    """This side's certificate and key, PEM files: both or neither."""

    cert_file: ExistingFile | None
    key_file: ExistingFile | None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together; set both or neither")
        return self


class LogConfig(Section):
    """What is logged to stderr, and how it looks."""

    level: Literal["debug", "info", "warning", "error"]
    format: Literal["console", "json"]


def load_config(
    model: type[SectionT],
    path: Path | None,
    defaults: Path,
    env_prefix: str,
    environ: Mapping[str, str],
    overrides: Mapping[str, object],
) -> SectionT:
    """Read, merge and check the settings of `model`.

    `defaults` is the package's default.yaml and must set every key; `path` is the user's file, if any. A variable
    `<env_prefix>SECTION__KEY` sets `section.key`. `overrides` maps dotted keys to values from the command line, where
    None means "not given". Raises `ConfigError` for the first mistake, with the number of further ones.
    """
    merged: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    files = [defaults] if path is None else [defaults, path]
    settings = [setting for file in files for setting in _read_yaml(file)]
    settings += _read_environ(model, env_prefix, environ)
    settings += [
        (tuple(name.split(".")), value, "command line") for name, value in overrides.items() if value is not None
    ]
    for key, value, origin in settings:
        if not _set(merged, key, value):
            raise ConfigError(f"{origin}: {'.'.join(key)}: expected a section, got {value}")
        origins.update({key[:depth]: origin for depth in range(1, len(key) + 1)})
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_describe(model, error, origins)) from None


def _set(tree: dict[str, Any], key: Key, value: object) -> bool:
    """Put a leaf into nested dicts; False where a section stands in its place."""
    *sections, leaf = key
    for name in sections:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    if isinstance(tree.get(leaf), dict):
        return value is None  # a section whose keys are all commented out changes nothing
    tree[leaf] = value
    return True


def _read_yaml(path: Path) -> list[Setting]:
    """The leaves of a YAML file, in order."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        parts = [getattr(error, name, None) for name in ("context", "problem", "reason")]
        problem = ", ".join(part for part in parts if part)
        raise ConfigError(f"{where}: YAML syntax: {problem}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: expected sections with `key: value` lines, got {_kind(root)}")
    return list(_leaves(root, (), path))


def _leaves(section: yaml.MappingNode, prefix: Key, path: Path) -> Iterator[Setting]:
    first_lines: dict[str, int] = {}
    for key_node, value_node in section.value:
        line = key_node.start_mark.line + 1
        where = f"{path}:{line}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: expected a word as key, got {_kind(key_node)}")
        key = (*prefix, key_node.value)
        if key_node.value in first_lines:
            raise ConfigError(f"{where}: {'.'.join(key)}: set twice; line {first_lines[key_node.value]} sets it too")
        first_lines[key_node.value] = line
        if len(key) > 8:  # ours are at most 3 deep; an alias to its own parent has no end
            raise ConfigError(f"{where}: {'.'.join(key)}: nested too deep")
        if isinstance(value_node, yaml.MappingNode):
            yield from _leaves(value_node, key, path)
        elif isinstance(value_node, yaml.SequenceNode):
            yield key, [_scalar(item, key, where) for item in value_node.value], where
        else:
            yield key, _scalar(value_node, key, where), where


def _scalar(node: yaml.Node, key: Key, where: str) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: {'.'.join(key)}: expected a single value, got {_kind(node)}")
    if node.tag not in _SCALAR_TAGS:
        raise ConfigError(f"{where}: {'.'.join(key)}: the tag {node.tag} is not supported; write plain text")
    return None if node.style is None and node.value in _NULLS else str(node.value)


def _kind(node: yaml.Node) -> str:
    return (
        "a section"
        if isinstance(node, yaml.MappingNode)
        else "a list"
        if isinstance(node, yaml.SequenceNode)
        else "text"
    )


def _read_environ(model: type[Section], prefix: str, environ: Mapping[str, str]) -> Iterator[Setting]:
    names = {prefix + "__".join(key).upper(): key for key in _keys(model)}
    for name in sorted(environ):
        if not name.startswith(prefix):
            continue
        if name not in names:
            raise ConfigError(f"environment variable {name}: unknown setting{_suggest(name, names)}")
        yield names[name], None if environ[name] in _NULLS else environ[name], f"environment variable {name}"


def _keys(model: type[Section], prefix: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from _keys(field.annotation, (*prefix, name))  # type: ignore[arg-type]  # _is_section has checked it
        else:
            yield (*prefix, name)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _describe(model: type[Section], error: ValidationError, origins: Mapping[Key, str]) -> str:
    """The first mistake (in file order of the model) as one line."""
    first, count = error.errors(include_url=False)[0], error.error_count()
    key = tuple(str(part) for part in first["loc"])
    origin = next((origins[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in origins), "configuration")
    where = origin if origin.startswith("environment") else f"{origin}: {'.'.join(key)}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{where}: {_problem(model, key, first)}{more}"


def _problem(model: type[Section], key: Key, error: ErrorDetails) -> str:
    for name in key[:-1]:
        model = model.model_fields[name].annotation  # type: ignore[assignment]  # only sections have keys below them
    if error["type"] == "extra_forbidden":
        return f"unknown key{_suggest(key[-1], model.model_fields)}"
    if error["type"] == "missing":
        return "not set, and there is no default"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    got = error["input"]
    field = model.model_fields[key[-1]]
    if isinstance(got, dict | list):
        got = "a section" if isinstance(got, dict) else "a list"
    elif SecretStr in _options(field.annotation):
        got = "something else"  # a secret is never shown
    return f"expected {_expected(field)}, got {'nothing' if got is None else got}"


def _expected(field: FieldInfo) -> str:
    """A setting's domain in words, from its type and bounds."""
    limits = {
        name: getattr(item, name) for item in field.metadata for name in ("ge", "gt", "le") if hasattr(item, name)
    }
    words = []
    for option in _options(field.annotation):
        text = _WORDS.get(option, "text")
        if get_origin(option) is Literal:
            text = "one of " + ", ".join(get_args(option))
        elif isinstance(option, type) and issubclass(option, Enum):
            text = "one of " + ", ".join(member.value for member in option)
        if option in (int, float) and limits:
            text += f" from {limits['ge']} to " if "ge" in limits else f" above {limits['gt']} and up to "
            text += str(limits["le"])
        words.append(text)
    return " or ".join(words)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type, such as int and None of `int | None`."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if NoneType in get_args(annotation):
        return tuple(option for argument in get_args(annotation) for option in _options(argument))
    return (annotation,)


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
