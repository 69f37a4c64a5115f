"""`python -m kvcore`."""

from kvcore.live.cli import main

main()
