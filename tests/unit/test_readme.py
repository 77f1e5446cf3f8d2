"""What the README promises exists: its commands, its files."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_make_target_named_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target} is in the README but not in the Makefile"


def test_every_file_named_in_the_readme_exists() -> None:
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), f"README.md links to {name}, which is not there"


def test_every_heal_command_named_in_the_readme_exists() -> None:
    from typer.main import get_command

    from orchestrator.cli.main import cli

    known = set(get_command(cli).commands)  # type: ignore[attr-defined]
    for name in re.findall(r"^\.venv/bin/heal ([a-z]+)", (ROOT / "README.md").read_text(), re.M):
        assert name in known, f"heal {name} is in the README but is no command"
