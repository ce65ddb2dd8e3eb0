"""Answer checkers: a problem and a completion in, a reward out."""
