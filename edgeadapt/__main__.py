"""`python -m edgeadapt`."""

from edgeadapt.cli.app import main

main()
