"""How many elements of a bfloat16 wire change from one sync to the next, against the learning rate:
`python -m bench.density`. A study, not a timing: nothing in it depends on the machine."""
