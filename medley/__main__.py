"""`python -m medley`: the command, as torchrun wants it."""

from medley.cli import main

main()
