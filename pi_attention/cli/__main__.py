"""Entry point: `pi-attention`, also as `python -m pi_attention.cli`. The core alone answers some."""

from __future__ import annotations

import sys


def command() -> None:
    """Run the command line, or say what to install: the core alone brings none of what the commands need."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from pi_attention import __version__

        print(f"pi-attention {__version__}")
        return
    if sys.argv[1:] == ["env"]:
        from pi_attention.environment import environment_text

        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        print(environment_text())
        return
    try:
        from pi_attention.cli.main import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pi_attention"):
            raise
        raise SystemExit(f"pi-attention needs the package {error.name}: pip install 'pi-attention[train]'") from error
    main()


if __name__ == "__main__":
    command()
