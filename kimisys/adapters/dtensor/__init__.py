"""torch DTensor and FSDP2 (``fully_shard``): their own answer to where a rank keeps its part of
every tensor, as a layout and its memory, to plan from and to."""
