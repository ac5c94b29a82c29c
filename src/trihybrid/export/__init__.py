"""What leaves a run: the single-file program that trains a compact model, and the challenge's submission folder."""
