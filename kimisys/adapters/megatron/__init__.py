"""The trainer's side: a megatron-core GPT model as a kimisys layout, and the policy that trains
it."""
