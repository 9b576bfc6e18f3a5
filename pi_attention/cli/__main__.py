"""`python -m pi_attention.cli` is `pi-attention`."""

from pi_attention.cli.main import main

main()
