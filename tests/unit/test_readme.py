"""What the README promises exists: each of its commands is parsed by the real command line, Makefile or app."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"(?:^ {4}.*\n)+", README, re.M))  # indented: commands and output


def commands(program: str) -> list[str]:
    """Lines of the README's blocks that call `program` (with or without its path)."""
    found = re.findall(rf"^ {{4}}(?:\$ )?((?:\.venv/bin/)?{program} .*?)(?:\s+#.*)?$", BLOCKS, re.M)
    assert found, f"the README shows no {program} command"
    return found


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_exists(line: str) -> None:
    for target in shlex.split(line)[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line


def test_every_file_that_is_linked_exists() -> None:
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / name).exists(), f"README.md links to {name}, which is not there"


@pytest.mark.parametrize("line", commands("heal"))
def test_every_heal_command_is_parsed(line: str) -> None:
    """Down to the last option: click parses it as it does before a command runs, and runs nothing."""
    from typer.main import get_command

    from orchestrator.cli.main import cli

    words = shlex.split(line)[1:]
    command = get_command(cli)
    context = None
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{line}: {words[0]} is no command"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("heal", list(words), resilient_parsing=False)
    assert context.params, line


@pytest.mark.parametrize("line", commands("serve run"))
def test_every_serve_command_names_arguments_of_the_app(line: str) -> None:
    from orchestrator.launch import AppArgs

    words = shlex.split(line)
    assert words[2] == "serve_app:app", line
    AppArgs(**dict(word.split("=", 1) for word in words[3:]))  # pydantic refuses an unknown one and a wrong value


def test_the_exit_codes_of_the_readme_are_those_of_the_code() -> None:
    from orchestrator.cli.console import CANNOT, FINE, NOT_FINE

    found = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.M)}
    assert found == {FINE, NOT_FINE, CANNOT}


def test_every_command_of_the_command_line_is_in_the_readme() -> None:
    from typer.main import get_command

    from orchestrator.cli.main import cli

    for name, command in get_command(cli).commands.items():  # type: ignore[attr-defined]
        for words in [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]:
            assert f"`{words}" in README or f"heal {words}" in README, f"heal {words} is not in the README"
