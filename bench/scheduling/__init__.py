"""What `python -m bench rollout` compares with: scheduler, detector and simulator, made plainly;
and the stream of events that schedulers are timed on."""
