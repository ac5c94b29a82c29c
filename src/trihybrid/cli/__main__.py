"""`python -m trihybrid.cli`, and what torchrun starts: torchrun --nproc-per-node 2 -m trihybrid.cli train RECIPE."""

from trihybrid.cli import main

main()
