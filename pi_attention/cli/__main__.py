"""Entry point: `pi-attention`, also as `python -m pi_attention.cli`."""

from __future__ import annotations


def command() -> None:
    """Run the command line, or say what to install: the core alone brings none of what the commands need."""
    try:
        from pi_attention.cli.main import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pi_attention"):
            raise
        raise SystemExit(f"pi-attention needs the package {error.name}: pip install 'pi-attention[train]'") from error
    main()


if __name__ == "__main__":
    command()
