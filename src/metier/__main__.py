"""``python -m metier``, and ``torchrun -m metier``."""

from metier.cli import main

main()
